"""A run that starts from weights instead of at random (`init` in the settings).

Student and teacher both take the backbone. The head is fresh, or that of the file. A fresh head's
gradients are noise to good features, so the backbone stays at first (`Plan.backbone_freeze_steps`)
and its learning rate rises from 0 when it is released. The file is needed once: a run that goes on
has it all in its checkpoints.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, checkpoints_of
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.weights import TrainingWeights, load_strictly, load_training, model_name
from ssl_xcit.models.xcit import TASK_LAYERS, XCiT
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.objective import Objective
from ssl_xcit.training.settings import InitSettings, PretrainSettings
from ssl_xcit.utils.files import sha256_of

log = logging.getLogger(__name__)
FREE = ("layer_scale", "num_classes")  # of an architecture: initial values, and a classifier


def read_start(
    settings: PretrainSettings, run_dir: Path
) -> tuple[PretrainSettings, TrainingWeights | None]:
    """Read the weights to start from; None when there are none, or the run has begun.

    Returns:
        The settings with the file's checksum in `init.sha256` and, where the head is kept, its
        number of prototypes; and the weights.

    Raises:
        UserError: no such file, or one without a head that is to be kept.
    """
    init = settings.init
    if init.ckpt is None:
        if init.needed:
            raise UserError(
                "init.ckpt is needed: this recipe starts from weights; add init.ckpt=... (a run "
                "folder, a checkpoint, a published file or its name)"
            )
        return settings, None
    if checkpoints_of(run_dir) and (run_dir / "config.yaml").is_file():
        before: Any = OmegaConf.load(run_dir / "config.yaml")
        num_prototypes = OmegaConf.select(before, "objective.num_prototypes")
        digest = OmegaConf.select(before, "init.sha256")
        return noted(settings, digest, num_prototypes), None
    path = checkpoint_path(str(init.ckpt))
    start = load_training(path, init.which)
    if init.head == "kept" and start.head is None:
        raise UserError(
            f"init.head=kept: {path} has no projection head of DINO; init.head=fresh makes a new "
            "one"
        )
    num_prototypes = len(start.head["last_layer.weight_v"]) if start.head is not None else None
    return noted(settings, sha256_of(path), num_prototypes), start


def noted(
    settings: PretrainSettings, digest: str | None, num_prototypes: int | None
) -> PretrainSettings:
    """The settings with what the file to start from decides; a number that is set stays."""
    settings = replace(settings, init=replace(settings.init, sha256=digest))
    objective = settings.objective
    if settings.init.head == "kept" and objective.get("num_prototypes", 0) is None:
        settings = replace(settings, objective={**objective, "num_prototypes": num_prototypes})
    return settings


def start_backbone(
    backbone: XCiT, start: TrainingWeights, preprocess: Preprocess, ckpt: str
) -> None:
    """Load the weights into a network of the settings.

    Raises:
        UserError: it has another architecture; says what to add.
    """
    there, here = start.backbone.architecture, backbone.architecture
    differs = [key for key in here if key not in FREE and there[key] != here[key]]
    if differs:
        name = model_name(there)
        words = f"model={name}" if name.startswith("xcit_") else ""
        if differs == ["in_chans"] or not words:
            words = " ".join(f"model.{key}={there[key]}" for key in differs)
        raise UserError(
            f"init.ckpt={ckpt} holds {name} (in_chans {there['in_chans']}), and the model is "
            f"{model_name(here)} (in_chans {here['in_chans']}): add {words}"
        )
    state = start.backbone.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(TASK_LAYERS)}
    load_strictly(backbone, state, ckpt)
    warn_read_otherwise(f"init.ckpt={ckpt}", start.backbone, preprocess)


def warn_read_otherwise(named: str, backbone: XCiT, preprocess: Preprocess) -> None:
    """Warn where weights, as a setting names them, were trained on images read otherwise."""
    made_with = of_weights(backbone.preprocess).of_weights()
    differs = [k for k, v in preprocess.of_weights().items() if made_with[k] != v]
    if differs:
        log.warning(
            "%s was trained on images read otherwise (%s): its features fit best to "
            "images read in the same way, preprocess...",
            named, ", ".join(f"{k} {made_with[k]}" for k in differs),
        )  # fmt: skip


def start_head(head: nn.Module, start: TrainingWeights, ckpt: str) -> None:
    """Load the file's projection head.

    Raises:
        UserError: the objective has another kind of head, or it has other sizes; says what to add.
    """
    assert start.head is not None
    if not isinstance(head, DINOHead):
        raise UserError(
            f"init.head=kept: {ckpt} has a head of DINO, and the objective has another one: "
            "init.head=fresh"
        )
    hidden = len(start.head["mlp.0.bias"])
    prototypes, bottleneck = start.head["last_layer.weight_v"].shape
    wanted = {
        "objective.head.hidden_dim": (hidden, head.mlp[0].out_features),
        "objective.head.bottleneck_dim": (bottleneck, head.mlp[-1].out_features),
        "objective.num_prototypes": (prototypes, len(head.last_layer.weight_v)),
    }
    differs = [f"{key}={there}" for key, (there, here) in wanted.items() if there != here]
    if differs:
        raise UserError(
            f"init.head=kept: the head of {ckpt} has other sizes: add {' '.join(differs)}"
        )
    state = {**start.head}
    state.setdefault("last_layer.weight_g", head.last_layer.weight_g.detach())  # frozen at 1
    load_strictly(head, state, ckpt)


def start_state(objective: Objective, start: TrainingWeights) -> None:
    """Take over the center of the file's objective."""
    if start.center is not None and isinstance(objective, DINO):
        objective.center.center.copy_(start.center)


def described_start(init: InitSettings, freeze_steps: int) -> str:
    """What a run starts from, in words."""
    head = "its head" if init.head == "kept" else "a fresh head"
    frozen = f"; the backbone is frozen for {freeze_steps:,} steps" if freeze_steps else ""
    return f"starts from {init.ckpt} ({init.which}), with {head}{frozen}"
