"""Distillation from a frozen classifier (DeiT, arXiv:2012.12877, section 4), as XCiT has it: the
same class-token logits are compared with targets and teacher, there is no distillation token.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.published import TIMM
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.frozen_teacher import (
    FrozenNetwork,
    classifiers_of,
    load_timm,
    timm_state,
    timm_weights,
)

PUBLISHED = "timm/regnety_160.deit_in1k"  # RegNetY-16GF, of DeiT and XCiT


class Classifier(nn.Module):
    """A backbone with its own linear head."""

    def __init__(self, backbone: XCiT):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.backbone.head(self.backbone(x))


class Teacher(FrozenNetwork):
    """A frozen classifier."""

    @torch.no_grad()
    def logits(
        self, images: Float[Tensor, "B channels H W"], preprocess: Preprocess
    ) -> Float[Tensor, "B K"]:
        """Logits of images that were normalised with other statistics."""
        return self.network(self.prepared(images, preprocess))


def hard_loss(logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's decisions: CE(logits, argmax teacher)."""
    return cross_entropy(logits.float(), teacher.argmax(dim=1))


def soft_loss(
    logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], tau: float
) -> Float[Tensor, ""]:
    """tau^2 KL(softmax(teacher / tau), softmax(logits / tau)), a mean over images.

    The paper's equation 2; its code divides by B K, which makes the term K times smaller.
    """
    ours, theirs = (log_softmax(x.float() / tau, dim=1) for x in (logits, teacher))
    return tau**2 * kl_div(ours, theirs, log_target=True, reduction="batchmean")


def load_teacher(
    name: str, file: str | None, num_classes: int, channels: int, size: int | None = None
) -> Teacher:
    """Load the teacher of `num_classes` classes.

    Args:
        name: `timm/NAME` of a model of timm, or what `load_backbone` takes: a run of ours or a
            checkpoint with a classifier, by path or released name.
        file: weights of a timm model; None: timm's own, which it downloads.
        num_classes: of the student.
        channels: of the images.
        size: side of the images that the teacher gets; None: the student's, unless the model takes
            only one.

    Raises:
        MissingPath: no such file.
        UserError: timm is not installed, knows no such model or cannot download it; the weights
            do not fit; the teacher has other classes or channels, or no classifier.
    """
    if name.startswith(TIMM):
        return timm_teacher(name, file, num_classes, channels, size)
    if file is not None:
        raise UserError(
            f"teacher_ckpt={file} is for teachers of timm: name the checkpoint itself with "
            f"teacher={file}"
        )
    backbone = load_backbone(name)
    check_fits(f"teacher={name}", backbone.architecture["num_classes"], num_classes)
    check_channels(f"teacher={name}", backbone.architecture["in_chans"], channels)
    return Teacher(Classifier(backbone), of_weights(backbone.preprocess), size)


def timm_teacher(
    name: str, file: str | None, num_classes: int, channels: int, size: int | None
) -> Teacher:
    """See `load_teacher`."""
    model, path = timm_weights(
        name, file, "teacher_ckpt", f"; the paper's teacher is teacher={PUBLISHED}"
    )
    import timm

    network: Any = timm.create_model(model, num_classes=num_classes)
    check_classes(network, name, path, num_classes)
    load_timm(network, name, path)
    settings = network.pretrained_cfg
    check_channels(f"teacher={name}", settings["input_size"][0], channels)
    if size is None and settings.get("fixed_input_size"):
        size = settings["input_size"][-1]
    return Teacher(
        network, Preprocess(channels, tuple(settings["mean"]), tuple(settings["std"])), size
    )


def check_classes(network: Any, name: str, path: Path, num_classes: int) -> None:
    """Raise UserError where a file of weights has a classifier of other classes."""
    state = timm_state(path)
    for head in classifiers_of(network):
        weight = state.get(f"{head}.weight")
        if isinstance(weight, Tensor):
            check_fits(f"teacher={name} ({path})", len(weight), num_classes)


def check_fits(teacher: str, its_classes: int, num_classes: int) -> None:
    """Raise UserError unless teacher and student have equally many classes."""
    if not its_classes:
        raise UserError(
            f"{teacher} has no classifier: name a supervised checkpoint, such as "
            f"teacher={PUBLISHED}"
        )
    if its_classes != num_classes:
        raise UserError(
            f"{teacher} knows {its_classes:,} classes, and the data set has {num_classes:,}: train "
            "a teacher on the same classes first, or set teacher=null"
        )


def check_channels(teacher: str, its_channels: int, channels: int) -> None:
    """Raise UserError unless the teacher takes such images."""
    if its_channels != channels:
        raise UserError(
            f"{teacher} takes images of {its_channels} channels, and these have {channels}: "
            "set teacher=null"
        )
