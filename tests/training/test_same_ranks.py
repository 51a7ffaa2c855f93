"""Two ranks that were started with different settings."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_xcit.errors import UserError
from ssl_xcit.training.same_ranks import SameRanks

SETTINGS = [
    {"seed": 0, "optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "logger": None},
    {"seed": 0, "optim": {"lr": 2e-3, "betas": [0.9, 0.999], "fused": True}, "logger": None},
]


def work(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    trainer = SimpleNamespace(world_size=2)
    SameRanks(SETTINGS[0]).setup(trainer)
    try:
        SameRanks(SETTINGS[rank]).setup(trainer)
    except UserError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_rank_and_the_difference_are_named_on_all_ranks(tmp_path):
    mp.get_context("forkserver").set_forkserver_preload(["torch", "jaxtyping"])
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    said = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert (
        said[0]
        == said[1]
        == (
            "rank 1 was started with optim.lr 0.002 (rank 0: 0.001), optim.fused True (rank 0: not "
            "set): all ranks need the same command and the same packages"
        )
    )


def test_one_rank_compares_nothing():
    SameRanks(SETTINGS[0]).setup(SimpleNamespace(world_size=1))
