"""Augmentation of images with objects as published with XCiT (mmdet 2.11; from DETR,
arXiv:2005.12872), and the plain resizing of test images.

Images are resized bilinearly without anti-aliasing and masks to the nearest pixel. An object that
has no pixel left after a crop is no target any more, and neither are crowd regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from annotated_types import Len
from jaxtyping import Bool, UInt8
from torch import Tensor

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.transfer.resize import resized_pixels
from ssl_xcit.transfer.task import Instances
from ssl_xcit.utils.validation import Count, Share, Words

Sides = Annotated[Sequence[Count], Len(1), Words("a list of whole numbers from 1")]
Range = Annotated[Sequence[Count], Len(2, 2), Words("[low,high], whole numbers from 1")]

Image = UInt8[np.ndarray, "_ _ channels"]  # of any size


def rescaled_size(pixels: Pixels, short: int, longest: int) -> tuple[int, int]:
    """The (height, width) of an image with the short side at `short` pixels, or less where the
    long one would be above `longest`.
    """
    height, width, _ = pixels.shape
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resized_masks(
    masks: Bool[np.ndarray, "M _ _"], size: tuple[int, int]
) -> Bool[np.ndarray, "M _ _"]:
    """Masks at (height, width)."""
    made = np.empty((len(masks), *size), bool)
    for mask, out in zip(masks, made, strict=True):
        out[:] = cv2.resize(
            mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
        )
    return made


def resized(pixels: Image, objects: Instances, size: tuple[int, int]) -> tuple[Image, Instances]:
    """An image with its objects at (height, width)."""
    scale = np.array((size[1] / pixels.shape[1], size[0] / pixels.shape[0]) * 2, np.float32)
    masks = None if objects.masks is None else resized_masks(objects.masks, size)
    return resized_pixels(pixels, size), objects._replace(boxes=objects.boxes * scale, masks=masks)


def flipped(pixels: Image, objects: Instances) -> tuple[Image, Instances]:
    """The mirror image."""
    boxes = objects.boxes.copy()
    boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
    masks = None if objects.masks is None else objects.masks[:, :, ::-1]
    return pixels[:, ::-1], objects._replace(boxes=boxes, masks=masks)


def cropped(
    pixels: Image, objects: Instances, top: int, left: int, height: int, width: int
) -> tuple[Image, Instances]:
    """A window of an image, with the boxes clipped to it; objects outside are still there, without
    area.
    """
    offset = np.array((left, top) * 2, np.float32)
    boxes = np.clip(objects.boxes - offset, 0, np.array((width, height) * 2, np.float32))
    rows, columns = slice(top, top + height), slice(left, left + width)
    masks = None if objects.masks is None else objects.masks[:, rows, columns]
    return pixels[rows, columns], objects._replace(boxes=boxes, masks=masks)


def kept(objects: Instances, keep: Bool[np.ndarray, " M"]) -> Instances:
    """Those of the objects; their areas, which are of the file, are left behind."""
    boxes, labels, masks, crowd, _ = objects
    return Instances(boxes[keep], labels[keep], None if masks is None else masks[keep], crowd[keep])


def drawn(choices: Sequence[int]) -> int:
    """One of them, by torch's global generator."""
    return choices[int(torch.randint(len(choices), ()))]


def drawn_between(low: int, high: int) -> int:
    """A whole number of low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class DetectionAugment:
    """Flip, then either resize, or resize, crop and resize again.

    Args:
        sides: short sides in pixels that the network sees, one of which is drawn.
        longest: long side at most.
        crop_sides: short sides before a crop, one of which is drawn.
        crop_range: height and width of a crop are drawn between these, within the image.
        crop_probability: of the second branch.
        flip_probability: of mirror images.
    """

    sides: Sides = tuple(range(480, 801, 32))
    longest: Count = 1333
    crop_sides: Sides = (400, 500, 600)
    crop_range: Range = (384, 600)
    crop_probability: Share = 0.5
    flip_probability: Share = 0.5

    def __call__(self, pixels: Pixels, target: Instances) -> tuple[UInt8[Tensor, "C h w"], Any]:
        """A training image, and boxes (M, 4), labels (M,) from 0 and masks (M, h, w) by name."""
        objects = kept(target, ~target.crowd)
        if torch.rand(()) < self.flip_probability:
            pixels, objects = flipped(pixels, objects)
        if torch.rand(()) < self.crop_probability:
            pixels, objects = self.crop(*self.resize(pixels, objects, self.crop_sides))
        pixels, objects = self.resize(pixels, objects, self.sides)
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        visible = (sides > 0).all(axis=1)
        if objects.masks is not None:
            visible &= objects.masks.any(axis=(1, 2))
        return as_input(pixels), as_tensors(kept(objects, visible))

    def resize(
        self, pixels: Image, objects: Instances, sides: Sequence[int]
    ) -> tuple[Image, Instances]:
        """Resize to one of the short sides."""
        size = rescaled_size(pixels, drawn(sides), self.longest)
        return resized(pixels, objects, size)

    def crop(self, pixels: Image, objects: Instances) -> tuple[Image, Instances]:
        """Cut a window of random size and place; it may hold no object."""
        low, high = self.crop_range
        height, width = (drawn_between(min(s, low), min(s, high)) for s in pixels.shape[:2])
        top = drawn_between(0, pixels.shape[0] - height)
        left = drawn_between(0, pixels.shape[1] - width)
        return cropped(pixels, objects, top, left, height, width)


def as_input(pixels: Pixels) -> UInt8[Tensor, "C h w"]:
    """Channels first."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def as_tensors(objects: Instances) -> dict[str, Tensor]:
    """Objects as tensors by name, without crowd flags."""
    parts = {"boxes": objects.boxes, "labels": objects.labels, "masks": objects.masks}
    return {
        name: torch.from_numpy(np.ascontiguousarray(part))
        for name, part in parts.items()
        if part is not None
    }


@dataclass(frozen=True)
class DetectionPrepare:
    """A test image with its short side at `side` pixels, the long one at most `longest`."""

    side: int = 800
    longest: int = 1333

    def __call__(self, pixels: Pixels) -> UInt8[Tensor, "C h w"]:
        """Resize it."""
        size = rescaled_size(pixels, self.side, self.longest)
        return as_input(resized_pixels(pixels, size))
