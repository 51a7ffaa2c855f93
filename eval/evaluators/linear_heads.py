"""Linear classifiers on frozen features: many trained side by side, one kept, saved and loaded.

SGD with momentum 0.9 and a cosine to 0, weights N(0, 0.01), bias 0, learning rate times batch / 256
(DINO's linear protocol, arXiv:2104.14294, section 4.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.files import replacing

from ..features.extract import forward_parts, join_parts, parts_of

MOMENTUM = 0.9


class HeadSetting(NamedTuple):
    """What a head is trained with."""

    kind: str  # of features, see KINDS
    lr: float  # at a batch of 256
    weight_decay: float


class ParallelHeads:
    """Linear classifiers, one a setting, trained on the same batches: those of one kind of features
    are one matrix (D, L K), so a step is two matrix products a kind.

    Args:
        settings: L of them.
        dims: D of each kind.
        num_classes: K.
        seed: of the initial weights, the same for all settings of a kind.
        device: where they are trained.
    """

    def __init__(
        self,
        settings: Sequence[HeadSetting],
        dims: Mapping[str, int],
        num_classes: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        self.num_classes = K = num_classes
        self.kinds = list(dict.fromkeys(s.kind for s in settings))
        self.settings = [s for kind in self.kinds for s in settings if s.kind == kind]
        self.weight, self.bias, self.rate, self.decay = {}, {}, {}, {}
        for kind in self.kinds:
            mine = [s for s in self.settings if s.kind == kind]
            generator = torch.Generator().manual_seed(seed)
            one = 0.01 * torch.randn(K, dims[kind], generator=generator)
            self.weight[kind] = one.T.repeat(1, len(mine)).to(device)  # (D, L K)
            self.bias[kind] = torch.zeros(len(mine) * K, device=device)

            def columns(values: list[float]) -> Tensor:
                return torch.tensor(values, device=device).repeat_interleave(K)

            self.rate[kind] = columns([s.lr for s in mine])
            self.decay[kind] = columns([s.weight_decay for s in mine])
        self.velocity = {
            kind: (torch.zeros_like(self.weight[kind]), torch.zeros_like(self.bias[kind]))
            for kind in self.kinds
        }

    def logits(self, kind: str, x: Float[Tensor, "B D"]) -> Float[Tensor, "B L K"]:
        """Of all settings of a kind."""
        flat = torch.addmm(self.bias[kind], x, self.weight[kind])
        return flat.unflatten(1, (-1, self.num_classes))

    def step_(
        self, features: Mapping[str, Float[Tensor, "B _"]], classes: Int64[Tensor, " B"], lr: float
    ) -> None:
        """One step of SGD on the cross-entropy; `lr` multiplies the settings' rates."""
        B = len(classes)
        for kind in self.kinds:
            x, weight, bias = features[kind], self.weight[kind], self.bias[kind]
            # the gradient at the logits: (softmax - one-hot) / B, in their own memory
            error = self.logits(kind, x).softmax(dim=-1)
            at = classes[:, None, None].expand(-1, error.shape[1], 1)
            error.scatter_add_(2, at, torch.full_like(at, -1, dtype=error.dtype))
            error = error.div_(B).flatten(1)
            v_weight, v_bias = self.velocity[kind]
            torch.addmm(v_weight, x.T, error, beta=MOMENTUM, out=v_weight)
            v_bias.mul_(MOMENTUM).add_(error.sum(dim=0))
            if self.decay[kind].any():
                v_weight.addcmul_(weight, self.decay[kind])
                v_bias.addcmul_(bias, self.decay[kind])
            weight.addcmul_(v_weight, self.rate[kind], value=-lr)
            bias.addcmul_(v_bias, self.rate[kind], value=-lr)

    def one(self, place: int) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
        """Weight and bias of a setting."""
        kind = self.settings[place].kind
        first = next(i for i, s in enumerate(self.settings) if s.kind == kind)
        columns = slice((place - first) * self.num_classes, (place - first + 1) * self.num_classes)
        return self.weight[kind][:, columns].T.clone(), self.bias[kind][columns].clone()


def cosine_decay(step: int, steps: int) -> float:
    """From 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


class AccuracyMeter:
    """How many rows each head has got right, and its cross-entropy, over several batches."""

    def __init__(self, heads: ParallelHeads):
        self.heads = heads
        self.correct = torch.zeros(len(heads.settings))
        self.loss = torch.zeros(len(heads.settings))
        self.count = 0

    def add(
        self, features: Mapping[str, Float[Tensor, "B _"]], classes: Int64[Tensor, " B"]
    ) -> None:
        """Class -1 is none that they know. A diverged head gets nothing right."""
        hits, losses = [], []
        for kind in self.heads.kinds:
            logits = self.heads.logits(kind, features[kind])
            right = (logits.argmax(-1) == classes[:, None]) & logits.isfinite().all(-1)
            hits.append(right.sum(dim=0))
            at = classes.clamp_min(0)[:, None, None].expand(-1, logits.shape[1], 1)
            losses.append((logits.logsumexp(-1) - logits.gather(-1, at)[..., 0]).sum(dim=0))
        self.correct += torch.cat(hits).cpu()
        self.loss += torch.cat(losses).cpu()
        self.count += len(classes)

    def best(self) -> int:
        """Of the heads within a standard error of the highest accuracy the one with the lowest
        cross-entropy: few rows do not tell accuracies apart that are close.
        """
        share = self.correct / self.count
        top = share.max()
        error = (top * (1.0 - top) / self.count).sqrt()
        loss = (self.loss / self.count).nan_to_num(torch.inf)
        return int(torch.where(share >= top - error, loss, torch.inf).argmin())


@dataclass
class LinearHead:
    """A finished linear layer on one kind of features; `weight` (K, D) and `bias` (K)."""

    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    kind: str = "cls"  # see `KINDS`
    outputs: str = "classes"  # K class ids, or `labels`, K of them, each yes or no, or `numbers`
    ids: Sequence[int] = ()  # class id of each output; empty unless `classes`
    names: Sequence[str] = ()  # of the classes, by class id
    setting: Mapping[str, Any] | None = None  # what it was trained with

    def __call__(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits, or numbers."""
        return nn.functional.linear(features, self.weight, self.bias)

    def of_images(
        self, backbone: Any, images: Float[Tensor, "B channels H W"]
    ) -> Float[Tensor, "B K"]:
        """From normalised images, through the backbone whose features it was trained on."""
        parts = forward_parts(backbone.eval(), images, parts_of([self.kind]))
        return self(join_parts(parts, [self.kind])[self.kind])

    def save(self, path: Path) -> None:
        """Tensors and plain containers only."""
        content = {**vars(self), "ids": list(self.ids), "names": list(self.names)}
        content["setting"] = dict(self.setting or {})
        with replacing(path) as part:
            torch.save({"format": "ssl_xcit linear head 1", **content}, part)


def load_head(path: str | Path) -> LinearHead:
    """Read what `LinearHead.save` wrote; raises MissingPath or UserError (another file)."""
    if not Path(path).is_file():
        raise MissingPath(f"head={path}: no such file; ssl-xcit eval writes heads/*.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != "ssl_xcit linear head 1":
            raise ValueError("another format")
        return LinearHead(**content)
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"head={path}: not a linear head of ours ({reason})") from error


def known_classes(names: np.ndarray, labels: np.ndarray) -> Int64[np.ndarray, " Q"]:
    """Places of class ids in the sorted `names`; -1, which matches no prediction, for others."""
    places = np.searchsorted(names, labels).clip(max=len(names) - 1)
    return np.where(names[places] == labels, places, -1).astype(np.int64)
