"""Work of several gloo ranks, each a process with one thread that has the packages loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# whose import takes seconds; jaxtyping before the modules that it is to check
PRELOADED = [
    "torch", "jaxtyping", "lightning", "hydra", "cv2", "faiss", "ssl_xcit.training.module",
    "ssl_xcit.eval.features.extractor",
]  # fmt: skip


def on_ranks(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What work(rank, *arguments) returns on each rank."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    words = (count, folder, work, arguments)
    mp.start_processes(save_work, words, nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def save_work(
    rank: int, count: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
