"""Augmentation of images with classes by pixel as published with XCiT (mmseg 0.11), and the plain
resizing of test images.

Images are resized bilinearly without anti-aliasing, masks to the nearest pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
import torch
from annotated_types import Ge, Gt, Len, Predicate
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_hue

from ssl_xcit.data.preprocess import Byte, Pixels, Preprocess
from ssl_xcit.transfer.resize import resized_pixels
from ssl_xcit.transfer.task import IGNORED
from ssl_xcit.utils.validation import Count, Share, Words

SMALLEST = 32  # pixels of a side: the coarsest map's stride
LONGEST = 4  # sides of a resized image, by the short one asked for: (2048, 512) as published
ATTEMPTS = 10  # crops of which the first with several classes is taken
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 0.1  # of 255, factors, turns
Mask = UInt8[np.ndarray, "height width"]
Side = Annotated[int, Ge(SMALLEST)]
ScaleRange = Annotated[
    Sequence[Annotated[float, Gt(0)]],
    Len(2, 2),
    Predicate(lambda values: values[0] <= values[1]),
    Words("[low,high], both above 0"),
]


def resized_size(pixels: Pixels, short: int) -> tuple[int, int]:
    """The (height, width) with the short side at `short` pixels, or less where the long one would
    be above four times that; no side is below 32.
    """
    height, width, _ = pixels.shape
    scale = min(short / min(height, width), LONGEST * short / max(height, width))
    rows, columns = (max(SMALLEST, int(side * scale + 0.5)) for side in (height, width))
    return rows, columns


def resized_mask(mask: UInt8[np.ndarray, "_ _"], size: tuple[int, int]) -> UInt8[np.ndarray, "_ _"]:
    """A mask at (height, width), each pixel that under its centre."""
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def uniform(low: float, high: float) -> float:
    """A number drawn from torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


def scaled_saturation(image: Float[Tensor, "C h w"], factor: float) -> Float[Tensor, "C h w"]:
    """An image with the saturation of HSV multiplied, 1 at most: hue and value stay."""
    value = image.amax(dim=0)
    span = (value - image.amin(dim=0)).clamp(min=1e-6)
    return value - (value - image) * (value / span).clamp(max=factor)


def distorted(image: UInt8[Tensor, "C h w"]) -> UInt8[Tensor, "C h w"]:
    """Brightness, contrast, saturation and hue, each with probability 1/2; contrast before or after
    the two others (photometric distortion of SSD, arXiv:1512.02325). Hue needs three channels.
    """
    turns = (torch.rand(5) < 0.5).tolist()
    bright, contrast, saturate, turn, contrast_first = turns
    values = image.float()
    if bright:
        values = (values + uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    if contrast and contrast_first:
        values = (values * uniform(*CONTRAST)).clamp(0, 255)
    if saturate:
        values = scaled_saturation(values, uniform(*SATURATION))
    if turn and len(values) == 3:
        values = adjust_hue(values / 255, uniform(-HUE, HUE)) * 255
    if contrast and not contrast_first:
        values = (values * uniform(*CONTRAST)).clamp(0, 255)
    return values.round().to(torch.uint8)


@dataclass(frozen=True)
class SegmentationAugment:
    """Resize, crop, flip, distort colours, pad.

    Args:
        crop: side in pixels of what the network sees.
        size: short side of images, before `scale`.
        scale: images are resized by a factor between these.
        max_share: a crop of which one class has as much or more is drawn again, ten times at
            most; 1: none.
        flip: probability of mirror images.
        distort: whether colours are distorted.
        fill: value of each channel outside the image; None: its mean in the crop.
    """

    crop: Side = 512
    size: Count = 512
    scale: ScaleRange = (0.5, 2.0)
    max_share: Share = 0.75
    flip: Share = 0.5
    distort: bool = True
    fill: Sequence[Byte] | None = None

    def fitted_to(self, preprocess: Preprocess) -> "SegmentationAugment":
        """Fill with the mean that is subtracted from images, so with 0 once they are normalised,
        to within half of a value of 8 bits.
        """
        mean, _ = preprocess.statistics()
        return replace(self, fill=tuple(round(255 * value) for value in mean))

    def __call__(
        self, pixels: Pixels, target: Mask
    ) -> tuple[UInt8[Tensor, "C h w"], UInt8[Tensor, "h w"]]:
        """A square of the image and of its mask. What lies outside the image is ignored."""
        short = max(1, int(self.size * uniform(*self.scale)))
        size = resized_size(pixels, short)
        pixels, target = resized_pixels(pixels, size), resized_mask(target, size)
        window = self.window(target)
        pixels, target = pixels[window], target[window]
        if torch.rand(()) < self.flip:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.distort:
            image = distorted(image)
        _, height, width = image.shape
        fill = torch.tensor(self.fill) if self.fill else image.float().mean(dim=(1, 2)).round()
        padded = fill.to(torch.uint8)[:, None, None].repeat(1, self.crop, self.crop)
        mask = torch.full((self.crop, self.crop), IGNORED, dtype=torch.uint8)
        padded[:, :height, :width] = image
        mask[:height, :width] = torch.from_numpy(np.ascontiguousarray(target))
        return padded, mask

    def window(self, mask: Mask) -> tuple[slice, slice]:
        """A random part, at most `crop` pixels a side, in which no class has most of the pixels."""
        for _ in range(ATTEMPTS + 1):
            top, left = (int(torch.randint(max(0, s - self.crop) + 1, ())) for s in mask.shape)
            window = slice(top, top + self.crop), slice(left, left + self.crop)
            if self.max_share == 1.0:
                break
            counts = np.bincount(mask[window].ravel(), minlength=IGNORED + 1)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() < self.max_share * counts.sum():
                break
        return window


@dataclass(frozen=True)
class SegmentationPrepare:
    """A test image with its short side at `size` pixels, the long one at most four times that."""

    size: int = 512

    def __call__(self, pixels: Pixels) -> UInt8[Tensor, "C h w"]:
        """Resize it."""
        made = resized_pixels(pixels, resized_size(pixels, self.size))
        return torch.from_numpy(np.ascontiguousarray(made.transpose(2, 0, 1)))
