"""A run that starts from weights instead of at random (`init` in the settings).

Student and teacher both take the backbone. The head is fresh, or that of the file. A fresh head's
gradients are noise to good features, so the backbone stays at first (`Plan.backbone_freeze_steps`)
and its learning rate rises from 0 when it is released. The file is needed once: a run that goes on
has it all in its checkpoints.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.files import sha256_of
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.weights import (
    Training,
    checkpoint_path,
    checkpoints_of,
    load_strictly,
    load_training,
    model_name,
)
from ssl_xcit.models.xcit import XCiT

log = logging.getLogger(__name__)
HEADS = ("fresh", "kept")
FREE = ("layer_scale", "num_classes")  # of an architecture: initial values, and a classifier


def read_start(cfg: DictConfig, run_dir: Path) -> Training | None:
    """The weights to start from; None when there are none, or the run has begun.

    Notes in `cfg.init.sha256` which file it is, and where the head is kept how many prototypes it
    has.

    Raises:
        UserError: a wrong setting, no such file, or one without a head that is to be kept.
    """
    init = cfg.init
    if init.head not in HEADS or init.which not in ("teacher", "student"):
        raise UserError(
            f"init.head={init.head}, init.which={init.which}: fresh or kept; teacher or student"
        )
    if init.ckpt is None:
        if init.needed:
            raise UserError(
                "init.ckpt is needed: this recipe starts from weights; add init.ckpt=... (a run "
                "folder, a checkpoint, a published file or its name)"
            )
        return None
    if checkpoints_of(run_dir) and (run_dir / "config.yaml").is_file():
        begun: Any = OmegaConf.load(run_dir / "config.yaml")
        init.sha256 = OmegaConf.select(begun, "init.sha256")
        if init.head == "kept" and cfg.objective.num_prototypes is None:
            cfg.objective.num_prototypes = OmegaConf.select(begun, "objective.num_prototypes")
        return None
    path = checkpoint_path(str(init.ckpt))
    init.sha256 = sha256_of(path)
    found = load_training(path, init.which)
    if init.head == "kept":
        if found.head is None:
            raise UserError(
                f"init.head=kept: {path} has no projection head; init.head=fresh makes a new one"
            )
        if cfg.objective.num_prototypes is None:
            cfg.objective.num_prototypes = len(found.head["last_layer.weight_v"])
    return found


def start_backbone(backbone: XCiT, found: Training, how: Preprocess, ckpt: str) -> None:
    """Load the weights into a network of the settings.

    Raises:
        UserError: it has another architecture; says what to add.
    """
    there, here = found.backbone.architecture, backbone.architecture
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
    state = {k: v for k, v in found.backbone.state_dict().items() if not k.startswith("head.")}
    load_strictly(backbone, state, ckpt)
    made_with = of_weights(found.backbone.preprocess).of_weights()
    differs = [k for k, v in how.of_weights().items() if made_with[k] != v]
    if differs:
        log.warning(
            "init.ckpt=%s was trained on images read otherwise (%s): its features fit best to "
            "images read in the same way, preprocess...",
            ckpt, ", ".join(f"{k} {made_with[k]}" for k in differs),
        )  # fmt: skip


def start_head(head: DINOHead, found: Training, ckpt: str) -> None:
    """Load the file's projection head.

    Raises:
        UserError: it has other sizes; says what to add.
    """
    assert found.head is not None
    hidden = len(found.head["mlp.0.bias"])
    prototypes, bottleneck = found.head["last_layer.weight_v"].shape
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
    state = {**found.head}
    state.setdefault("last_layer.weight_g", head.last_layer.weight_g.detach())  # frozen at 1
    load_strictly(head, state, ckpt)


def in_words(cfg: DictConfig, freeze_steps: int) -> str:
    """What a run starts from."""
    head = "its head" if cfg.init.head == "kept" else "a fresh head"
    stays = f"; the backbone stays for {freeze_steps:,} steps" if freeze_steps else ""
    return f"starts from {cfg.init.ckpt} ({cfg.init.which}), with {head}{stays}"
