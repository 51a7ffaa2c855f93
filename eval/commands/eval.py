"""The command `eval`: measure frozen features; compare checkpoints."""

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from ssl_xcit.data.crop_dataset import check_labelled
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.run_dir import versions
from ssl_xcit.utils.files import sha256_of, writable_folder, writable_or_here
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Text, Workers

from ..checkpoints import (
    check_comparable,
    checkpoints_in,
    expected_architecture,
    folder_of,
    short_names,
)
from ..features.cache import cache_folder, data_digest
from ..results import Evaluation, print_all, write_results
from ..runner import PRETRAINED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """`conf/eval.yaml`."""

    main: str
    ckpt: Text | Sequence[Text]
    which: Network
    batch_size: Count
    num_workers: Workers
    max_pixels: Count
    device: Text
    per_class: bool
    out: Text | None
    model: Node | None = None  # these may be left out
    evaluation: Node | None = None
    eval_data: Node | None = None


def main(settings: EvalSettings) -> None:
    """`ssl-xcit eval`: print tables, write `results.json` and `results.md`."""
    if settings.evaluation is None:
        raise UserError("nothing to measure: add evaluation=standard")
    paths = [checkpoint_path(ckpt) for ckpt in checkpoints_in(settings.ckpt)]
    architecture = expected_architecture(settings.model)
    backbones = [load_backbone(path, settings.which, architecture) for path in paths]
    pair = instantiate(settings.eval_data) if settings.eval_data else None
    tasks = {k for k, task in (settings.evaluation.get("tasks") or {}).items() if task is not None}
    preprocesses = [of_weights(b.preprocess, settings.max_pixels) for b in backbones]
    check_comparable(paths, preprocesses)
    out = out_file(settings.out, paths)
    if pair is not None:
        check_labelled(pair, preprocesses[0])
    elif not tasks:
        raise UserError("there are no labelled images: name some with eval_data.root=DIR")
    names = [PRETRAINED] if len(paths) == 1 else short_names(paths)
    models = [model_name(b.architecture) for b in backbones]
    ranks = join_ranks()
    if not ranks or dist.get_rank() == 0:
        for path, model in zip(paths, models, strict=True):
            say(f"{path}: {model}, {settings.which}")
        if pair is not None:
            say(f"{pair.name}: {len(pair.train):,} train, {len(pair.test):,} test images")
    started = time.perf_counter()
    evaluation: Evaluation = instantiate(settings.evaluation)(
        dict(zip(names, backbones, strict=True)),
        pair,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=str(settings.device),
        max_pixels=settings.max_pixels,
        ranks=ranks,
    )
    if ranks:
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()
        if rank:
            return
    subject = " and ".join(dict.fromkeys(models))
    title = f"{subject} on {pair.name}" if pair is not None else subject
    if any(evaluation.results.values()):
        print_all(evaluation, title, names, settings.per_class)
    warn_left_out(evaluation)
    content = describe(settings, paths, backbones, pair) | evaluation.overlap
    content |= {"total_seconds": round(time.perf_counter() - started, 1)}
    for path in write_results(evaluation, title, names, content, out):
        say(f"written: {path}")
    for row in names:
        for name, error in evaluation.left_out.get(row, {}).items():
            if name in tasks:  # it was named, so that it has no numbers is an error
                raise type(error)(f"tasks: {name}: {error}")


def warn_left_out(evaluation: Evaluation) -> None:
    """Warn of what has no numbers, with the reason, once for all rows that share it."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    for row, missing in evaluation.left_out.items():
        for name, error in missing.items():
            rows_of.setdefault((name, str(error)), []).append(row)
    for (name, reason), rows in rows_of.items():
        of = "" if len(rows) == len(evaluation.results) else f" of {', '.join(rows)}"
        log.warning("%s%s is left out: %s", name, of, reason)


def out_file(out: Text | None, paths: Sequence[Path]) -> Path:
    """Where `results.json` goes, in a folder that can be written: as named, or into that of the
    weights, `comparison.json` for several; with the name of the data where these are not the run's
    own, `results-cifar10.json`. Raises UserError where `out` does not end in .json, or its folder
    cannot be written.
    """
    # under torchrun the first rank alone writes
    other_rank = int(os.environ.get("RANK", "0")) > 0
    if out is None:
        data = HydraConfig.get().runtime.choices["eval_data"]
        name = "results" if len(paths) == 1 else "comparison"
        file = folder_of(paths[0]) / (f"{name}.json" if data == "of_run" else f"{name}-{data}.json")
        return file if other_rank else writable_or_here(file.parent, holds=["heads"]) / file.name
    file = Path(str(out)).expanduser()
    if file.suffix != ".json" or file.is_dir():
        raise UserError(f"out={out} must be a file ending in .json; .md and heads/ go beside it")
    if not other_rank:
        writable_folder(file.parent)
    return file


def join_ranks() -> bool:
    """Under torchrun, join one process group; returns whether there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        return False
    # rank 0 alone runs evaluators and tasks, which the others wait for
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return True


def describe(
    settings: EvalSettings,
    paths: Sequence[Path],
    backbones: Sequence[XCiT],
    pair: LabelledPair | None,
) -> dict[str, Any]:
    """What was measured, on which data, by which protocol and versions."""
    single = len(paths) == 1
    protocol: Mapping[str, Any] = settings.evaluation or {}
    content: dict[str, Any] = {
        "weights": str(paths[0]) if single else [str(p) for p in paths],
        "weights_sha256": sha256_of(paths[0]) if single else [sha256_of(p) for p in paths],
        "which": settings.which,
        "model": ", ".join(dict.fromkeys(model_name(b.architecture) for b in backbones)),
    }
    if pair is not None:
        parts = {"train": pair.train, "test": pair.test}
        cache, visible = cache_folder(protocol.get("cache", False)), shown_in_terminal()
        content |= {"data": pair.name, "classes": len(np.unique(np.asarray(pair.train.labels)))}
        content |= {f"{name}_images": len(part) for name, part in parts.items()}
        content |= {
            f"{name}_sha256": data_digest(
                part, cache, f"hashing {name} images" if visible else None
            )
            for name, part in parts.items()
        }
        content |= {"resize": pair.resize, "size": pair.size}
    on_gpu = torch.cuda.is_available() and str(settings.device) != "cpu"
    return content | {
        "protocol": protocol,
        "overrides": list(HydraConfig.get().overrides.task),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
    }
