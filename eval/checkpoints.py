"""The checkpoints that a setting names, and the labelled images that a run was measured on."""

import json
import re
from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, folder_of, read_weights
from ssl_xcit.training.settings import place_keys
from ssl_xcit.transfer.record import transfer_record
from ssl_xcit.transfer.task import TransferData
from ssl_xcit.utils.validation import Node, Text

from .evaluators.protocol import as_list

# overrides that are plain values of settings of data, and no nodes of what is instantiated
PLAIN = re.compile(r"(?:eval_)?data\.(?!source=)[a-z]\w*=(?!.*(?:\$\{|_target_))")
SIDE = 224  # at most, of images for features of dense tasks' backbones


def data_of_run(ckpt: Text | Sequence[Text]) -> LabelledPair | None:
    """The labelled images that a run was measured on, of several weights the first's; raises
    UserError where these do not lie in a run folder.
    """
    first = checkpoints_in(ckpt)[0]
    cfg = data_settings_of_run(first)
    if "transfer" in cfg:
        if cfg.transfer != "classification":
            return None
        data = instantiate(cfg.data.source)
        return LabelledPair(
            data.train.images, data.test.images, data.name, *image_sides_of_task(first)
        )
    return instantiate(cfg.eval_data) if cfg.get("eval_data") else None


def image_sides_of_task(ckpt: str) -> tuple[int, int]:
    """Short side and central square of images as the task in a checkpoint of `ssl-xcit finetune` is
    tested on them, of dense tasks at most `SIDE`; raises UserError where there is no task.
    """
    file = checkpoint_path(ckpt)
    record = transfer_record(read_weights(file))
    if record is None:
        raise UserError(f"{file} has no head for a task")
    settings = record["settings"]
    if record["kind"] == "classification":
        return floor(settings["size"] / settings["crop_ratio"]), settings["size"]
    side = min(SIDE, settings["size" if record["kind"] == "segmentation" else "side"])
    return side, side


def transfer_data_of_run(ckpt: str) -> TransferData:
    """The images with targets of a run of `ssl-xcit finetune`; raises UserError for another one."""
    cfg = data_settings_of_run(ckpt)
    if "transfer" not in cfg:
        raise UserError(f"ckpt={ckpt} is no run of ssl-xcit finetune")
    data: TransferData = instantiate(cfg.data.source)
    return data


def data_settings_of_run(ckpt: str) -> DictConfig:
    """The settings of a run's data, from the choices in its `run.json`, by its folder or a
    checkpoint in it; raises UserError where the weights do not lie in a run folder.

    Only names of our own options and plain values are taken from the file; nothing in it is
    instantiated by itself.
    """
    file = folder_of(checkpoint_path(ckpt)) / "run.json"
    if not file.is_file():
        raise UserError(
            f"ckpt={ckpt} is no run folder, so its evaluation data is unknown: add "
            "eval_data=photos, or eval_data.root=DIR"
        )
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): name eval_data=...") from error
    overrides = [o for o in run["overrides"] if PLAIN.match(o)]
    finetuned = "transfer" in run["choices"]
    groups = ("transfer", "experiment") if finetuned else ("data", "eval_data")
    options = {group: run["choices"][group] for group in groups}
    chosen = [f"{g}={o}" for g, o in options.items() if g != "experiment" or o is not None]
    cfg = compose("finetune" if finetuned else "pretrain", overrides=[*chosen, *overrides])
    # relative paths started where the run was
    for key in place_keys(OmegaConf.to_container(cfg, resolve=True)):
        there = Path(str(run.get("folder", "."))) / str(given := OmegaConf.select(cfg, key))
        if isinstance(given, str) and not Path(given).expanduser().exists() and there.exists():
            OmegaConf.update(cfg, key, str(there))
    return cfg


def checkpoints_in(ckpt: Text | Sequence[Text]) -> list[str]:
    """The checkpoints of a setting that names one, or several in a list; UserError for none."""
    words = [str(word) for word in as_list(ckpt)]
    if not words:
        raise UserError("ckpt=[]: name a run folder or a checkpoint")
    return words


def check_comparable(paths: Sequence[Path], preprocesses: Sequence[Preprocess]) -> None:
    """Raise UserError where checkpoints that are measured beside each other do not take the same
    images: they have different numbers of channels, or one is named twice.
    """
    if len(set(paths)) < len(paths):
        raise UserError(f"ckpt: {paths[0]} is named twice; two different ones can be compared")
    if len({preprocess.channels for preprocess in preprocesses}) > 1:
        counts = ", ".join(f"{p} {h.channels}" for p, h in zip(paths, preprocesses, strict=True))
        raise UserError(f"ckpt: different numbers of channels ({counts})")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell paths apart: the run's folder, or the file's name."""
    runs = [p.parent.parent.name if p.parent.name == "checkpoints" else p.stem for p in paths]
    if len(set(runs)) == len(runs):
        return runs
    both = [f"{run}/{p.stem}" for run, p in zip(runs, paths, strict=True)]
    return both if len(set(both)) == len(both) else [str(p) for p in paths]


def expected_architecture(model: Node | None) -> dict[str, Any] | None:
    """The parts of the architecture that weights must fit, where `model=` names one."""
    if model is None:
        return None
    architecture = instantiate(model).architecture
    return {
        k: v for k, v in architecture.items() if k not in ("layer_scale", "num_classes", "pyramid")
    }
