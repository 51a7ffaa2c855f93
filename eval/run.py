"""The command `eval`: what frozen features are worth, by several evaluators, baselines beside them;
of two checkpoints whether their differences mean anything.
"""

import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.module import check_labelled
from ssl_xcit.data.preprocess import MAX_PIXELS, Preprocess, of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import sha256_of, writable_folder, writable_or_here
from ssl_xcit.models.published import place_of
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.run_folder import versions
from ssl_xcit.run_name import PATH_KEYS
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say

from .feature_cache import data_digest, default_features, extract_pair
from .features import Evaluator, FeatureSet, kinds_of
from .frozen import Frozen, Task, placed
from .output import Evaluation, print_all, write
from .overlap import remark, same_content, similar

log = logging.getLogger(__name__)
PRETRAINED = "pretrained"
NOTHING = "it needs test images other than the training images: eval_data.test_fraction=0.2"
Baseline = Callable[[Frozen, Sequence[str]], FeatureSet]


def evaluate(
    backbone: XCiT | Mapping[str, XCiT],
    pair: LabelledPair | None,
    evaluators: Mapping[str, Evaluator | None] | None,
    baselines: Mapping[str, Baseline | None] | None = None,
    tasks: Mapping[str, Task | None] | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    cache: bool | str = False,
    feature_dtype: str = "float32",
    ranks: bool = False,
    near_duplicates: float | None = None,
) -> Evaluation:
    """Every evaluator on the features of backbones and of baselines, and every task on the
    backbones.

    Args:
        backbone: frozen; moved to `device`; several by name.
        pair: labelled images; None where there are tasks only.
        evaluators: by name; each yields (metric, value). Those for other kinds of labels than there
            are, are left out.
        baselines: by name; each makes features from (frozen, kinds of features).
        tasks: by name; each yields (metric, value) on data of its own.
        batch_size: images at once.
        num_workers: loader processes; None: one a core, less one.
        device: `auto` takes every GPU there is; several are joined by `+`.
        max_pixels: images with more by their header are refused.
        cache: keep features on the disk: true for the usual place, or a folder.
        feature_dtype: of the features kept: float32, or float16 for half the size.
        ranks: all ranks of the process group are here and share the work.
        near_duplicates: a cosine of features above which a test image counts as nearly a training
            image; None: they are not counted.
    """
    number_given = isinstance(near_duplicates, int | float)
    if near_duplicates is not None and not (number_given and 0.0 < near_duplicates < 1.0):
        raise UserError(
            f"evaluation.near_duplicates={near_duplicates}: a cosine in (0, 1), or null"
        )
    if feature_dtype not in ("float16", "float32"):
        raise UserError(f"evaluation.feature_dtype={feature_dtype}: float16 or float32")
    networks = backbone if isinstance(backbone, Mapping) else {PRETRAINED: backbone}
    # linear=null switches one off
    used = {k: e for k, e in (evaluators or {}).items() if e is not None and pair is not None}
    if pair is not None:
        kind = label_kind(pair.train.labels)
        used = {k: e for k, e in used.items() if getattr(e, "labels", "classes") == kind}
    wanted = {k: t for k, t in (tasks or {}).items() if t is not None}
    if not used and not wanted:
        raise UserError(
            "nothing to measure: evaluation.evaluators and evaluation.tasks have nothing for these "
            "labels"
        )
    kinds = kinds_of(used)
    done = Evaluation()

    def frozen_of(network: XCiT) -> Frozen:
        first, *others = placed(network, device)
        how = of_weights(network.preprocess, max_pixels)
        return Frozen(
            network, how, first, batch_size, num_workers, pair, shown_in_terminal(),
            cache_folder(cache), others, ranks,
        )  # fmt: skip

    here = not ranks or dist.get_rank() == 0
    for network in networks.values():
        for task in wanted.values():
            if hasattr(task, "check"):
                task.check(frozen_of(network))

    def note(row: str, name: str, measuring: Any, subject: Any) -> dict[str, float]:
        started = time.perf_counter()
        try:
            found = dict(measuring(subject))
            if not found:
                raise UserError(NOTHING)
            if again := sorted(found.keys() & done.results.get(row, {}).keys()):
                raise UserError(f"{again[0]} is measured already: give one of both another name=")
        except (UserError, RunFailed) as error:  # the others' numbers are not lost
            done.left_out.setdefault(row, {})[name] = error
            return {}
        done.seconds.setdefault(row, {})[name] = time.perf_counter() - started
        done.results.setdefault(row, {}).update(found)
        for attribute, kept in (("chosen", done.chosen), ("head", done.heads)):
            if value := getattr(measuring, attribute, None):
                kept.setdefault(row, {})[name] = value
        return found

    def measure(row: str, started: float, features: FeatureSet) -> None:
        done.seconds[row] = {"features": time.perf_counter() - started}
        for name, evaluator in used.items() if here else ():
            for metric in note(row, name, evaluator, features):
                done.note_classes(row, metric, features.test_labels, features.class_names)

    if used:
        frozen = frozen_of(next(iter(networks.values())))
        if here and pair is not None:
            done.overlap["test_images_in_train"] = same_content(pair, frozen.cache, frozen.show)
        for name, baseline in (baselines or {}).items():
            started = time.perf_counter()
            if baseline is not None:
                measure(name.replace("_", " "), started, baseline(frozen, kinds))
    for row, network in networks.items():
        frozen, started = frozen_of(network), time.perf_counter()
        if used:
            features = extract_pair(frozen, kinds, row, feature_dtype)
            measure(row, started, features)
            if here:
                note_similar(done, row, features, near_duplicates)
        for name, task in wanted.items() if here else ():
            note(row, name, task, frozen)
    for times in done.seconds.values():
        times.update({name: round(seconds, 3) for name, seconds in times.items()})
    return done


def note_similar(done: Evaluation, row: str, features: FeatureSet, threshold: float | None) -> None:
    """Count near duplicates, and remark on a k-NN that may rest on them."""
    if threshold is not None:
        count = similar(features, threshold)
        done.overlap[f"near_duplicates_{row}"] = count
        say(f"{row}: {count:,} of {len(features.test):,} test images have a cosine above "
            f"{threshold:g} with a training image")  # fmt: skip
    best = [v for metric, v in done.results.get(row, {}).items() if metric.startswith("knn_k")]
    remark(max(best, default=0.0), row)


def cache_folder(cache: bool | str | None) -> Path | None:
    """Where features are kept; None: nowhere."""
    if cache is True:
        return default_features()
    return Path(str(cache)).expanduser() if cache else None


def main(cfg: DictConfig) -> None:
    """`ssl-xcit eval`: prints tables, writes `results.json` and `results.md`."""
    if cfg.get("evaluation") is None:
        raise UserError("nothing to measure: add evaluation=standard")
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    if cfg.batch_size < 1 or (cfg.num_workers or 0) < 0:
        raise UserError(
            f"batch_size={cfg.batch_size}, num_workers={cfg.num_workers}: at least 1 and 0"
        )
    paths = [checkpoint_path(ckpt) for ckpt in checkpoints_in(cfg.ckpt)]
    backbones = [load_backbone(path, cfg.which, expected(cfg)) for path in paths]
    pair = instantiate(cfg.eval_data) if cfg.get("eval_data") else None
    tasks = {k: v for k, v in (cfg.evaluation.get("tasks") or {}).items() if v is not None}
    hows = [of_weights(b.preprocess, cfg.max_pixels) for b in backbones]
    check_comparable(paths, hows)
    out = out_file(cfg, paths)
    if pair is not None:
        check_labelled(pair, hows[0])
    elif not tasks:
        raise UserError("there are no labelled images: name some with eval_data.root=DIR")
    names = [PRETRAINED] if len(paths) == 1 else short_names(paths)
    models = [model_name(b.architecture) for b in backbones]
    ranks = join_ranks()
    if not ranks or dist.get_rank() == 0:
        for path, model in zip(paths, models, strict=True):
            say(f"{path}: {model}, {cfg.which}")
        if pair is not None:
            say(f"{pair.name}: {len(pair.train):,} train, {len(pair.test):,} test images")
    started = time.perf_counter()
    evaluation: Evaluation = instantiate(cfg.evaluation)(
        dict(zip(names, backbones, strict=True)),
        pair,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        device=cfg.device,
        max_pixels=cfg.max_pixels,
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
        print_all(evaluation, title, names, cfg.per_class)
    say_left_out(evaluation)
    content = about(cfg, paths, backbones, pair) | evaluation.overlap
    content |= {"total_seconds": round(time.perf_counter() - started, 1)}
    for path in write(evaluation, title, names, content, out):
        say(f"written: {path}")
    for row in names:
        for name, error in evaluation.left_out.get(row, {}).items():
            if name in tasks:  # it was asked for
                raise type(error)(f"tasks: {name}: {error}")


def say_left_out(evaluation: Evaluation) -> None:
    """What has no numbers, and why, once each."""
    said: dict[tuple[str, str], list[str]] = {}
    for row, missing in evaluation.left_out.items():
        for name, error in missing.items():
            said.setdefault((name, str(error)), []).append(row)
    for (name, why), rows in said.items():
        of = "" if len(rows) == len(evaluation.results) else f" of {', '.join(rows)}"
        log.warning("%s%s is left out: %s", name, of, why)


def out_file(cfg: DictConfig, paths: Sequence[Path]) -> Path:
    """Where the numbers go; it can be written.

    Raises:
        UserError: `out` is no name of a JSON file, or lies where none can be written.
    """
    if cfg.out is None:
        data = HydraConfig.get().runtime.choices["eval_data"]
        out = default_out(paths[0], len(paths), data)
    else:
        out = Path(str(cfg.out)).expanduser()
        if out.suffix != ".json" or out.is_dir():
            raise UserError(f"out={cfg.out}: a file ending in .json; .md and heads/ go beside it")
    if int(os.environ.get("RANK", "0")):  # under torchrun the first rank alone writes
        return out
    if cfg.out is None:
        return writable_or_here(out.parent, holds=["heads"]) / out.name
    writable_folder(out.parent)
    return out


def checkpoints_in(ckpt: Any) -> list[str]:
    """One, or several in a list.

    Raises:
        UserError: none.
    """
    found = [str(c) for c in ckpt] if isinstance(ckpt, ListConfig | list) else [str(ckpt)]
    if not found:
        raise UserError("ckpt=[]: name a run folder or a checkpoint")
    return found


def check_comparable(paths: Sequence[Path], hows: Sequence[Preprocess]) -> None:
    """Checkpoints measured beside each other take the same images.

    Raises:
        UserError: they have different numbers of channels, or one is named twice.
    """
    if len(set(paths)) < len(paths):
        raise UserError(f"ckpt: {paths[0]} is named twice; two different ones can be compared")
    if len({how.channels for how in hows}) > 1:
        counts = ", ".join(f"{p} {h.channels}" for p, h in zip(paths, hows, strict=True))
        raise UserError(f"ckpt: different numbers of channels ({counts})")


def short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the paths as tells them apart: the run's folder, or the file's name."""
    runs = [p.parent.parent.name if p.parent.name == "checkpoints" else p.stem for p in paths]
    if len(set(runs)) == len(runs):
        return runs
    both = [f"{run}/{p.stem}" for run, p in zip(runs, paths, strict=True)]
    return both if len(set(both)) == len(both) else [str(p) for p in paths]


def join_ranks() -> bool:
    """Under torchrun: one process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        return False
    # rank 0 alone runs evaluators and tasks, which the others wait for
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return True


def about(
    cfg: DictConfig,
    paths: Sequence[Path],
    backbones: Sequence[XCiT],
    pair: LabelledPair | None,
) -> dict[str, Any]:
    """What was measured, on what, by which protocol and versions."""
    single = len(paths) == 1
    content: dict[str, Any] = {
        "weights": str(paths[0]) if single else [str(p) for p in paths],
        "weights_sha256": sha256_of(paths[0]) if single else [sha256_of(p) for p in paths],
        "which": cfg.which,
        "model": ", ".join(dict.fromkeys(model_name(b.architecture) for b in backbones)),
    }
    if pair is not None:
        parts = {"train": pair.train, "test": pair.test}
        labels = {k: np.asarray(part.labels) for k, part in parts.items()}
        content |= {"data": pair.name, "classes": len(np.unique(labels["train"]))}
        content |= {f"{k}_images": len(part) for k, part in parts.items()}
        content |= {f"{k}_sha256": digest for k, digest in digests(cfg, pair).items()}
        content |= {"resize": pair.resize, "size": pair.size}
    return content | {
        "protocol": OmegaConf.to_container(cfg.evaluation, resolve=True),
        "overrides": list(HydraConfig.get().overrides.task),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if on_gpu(cfg) else platform.processor() or "cpu",
    }


def on_gpu(cfg: DictConfig) -> bool:
    """Whether features came from one."""
    return torch.cuda.is_available() and str(cfg.device) != "cpu"


def digests(cfg: DictConfig, pair: LabelledPair) -> dict[str, str]:
    """SHA-256 of the training and of the test images."""
    where = cache_folder(cfg.evaluation.get("cache", False))
    shown = shown_in_terminal()
    return {
        name: data_digest(part, where, f"hashing {name} images" if shown else None)
        for name, part in (("train", pair.train), ("test", pair.test))
    }


def expected(cfg: DictConfig) -> dict[str, Any] | None:
    """What `model=` asks of the file: the parts of the architecture that weights must fit."""
    if cfg.get("model") is None:
        return None
    architecture = instantiate(cfg.model).architecture
    return {k: v for k, v in architecture.items() if k not in ("layer_scale", "num_classes")}


def folder_of(path: Path) -> Path:
    """The run folder of weights, or the folder that a lone file lies in; of downloaded weights one
    here, by their name.
    """
    if (downloaded := place_of(path)) is not None:
        return downloaded
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def default_out(path: Path, count: int, data: str) -> Path:
    """In the folder of the weights: `results.json`, `comparison.json` for several; on other data
    than the run's own its name is added, `results-cifar10.json`.
    """
    name = "results" if count == 1 else "comparison"
    return folder_of(path) / (f"{name}.json" if data == "of_run" else f"{name}-{data}.json")


def data_of_run(ckpt: Any) -> LabelledPair | None:
    """The labelled images that a run was measured on.

    Args:
        ckpt: the weights; of several the first.

    Raises:
        UserError: the weights do not lie in a run folder.
    """
    cfg = data_settings_of_run(checkpoints_in(ckpt)[0])
    return instantiate(cfg.eval_data) if cfg.get("eval_data") else None


def data_settings_of_run(ckpt: str) -> DictConfig:
    """What a run says of its data, from the choices in its `run.json`.

    Only names of our own options and plain values are taken from the file; nothing in it is
    instantiated by itself.

    Args:
        ckpt: its folder, or a checkpoint in it.

    Raises:
        UserError: the weights do not lie in a run folder.
    """
    file = folder_of(checkpoint_path(ckpt)) / "run.json"
    if not file.is_file():
        raise UserError(
            f"ckpt={ckpt} is no run folder, so its evaluation data is unknown: add "
            "eval_data=photos, or "
            "eval_data.root=DIR"
        )
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): name eval_data=...") from error
    overrides = [
        o for o in run["overrides"] if re.match(r"eval_data\.[a-z]\w*=|data\.[a-z]\w*=", o)
    ]
    chosen = [f"{key}={run['choices'][key]}" for key in ("data", "eval_data")]
    cfg = compose("pretrain", overrides=[*chosen, *overrides])
    for key in PATH_KEYS:  # relative ones started where the run was
        there = Path(str(run.get("folder", "."))) / str(given := OmegaConf.select(cfg, key))
        if isinstance(given, str) and not Path(given).expanduser().exists() and there.exists():
            OmegaConf.update(cfg, key, str(there))
    return cfg
