"""Distillation from a frozen classifier (DeiT, arXiv:2012.12877, section 4), as XCiT has it: the
same class-token logits are compared with targets and teacher, there is no distillation token.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, kl_div, log_softmax

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.published import TIMM, fetch_released
from ssl_xcit.models.weights import checkpoint_path, first_few, load_backbone, read_weights
from ssl_xcit.models.xcit import XCiT

PIP = "pip install 'ssl-xcit[timm]'"
PUBLISHED = "timm/regnety_160.deit_in1k"  # RegNetY-16GF, of DeiT and XCiT


class Classifier(nn.Module):
    """A backbone with its own linear head."""

    def __init__(self, backbone: XCiT):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.backbone.head(self.backbone(x))


class Teacher:
    """A frozen classifier in eval mode; no module, so that it is in no state dict of a student.

    Args:
        network: normalised images to logits.
        preprocess: how it wants images to be normalised.
        size: side of the images that it takes; None: any.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess, size: int | None = None):
        self.network = network.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.size = size

    @torch.no_grad()
    def logits(
        self, images: Float[Tensor, "B channels H W"], preprocess: Preprocess
    ) -> Float[Tensor, "B K"]:
        """Logits of images that were normalised with other statistics, resized (bicubic) where
        the teacher takes another size.
        """
        parameter = next(self.network.parameters())
        if parameter.device != images.device:
            self.network.to(images.device)
        if preprocess.statistics() != self.preprocess.statistics():
            (mean, std), (its_mean, its_std) = (
                [images.new_tensor(v)[:, None, None] for v in p.statistics()]
                for p in (preprocess, self.preprocess)
            )
            images = (images * std + (mean - its_mean)) / its_std
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            sides = (self.size, self.size)
            images = interpolate(images, sides, mode="bicubic", antialias=True)
        return self.network(images)

    def sha256(self) -> str:
        """A digest of its weights."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


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
    try:
        import timm
    except ImportError as error:
        raise UserError(f"teacher={name} needs timm: {PIP}") from error
    model = name.removeprefix(TIMM)
    if not timm.is_model(model.partition(".")[0]):
        raise UserError(
            f"teacher={name}: timm {timm.__version__} has no such model; the paper's teacher is "
            f"teacher={PUBLISHED}"
        )
    if file is None:
        try:
            released = timm.get_pretrained_cfg(model)
            path = fetch_released((released and released.hf_hub_id) or name)
        except UserError as error:
            raise UserError(f"teacher={name}: {error} (of a teacher: teacher_ckpt=FILE)") from error
    else:
        path = checkpoint_path(file)
    network: Any = timm.create_model(model, num_classes=num_classes)
    load_timm(network, name, path, num_classes)
    settings = network.pretrained_cfg
    check_channels(f"teacher={name}", settings["input_size"][0], channels)
    if size is None and settings.get("fixed_input_size"):
        size = settings["input_size"][-1]
    return Teacher(
        network, Preprocess(channels, tuple(settings["mean"]), tuple(settings["std"])), size
    )


def load_timm(network: nn.Module, name: str, path: Path, num_classes: int) -> None:
    """Load a file of weights under timm's names strictly; raises UserError where it does not fit.

    Only tensors are read, so that a hostile file runs no code.
    """
    content: Mapping[str, Any] = read_weights(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {str(k).removeprefix("module."): v for k, v in content.items()}
    settings: Any = network.pretrained_cfg
    heads = settings["classifier"]
    for head in [heads] if isinstance(heads, str) else heads:
        weight = state.get(f"{head}.weight")
        if isinstance(weight, Tensor):
            check_fits(f"teacher={name} ({path})", len(weight), num_classes)
    own = network.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is not of shape {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and getattr(state[key], "shape", None) != value.shape
    ]
    if problems:
        raise UserError(f"{path} does not fit teacher={name}: {first_few(problems)}")
    network.load_state_dict(state)


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
