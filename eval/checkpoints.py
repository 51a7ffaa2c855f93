"""The checkpoints that a setting names, and the labelled images that a run was measured on."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.published import results_folder
from ssl_xcit.models.weights import checkpoint_path
from ssl_xcit.training.settings import place_keys
from ssl_xcit.utils.validation import Node, Text

from .evaluators.protocol import as_list


def folder_of(path: Path) -> Path:
    """The run folder of weights, or the folder that a lone file lies in; of downloaded weights one
    here, by their name.
    """
    if (downloaded := results_folder(path)) is not None:
        return downloaded
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def data_of_run(ckpt: Text | Sequence[Text]) -> LabelledPair | None:
    """The labelled images that a run was measured on, of several weights the first's; raises
    UserError where these do not lie in a run folder.
    """
    cfg = data_settings_of_run(checkpoints_in(ckpt)[0])
    return instantiate(cfg.eval_data) if cfg.get("eval_data") else None


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
    overrides = [
        o for o in run["overrides"] if re.match(r"eval_data\.[a-z]\w*=|data\.[a-z]\w*=", o)
    ]
    chosen = [f"{key}={run['choices'][key]}" for key in ("data", "eval_data")]
    cfg = compose("pretrain", overrides=[*chosen, *overrides])
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
    return {k: v for k, v in architecture.items() if k not in ("layer_scale", "num_classes")}
