"""The command `eval`: measure frozen features, or tasks with their heads; compare checkpoints."""

import logging
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ssl_xcit.data.crop_dataset import check_labelled
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, read_weights
from ssl_xcit.models.weights import backbone_in, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.run_dir import versions
from ssl_xcit.training.run_name import key_of
from ssl_xcit.transfer.checks import check_part
from ssl_xcit.transfer.evaluate import bad_images_words
from ssl_xcit.transfer.record import transfer_record
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.files import sha256_of, writable_folder, writable_or_here
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Text, Workers

from ..checkpoints import (
    check_comparable,
    checkpoints_in,
    data_settings_of_run,
    expected_architecture,
    folder_of,
    short_names,
    transfer_data_of_run,
)
from ..features.cache import cache_folder, data_digest
from ..results import Evaluation, print_all, write_results
from ..runner import PRETRAINED

log = logging.getLogger(__name__)
TYPED = {"evaluation", "eval_data", "tasks"}  # who types one of these means features


@dataclass(frozen=True)
class HeadData:
    """Test images for a task's own head; None: those of its run."""

    root: Text | None
    file: Text | None
    labels: Text | None
    image_column: Text | None
    label_column: Text | None
    label_kind: Text | None
    images: Text | None
    layout: Text | None
    class_names: Sequence[str] | Mapping[int, str] | None
    ignore: int | Sequence[int] | None


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
    data: HeadData
    model: Node | None = None  # these may be left out
    evaluation: Node | None = None
    eval_data: Node | None = None


def main(settings: EvalSettings) -> Path | None:
    """`ssl-xcit eval`: print tables, write `results.json`, whose path is returned (by the first of
    several ranks), and `results.md`.
    """
    if settings.evaluation is None:
        raise UserError("nothing to measure: add evaluation=standard")
    paths = [checkpoint_path(ckpt) for ckpt in checkpoints_in(settings.ckpt)]
    architecture = expected_architecture(settings.model)
    loaded = [load(path, settings.which, architecture) for path in paths]
    backbones = [backbone for backbone, _ in loaded]
    given = {k: v for k, v in asdict(settings.data).items() if v is not None}
    typed = {key_of(word).split(".")[0] for word in HydraConfig.get().overrides.task}
    if not typed & TYPED and (tasks := tasks_in(loaded, paths)):
        return measure_tasks(settings, paths, tasks, given)
    if given:
        raise UserError(
            f"data.{next(iter(given))}: test images for the heads of runs of ssl-xcit finetune; "
            "images for features are named with eval_data.root=DIR"
        )
    pair = instantiate(settings.eval_data) if settings.eval_data else None
    named = {k for k, task in (settings.evaluation.get("tasks") or {}).items() if task is not None}
    preprocesses = [of_weights(b.preprocess, settings.max_pixels) for b in backbones]
    check_comparable(paths, preprocesses)
    choices = HydraConfig.get().runtime.choices
    # on a task's own images results.json is of its head
    beside_head = choices.get("eval_data") == "of_run" and loaded[0][1] is not None
    out = out_file(settings.out, paths, choices["evaluation"] if beside_head else None)
    if pair is not None:
        check_labelled(pair, preprocesses[0])
    elif not named:
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
            return None
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
            if name in named:  # it was named, so that it has no numbers is an error
                raise type(error)(f"tasks: {name}: {error}")
    return out


def load(
    path: Path, which: Network, architecture: Mapping[str, Any] | None
) -> tuple[XCiT, Task | None]:
    """The backbone in a checkpoint, and its task where it has one."""
    content = read_weights(path)
    backbone, record = backbone_in(content, path, which, architecture), transfer_record(content)
    if record is None:
        return backbone, None
    from ssl_xcit.transfer.load import task_in  # with torchvision, which features do without

    return backbone, task_in(content, record, path, which)


def tasks_in(
    loaded: Sequence[tuple[XCiT, Task | None]], paths: Sequence[Path]
) -> dict[str, Task] | None:
    """The tasks of checkpoints by row; None where one has none. Raises UserError where they are of
    different kinds.
    """
    tasks = [task for _, task in loaded if task is not None]
    if len(tasks) < len(loaded):
        return None
    kinds = [task.kind for task in tasks]
    if len(set(kinds)) > 1:
        words = ", ".join(f"{p} {kind}" for p, kind in zip(paths, kinds, strict=True))
        raise UserError(f"ckpt: different tasks ({words}): measure them one by one")
    names = kinds if len(paths) == 1 else short_names(paths)
    return dict(zip(names, tasks, strict=True))


def measure_tasks(
    settings: EvalSettings,
    paths: Sequence[Path],
    tasks: Mapping[str, Task],
    given: Mapping[str, Any],
) -> Path | None:
    """Measure tasks with their own heads, on images that are given or those of the first's run."""
    from ..heads import evaluate_tasks, named_test_data  # as in `load`

    if int(os.environ.get("RANK", "0")):
        return None  # the first rank does it alone
    backbones = [task.backbone for task in tasks.values()]
    check_comparable(paths, [of_weights(b.preprocess, settings.max_pixels) for b in backbones])
    kind = next(iter(tasks.values())).kind
    if given:
        ckpt = checkpoints_in(settings.ckpt)[0]
        in_run = (folder_of(checkpoint_path(ckpt)) / "run.json").is_file()
        of_run: Any = data_settings_of_run(ckpt).data if in_run else {}
        of_run = OmegaConf.to_container(of_run, resolve=True) if in_run else {}
        annotated, name = named_test_data(next(iter(tasks.values())), given, of_run)
    else:
        data = transfer_data_of_run(checkpoints_in(settings.ckpt)[0])
        annotated, name = data.test, data.name
    preprocess = of_weights(backbones[0].preprocess, settings.max_pixels)
    check_part(f"{name}: test images", annotated, preprocess)
    place = "of_run"
    if given:
        named = str(given.get("file", given.get("root")))
        place = re.sub(r"[^\w.-]+", "_", Path(named).resolve().name)
    out = out_file(settings.out, paths, place)
    models = [model_name(b.architecture) for b in backbones]
    for path, model in zip(paths, models, strict=True):
        say(f"{path}: {model}, {settings.which}, {kind}")
    say(f"{name}: {len(annotated.images):,} test images, {len(annotated.class_names)} classes")
    started = time.perf_counter()
    evaluation = evaluate_tasks(
        tasks, annotated, name, settings.batch_size, settings.num_workers,
        str(settings.device), settings.max_pixels,
    )  # fmt: skip
    title = f"{' and '.join(dict.fromkeys(models))} on {name}"
    print_all(evaluation, title, list(tasks), settings.per_class)
    for words in dict.fromkeys(map(bad_images_words, evaluation.bad_images.values())):
        if words is not None:
            say(words)
    protocol = {row: task.settings for row, task in tasks.items()}
    content = {
        **describe_weights(settings, paths, backbones),
        "transfer": kind,
        "data": name,
        "classes": len(annotated.class_names),
        "test_images": len(annotated.images),
        "test_sha256": data_digest(annotated.images, None),
        "annotations_sha256": annotated.digest,
        "protocol": protocol,
        **describe_here(settings),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    for path in write_results(evaluation, title, list(tasks), content, out):
        say(f"written: {path}")
    return out


def warn_left_out(evaluation: Evaluation) -> None:
    """Warn of what has no numbers, with the reason, once for all rows that share it."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    for row, missing in evaluation.left_out.items():
        for name, error in missing.items():
            rows_of.setdefault((name, str(error)), []).append(row)
    for (name, reason), rows in rows_of.items():
        of = "" if len(rows) == len(evaluation.results) else f" of {', '.join(rows)}"
        log.warning("%s%s is left out: %s", name, of, reason)


def out_file(out: Text | None, paths: Sequence[Path], data: str | None = None) -> Path:
    """Where `results.json` goes, in a folder that can be written: as named, or into that of the
    weights, `comparison.json` for several; with the name of the data where these are not the run's
    own, `results-cifar10.json`, by default the option of `eval_data`. Raises UserError where `out`
    does not end in .json, or its folder cannot be written.
    """
    # under torchrun the first rank alone writes
    other_rank = int(os.environ.get("RANK", "0")) > 0
    if out is None:
        data = data or HydraConfig.get().runtime.choices["eval_data"]
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
    # rank 0 alone runs tasks and most evaluators, which the others wait for
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return True


def describe_weights(
    settings: EvalSettings, paths: Sequence[Path], backbones: Sequence[XCiT]
) -> dict[str, Any]:
    """Which weights were measured."""
    single = len(paths) == 1
    return {
        "weights": str(paths[0]) if single else [str(p) for p in paths],
        "weights_sha256": sha256_of(paths[0]) if single else [sha256_of(p) for p in paths],
        "which": settings.which,
        "model": ", ".join(dict.fromkeys(model_name(b.architecture) for b in backbones)),
    }


def describe_here(settings: EvalSettings) -> dict[str, Any]:
    """By which command, versions and device."""
    on_gpu = torch.cuda.is_available() and str(settings.device) != "cpu"
    return {
        "overrides": list(HydraConfig.get().overrides.task),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
    }


def describe(
    settings: EvalSettings,
    paths: Sequence[Path],
    backbones: Sequence[XCiT],
    pair: LabelledPair | None,
) -> dict[str, Any]:
    """What was measured, on which data, by which protocol and versions."""
    protocol: Mapping[str, Any] = settings.evaluation or {}
    content = describe_weights(settings, paths, backbones)
    if pair is not None:
        parts = {"train": pair.train, "test": pair.test}
        if "evaluators" in protocol:
            sizes = {"resize": pair.resize, "size": pair.size}
        else:  # a head is measured, which needs no training images
            del parts["train"]
            sizes = {}
        cache, visible = cache_folder(protocol.get("cache", False)), shown_in_terminal()
        content |= {"data": pair.name, "classes": len(np.unique(np.asarray(pair.train.labels)))}
        content |= {f"{name}_images": len(part) for name, part in parts.items()}
        content |= {
            f"{name}_sha256": data_digest(
                part, cache, f"hashing {name} images" if visible else None
            )
            for name, part in parts.items()
        }
        content |= sizes
    return content | {"protocol": protocol} | describe_here(settings)
