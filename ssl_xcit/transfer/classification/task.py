"""Classification with a linear head on the class token: the recipe of XCiT on ImageNet
(arXiv:2106.09681, appendix B) from normalisation to loss.

Differs: MixUp and CutMix are torchvision's, which mixes each image with a random other one of
the batch where timm's takes the batch in reverse order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    one_hot,
)
from torchvision.transforms import v2

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.multicrop import Scale
from ssl_xcit.data.preprocess import Pixels, normalise, of_weights, resize_center_crop
from ssl_xcit.errors import UserError
from ssl_xcit.models.layers import init_linear_
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification.data import balanced_weights
from ssl_xcit.transfer.classification.distillation import (
    Teacher,
    hard_loss,
    load_teacher,
    soft_loss,
)
from ssl_xcit.transfer.classification.measure import AccuracyMeasure, MultiLabelMeasure
from ssl_xcit.transfer.task import AnnotatedSource, Measure
from ssl_xcit.utils.validation import PLACE, Count, NonNegative, Positive, Share, Text

CropRatio = Annotated[float, Gt(0), Le(1)]
Smoothing = Annotated[float, Ge(0), Lt(1)]
ClassWeights = Literal["balanced"] | Sequence[Positive] | None
ERASED_RATIO = (0.3, 1 / 0.3)  # height by width of what is erased, log-uniform


@dataclass(frozen=True)
class CenterCrop:
    """Resize the short side (bicubic), then cut the central square."""

    resize: int  # short side in pixels
    size: int  # side of the square

    def __call__(self, pixels: Pixels) -> UInt8[Tensor, "C h w"]:
        """Return the square, channels first."""
        square = resize_center_crop(pixels, self.resize, self.size)
        return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))


class Classification(nn.Module):
    """Cross-entropy of the class-token logits `backbone.head(backbone(x))`; binary cross-entropy
    of each class for `multi_label`.

    Args:
        backbone: gets a fresh `head` unless it has one of so many classes.
        class_names: K of them.
        size: side of test images in pixels.
        crop_ratio: test images are resized to size / crop_ratio, and their central square is used;
            1.0 as published, 0.875 is the classic 224 of 256.
        multi_label: an image has a row of K zeros and ones instead of one class.
        mixup: parameter alpha of the Beta distribution that MixUp's weight comes from; 0: off.
        cutmix: likewise of CutMix's area.
        mix_prob: probability that a batch is mixed.
        switch_prob: probability that this is by CutMix, where both are on.
        label_smoothing: s: targets are (1 - s) y + s / K, of several labels (1 - s) y + s / 2.
        erase_prob: probability that a rectangle of an image becomes normal noise.
        erase_scale: share of the image's area that is erased.
        class_weights: factor of each class's term of the loss (of several labels, of its positive
            term); `balanced`: from the training images, see `balanced_weights`; None: ones.
        teacher: see `load_teacher`; None: no distillation.
        teacher_ckpt: likewise, its `file`.
        teacher_size: likewise, its `size`.
        alpha: share of the distillation in the loss.
        tau: temperature of soft distillation; None: hard.
        teacher_sha256: the digest of weights that the teacher must have; None: any, and
            `before_training` notes it in `settings`.

    Raises:
        UserError: class weights of another number, or distillation of several labels.
    """

    kind = "classification"
    images_at_once = 64

    def __init__(
        self,
        backbone: XCiT,
        class_names: Sequence[str],
        size: Count = 224,
        crop_ratio: CropRatio = 1.0,
        multi_label: bool = False,
        mixup: NonNegative = 0.8,
        cutmix: NonNegative = 1.0,
        mix_prob: Share = 1.0,
        switch_prob: Share = 0.5,
        label_smoothing: Smoothing = 0.1,
        erase_prob: Share = 0.25,
        erase_scale: Scale = (0.02, 1 / 3),
        class_weights: ClassWeights = None,
        teacher: Text | None = None,
        teacher_ckpt: Annotated[Text | None, PLACE] = None,
        teacher_size: Count | None = None,
        alpha: Share = 0.5,
        tau: Positive | None = None,
        teacher_sha256: str | None = None,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            "size": size,
            "crop_ratio": crop_ratio,
            "multi_label": multi_label,
            "mixup": mixup,
            "cutmix": cutmix,
            "mix_prob": mix_prob,
            "switch_prob": switch_prob,
            "label_smoothing": label_smoothing,
            "erase_prob": erase_prob,
            "erase_scale": list(erase_scale),
            "class_weights": plain(class_weights),
            "teacher": teacher,
            "teacher_ckpt": teacher_ckpt,
            "teacher_size": teacher_size,
            "alpha": alpha,
            "tau": tau,
            "teacher_sha256": teacher_sha256,
        }
        self.backbone = backbone
        self.class_names = tuple(class_names)
        K = len(self.class_names)
        if backbone.architecture["num_classes"] != K:
            backbone.head = nn.Linear(backbone.embed_dim, K)
            init_linear_(backbone.head)
            backbone.architecture["num_classes"] = K
        self.prepare = CenterCrop(floor(size / crop_ratio), size)
        self.multi_label = multi_label
        self.mix_prob = mix_prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.mixup = v2.MixUp(alpha=mixup) if mixup > 0 else None
        self.cutmix = v2.CutMix(alpha=cutmix) if cutmix > 0 else None
        self.erase_ = v2.RandomErasing(
            erase_prob, tuple(erase_scale), ERASED_RATIO, "random", inplace=True
        )
        self.alpha = alpha
        self.tau = tau
        self.teacher: Teacher | None = None
        weights = torch.ones(K)
        if class_weights is not None and class_weights != "balanced":
            if len(class_weights) != K:
                raise UserError(
                    f"class_weights has {len(class_weights)} numbers, and there are {K} classes: "
                    "give one a class, or balanced"
                )
            weights = torch.tensor(class_weights, dtype=torch.float32)
        # not saved: `before_training` makes them again
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)
        if multi_label and teacher is not None:
            raise UserError(
                "teacher: distillation is of one class an image; set multi_label=false or "
                "teacher=null"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no teacher."""
        return {**self.__dict__, "teacher": None}

    def before_training(self, train: AnnotatedSource) -> None:
        """Count the classes of the training images and load the teacher.

        Raises:
            UserError: the labels are of the other kind; see `load_teacher`; the teacher's weights
                have another digest than `teacher_sha256`.
        """
        several = label_kind(np.asarray(train.images.labels)) == "several"
        if several != self.multi_label:
            raise UserError(
                f"multi_label={str(self.multi_label).lower()}, and the images have "
                f"{'several labels' if several else 'one label'} each: set "
                f"multi_label={str(several).lower()}"
            )
        if self.settings["class_weights"] == "balanced":
            weights = torch.from_numpy(balanced_weights(train))
            self.class_weights = weights.to(self.class_weights)
        if (name := self.settings["teacher"]) is None:
            return
        file, channels = self.settings["teacher_ckpt"], self.backbone.architecture["in_chans"]
        self.teacher = load_teacher(
            str(name), None if file is None else str(file), len(self.class_names), channels,
            self.settings["teacher_size"],
        )  # fmt: skip
        expected, digest = self.settings["teacher_sha256"], self.teacher.sha256()
        if expected not in (None, digest):
            raise UserError(
                f"teacher={name} has weights of the digest {digest}, not {expected}: give those "
                "that the run began with, or begin another one with name=..."
            )
        self.settings["teacher_sha256"] = digest

    def logits(self, x: Float[Tensor, "B channels h w"]) -> Float[Tensor, "B K"]:
        """Logits of normalised images, in float32."""
        return self.backbone.head(self.backbone(x)).float()

    def losses(
        self,
        images: Sequence[UInt8[Tensor, "C h w"]] | UInt8[Tensor, "B C h w"],
        targets: Sequence[Shaped[Tensor, "..."]] | Shaped[Tensor, "B ..."],
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Erase, mix, and compare: `cross_entropy`, and `distillation` where there is a teacher,
        weighted 1 - alpha and alpha.
        """
        preprocess = of_weights(self.backbone.preprocess)
        x = normalise(as_batch(images), preprocess)
        for image in x:
            self.erase_(image)
        x, y = self.mixed(x, self.smoothed(as_batch(targets)))
        logits = self.logits(x)
        loss = self.compared(logits, y)
        if self.teacher is None:
            return {"cross_entropy": loss}
        theirs = self.teacher.logits(x, preprocess)
        if self.tau is None:
            distillation = hard_loss(logits, theirs)
        else:
            distillation = soft_loss(logits, theirs, self.tau)
        return {
            "cross_entropy": (1 - self.alpha) * loss,
            "distillation": self.alpha * distillation,
        }

    def smoothed(self, targets: Int[Tensor, "B *K"]) -> Float[Tensor, "B K"]:
        """Class ids or rows of 0 and 1 as smoothed targets."""
        s = self.label_smoothing
        if self.multi_label:
            return targets.float() * (1 - s) + s / 2
        K = len(self.class_names)
        return one_hot(targets.long(), K).float() * (1 - s) + s / K

    def mixed(
        self, x: Float[Tensor, "B channels h w"], y: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B channels h w"], Float[Tensor, "B K"]]:
        """Images and targets, mixed by MixUp or CutMix with one weight for the batch."""
        if torch.rand(()) >= self.mix_prob:
            return x, y
        first, second = self.mixup or self.cutmix, self.cutmix or self.mixup
        mix = second if torch.rand(()) < self.switch_prob else first
        if mix is None:
            return x, y
        # it mixes neighbours, which with repeated augmentation are the same image
        order = torch.randperm(len(x)).to(x.device)
        return mix(x[order], y[order])

    def compared(self, logits: Float[Tensor, "B K"], y: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """Mean over the images of - sum_k w_k y_k log softmax(logits)_k; of several labels, mean
        over images and classes of - w_k y_k log p_k - (1 - y_k) log (1 - p_k).
        """
        weights = self.class_weights
        if self.multi_label:
            return binary_cross_entropy_with_logits(logits, y, pos_weight=weights)
        return cross_entropy(logits, y, weight=weights)

    @torch.no_grad()
    def predict(
        self, inputs: Sequence[UInt8[Tensor, "C h w"]], sizes: Sequence[tuple[int, int]]
    ) -> list[Float[np.ndarray, " K"]]:
        """Return the probabilities of the classes for each image."""
        x = as_batch(inputs).to(self.class_weights.device)
        logits = self.logits(normalise(x, of_weights(self.backbone.preprocess)))
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return list(probabilities.cpu().numpy())

    def measure(self) -> Measure:
        """Accuracy, or average precision of several labels."""
        kind = MultiLabelMeasure if self.multi_label else AccuracyMeasure
        return kind(self.class_names)


def as_batch(tensors: Sequence[Tensor] | Tensor) -> Shaped[Tensor, "B ..."]:
    """A batch of tensors of one shape."""
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


def plain(weights: ClassWeights) -> str | list[float] | None:
    """Class weights as plain data."""
    return weights if weights is None or isinstance(weights, str) else list(weights)
