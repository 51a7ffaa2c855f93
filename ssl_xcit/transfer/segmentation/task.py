"""Semantic segmentation: Semantic FPN or UperNet on an XCiT's pyramid."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ssl_xcit.data.preprocess import normalise, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.segmentation.augment import SegmentationPrepare, Side
from ssl_xcit.transfer.segmentation.heads import FCN, SemanticFPN, UperNet, resized
from ssl_xcit.transfer.segmentation.measure import SegmentationMeasure
from ssl_xcit.transfer.task import IGNORED
from ssl_xcit.utils.validation import Count, NonNegative

AUXILIARY_MAP = 2  # of the pyramid: that of the third tapped block, stride 16
MIN_UPERNET_BATCH = 2  # images
CLASSES_AT_ONCE = 16  # whose logits are enlarged together


class Segmentation(nn.Module):
    """A segmenter; its defaults are the published settings on ADE20k.

    Args:
        backbone: with its pyramid.
        class_names: in the order of the labels, at most 255.
        head: UperNet has an auxiliary classifier in training.
        channels: of the head; None: 128 of Semantic FPN, 512 of UperNet.
        neck_channels: of Semantic FPN's feature pyramid network; None: the backbone's width.
        dropout: share of the head's channels that are dropped in training.
        auxiliary_channels: of UperNet's auxiliary classifier.
        auxiliary_weight: of its loss.
        class_weights: of the classes in the loss; None: all 1.
        size: short side of test images in pixels.
        inference: `whole` images, or `slide` a window over them.
        crop: side of the window.
        stride: pixels from window to window.

    Raises:
        UserError: too many classes, another number of weights, or a backbone without pyramid.
    """

    kind = "segmentation"
    images_at_once = 1

    def __init__(
        self,
        backbone: XCiT,
        class_names: Sequence[str],
        head: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        channels: Count | None = None,
        neck_channels: Count | None = None,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
        auxiliary_channels: Count = 256,
        auxiliary_weight: NonNegative = 0.4,
        class_weights: Sequence[NonNegative] | None = None,
        size: Side = 512,
        inference: Literal["whole", "slide"] = "whole",
        crop: Side = 512,
        stride: Count = 341,
    ):
        super().__init__()
        num_classes = len(class_names)
        if not 1 <= num_classes <= IGNORED:
            raise UserError(
                f"{num_classes} classes: masks of 8 bits have 1 to {IGNORED} classes, for "
                f"{IGNORED} marks pixels without one"
            )
        if class_weights is not None and len(class_weights) != num_classes:
            raise UserError(
                f"class_weights has {len(class_weights)} numbers, and there are {num_classes} "
                "classes: give one for each, or null"
            )
        if "pyramid" not in backbone.architecture:
            raise UserError(
                "segmentation needs a backbone with a pyramid: build it with pyramid=True"
            )
        self.class_names = tuple(class_names)
        self.settings: dict[str, Any] = {
            "head": head,
            "channels": channels,
            "neck_channels": neck_channels,
            "dropout": dropout,
            "auxiliary_channels": auxiliary_channels,
            "auxiliary_weight": auxiliary_weight,
            "class_weights": None if class_weights is None else list(class_weights),
            "size": size,
            "inference": inference,
            "crop": crop,
            "stride": stride,
        }
        self.prepare = SegmentationPrepare(size)
        self.auxiliary_weight = auxiliary_weight
        self.inference, self.crop, self.stride = inference, crop, stride
        self.backbone = backbone
        width = backbone.embed_dim
        self.head: SemanticFPN | UperNet
        self.auxiliary: FCN | None = None
        if head == "upernet":
            self.head = UperNet(width, num_classes, channels or 512, dropout)
            self.auxiliary = FCN(width, num_classes, auxiliary_channels, dropout)
        else:
            self.head = SemanticFPN(width, num_classes, channels or 128, dropout, neck_channels)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def losses(
        self,
        images: Sequence[UInt8[Tensor, "C h w"]] | UInt8[Tensor, "B C h w"],
        targets: Sequence[UInt8[Tensor, "h w"]] | UInt8[Tensor, "B h w"],
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Cross-entropy of the head (`segmentation`), and of UperNet's auxiliary classifier times
        its weight (`auxiliary`).

        Args:
            images: all of one size.
            targets: class ids; 255: ignored.

        Raises:
            UserError: see `check_batch`.
        """
        self.check_batch(len(images))
        labels = torch.stack(tuple(targets))
        maps = self.backbone.pyramid(self.normalised(torch.stack(tuple(images))))
        losses = {"segmentation": self.loss(self.head(maps), labels)}
        if self.auxiliary is not None:
            auxiliary = self.loss(self.auxiliary(maps[AUXILIARY_MAP]), labels)
            losses["auxiliary"] = self.auxiliary_weight * auxiliary
        return losses

    def check_batch(self, num_images: int) -> None:
        """Check that a batch, or the smallest of the parts that it is computed in, has enough
        images.

        Raises:
            UserError: UperNet's statistics of whole images need two of them.
        """
        if num_images < MIN_UPERNET_BATCH and self.auxiliary is not None:
            raise UserError(
                "UperNet normalises pooled maps by the batch, so that each of its parts needs at "
                f"least {MIN_UPERNET_BATCH} images, and the smallest has {num_images}: set a "
                "larger batch_size, a smaller trainer.accumulate, or task.head=semantic_fpn"
            )

    def loss(
        self, logits: Float[Tensor, "B K _ _"], labels: UInt8[Tensor, "B h w"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy at the labels' size, its mean over all pixels, those ignored as 0.

        So it is defined where all are ignored, and published models were trained with it.
        """
        total = cross_entropy(
            resized(logits.float(), labels.shape[-2:]),
            labels.long(),
            weight=self.class_weights,
            ignore_index=IGNORED,
            reduction="sum",
        )
        return total / labels.numel()

    def normalised(self, images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Images as the backbone was trained to see them."""
        return normalise(images, of_weights(self.backbone.preprocess))

    def logits(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K _ _"]:
        """Logits of stride 4, from normalised images."""
        output: Tensor = self.head(self.backbone.pyramid(images))
        return output.float()

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """Logits at the images' size, from normalised images, by the inference that is set."""
        if self.inference == "slide":
            return self.slide(images)
        return resized(self.logits(images), images.shape[-2:])

    def slide(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """Mean logits of overlapping windows; the last of a row or column ends at the border."""
        B, _, height, width = images.shape
        totals = images.new_zeros(B, len(self.class_names), height, width)
        counts = images.new_zeros(height, width)
        for top in self.starts(height):
            for left in self.starts(width):
                window = ..., slice(top, top + self.crop), slice(left, left + self.crop)
                part = images[window]
                totals[window] += resized(self.logits(part), part.shape[-2:])
                counts[window] += 1
        return totals / counts

    def starts(self, length: int) -> list[int]:
        """First pixels of the windows along a side."""
        last = max(0, length - self.crop)
        return [*range(0, last, self.stride), last]

    @torch.no_grad()
    def predict(
        self, inputs: Sequence[UInt8[Tensor, "C _ _"]], sizes: Sequence[tuple[int, int]]
    ) -> list[UInt8[np.ndarray, "_ _"]]:
        """Class ids of prepared images at the (height, width) of their files; in eval mode."""
        assert not self.training
        classes = []
        for image, size in zip(inputs, sizes, strict=True):
            normalised = self.normalised(image[None])
            logits = (
                self.slide(normalised) if self.inference == "slide" else self.logits(normalised)
            )
            classes.append(most_likely(logits, size)[0].cpu().numpy())
        return classes

    def measure(self) -> SegmentationMeasure:
        """mIoU, of no image yet."""
        return SegmentationMeasure(self.class_names)


def most_likely(logits: Float[Tensor, "B K _ _"], size: tuple[int, int]) -> UInt8[Tensor, "B h w"]:
    """The class of the highest logit at (height, width), a few classes at a time: at the size of a
    large file, 150 of them would take gigabytes.
    """
    best, classes = None, None
    for start in range(0, logits.shape[1], CLASSES_AT_ONCE):
        part = resized(logits[:, start : start + CLASSES_AT_ONCE], size)
        values, indices = part.max(dim=1)
        indices = (indices + start).to(torch.uint8)
        if best is None or classes is None:
            best, classes = values, indices
        else:
            better = values > best
            best, classes = torch.where(better, values, best), torch.where(better, indices, classes)
    assert classes is not None
    return classes
