"""One image to V crops: 2 global views and L local ones (SwAV's multi-crop as in DINO,
arXiv:2104.14294, appendix).

An augmentation is a function of (picture, seed) that returns uint8 pixels; normalisation happens
once a batch, on the device that trains. `fused.py` has the fast form, and `TorchvisionMultiCrop`
is the reference: Pillow and torchvision, in the published order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_xcit.data.decode import Picture
from ssl_xcit.errors import UserError

Large = UInt8[np.ndarray, "G size size channels"]
Small = UInt8[np.ndarray, "L small small channels"]


class Replaced(NamedTuple):
    """An image that could not be used."""

    place: int  # in the source
    name: str
    reason: str


class Crops(NamedTuple):
    """The crops of an image, or of a batch when stacked (leading B)."""

    global_crops: UInt8[Tensor, "*B G size size channels"]
    local_crops: UInt8[Tensor, "*B L small small channels"]
    indices: int | Tensor  # which images these are
    replaced: tuple[Replaced, ...] = ()  # bad ones that others stand for


@runtime_checkable
class MultiCrop(Protocol):
    """What the loader calls: crops as a pure function of the picture and a seed."""

    global_size: int

    def check(self, channels: int) -> str | None:
        """What is different for images of so many channels, to be said once; None: nothing.

        Raises:
            UserError: such images cannot be augmented.
        """
        ...

    def __call__(self, picture: Picture, seed: int) -> tuple[Large, Small]:
        """Crops of the picture, the same for the same seed; raises BadImage."""
        ...


@dataclass
class Recipe:
    """DINO's multi-crop by its numbers.

    Each crop: random resized crop (aspect 3/4 to 4/3), flip 0.5, colour jitter in random order,
    grey, blur, solarise (threshold 128).

    Args:
        global_size: side of the two global crops in pixels.
        local_size: side of the local crops.
        num_local: L.
        global_scale: share of the image's area in a global crop.
        local_scale: the same for local crops.
        jitter: strength of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue
            (turns).
        jitter_prob: probability of the jitter.
        grey_prob: probability of grey.
        blur_prob: probability of blur for global crop 1, global crop 2, local crops.
        blur_radius: standard deviation of the blur in pixels of the crop; the reference's is for
            crops of 224 pixels.
        solarise_prob: as `blur_prob`, for solarisation.
    """

    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    global_scale: Sequence[float] = (0.4, 1.0)
    local_scale: Sequence[float] = (0.05, 0.4)
    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: Sequence[float] = (1.0, 0.1, 0.5)
    blur_radius: Sequence[float] = (0.1, 2.0)
    solarise_prob: Sequence[float] = (0.0, 0.2, 0.0)

    def __post_init__(self) -> None:
        """Check what Hydra does not.

        Raises:
            UserError: a range or a length is wrong.
        """
        for name in ("global_scale", "local_scale"):
            low, high = self.numbers(name, 2)
            if not 0.0 < low <= high <= 1.0:
                raise UserError(f"augment.{name}={[low, high]}: 0 < low <= high <= 1")
        jitter = self.numbers("jitter", 4)
        if min(jitter) < 0.0 or max(jitter[:3]) > 1.0 or jitter[3] > 0.5:
            raise UserError(f"augment.jitter={jitter}: three of 0 to 1, and hue of 0 to 0.5")
        radius = self.numbers("blur_radius", 2)
        if not 0.0 < radius[0] <= radius[1]:
            raise UserError(f"augment.blur_radius={radius}: 0 < low <= high")
        chances = {name: self.numbers(name, 3) for name in ("blur_prob", "solarise_prob")}
        chances |= {name: [getattr(self, name)] for name in ("jitter_prob", "grey_prob")}
        for name, values in chances.items():
            if not all(isinstance(v, int | float) and 0.0 <= v <= 1.0 for v in values):
                raise UserError(f"augment.{name}={values}: probabilities, 0 to 1")
        sizes = (self.global_size, self.local_size, self.num_local)
        if not all(type(s) is int for s in sizes) or min(sizes[:2]) < 1 or sizes[2] < 0:
            raise UserError(
                f"augment.global_size={sizes[0]}, local_size={sizes[1]}, num_local={sizes[2]}: "
                "sizes start at 1 pixel, num_local at 0"
            )

    def numbers(self, name: str, count: int) -> list[float]:
        """A setting that is so many numbers."""
        values = getattr(self, name)
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
            raise UserError(f"augment.{name}={values}: {count} numbers")
        if not all(isinstance(v, int | float) for v in values):
            raise UserError(f"augment.{name}={list(values)}: {count} numbers")
        return [float(v) for v in values]


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """torch's CPU generator at `seed` inside, as it was outside."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class RandomBlur(nn.Module):
    """Pillow's Gaussian blur with a radius (standard deviation, in pixels) uniform in `radius`,
    with probability `p`.
    """

    def __init__(self, p: float, radius: Sequence[float] = (0.1, 2.0)):
        super().__init__()
        self.p = p
        self.radius = radius

    def forward(self, image: Image.Image) -> Image.Image:
        """Blurred or as it is."""
        if torch.rand(()) >= self.p:
            return image
        radius = torch.empty(()).uniform_(*self.radius).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


class TorchvisionMultiCrop(Recipe):
    """The recipe through Pillow and torchvision, bicubic: the reference."""

    def __post_init__(self) -> None:
        """Build the transforms."""
        super().__post_init__()

        def view(size: int, scale: Sequence[float], which: int) -> v2.Transform:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(
                        size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC
                    ),
                    v2.RandomHorizontalFlip(0.5),
                    v2.RandomApply([v2.ColorJitter(*self.jitter)], p=self.jitter_prob),
                    v2.RandomGrayscale(self.grey_prob),
                    RandomBlur(self.blur_prob[which], self.blur_radius),
                    v2.RandomSolarize(128, p=self.solarise_prob[which]),
                ]
            )

        self.global_views = [view(self.global_size, self.global_scale, which) for which in (0, 1)]
        self.local_view = view(self.local_size, self.local_scale, 2)

    def check(self, channels: int) -> str | None:
        """Takes RGB only."""
        if channels != 3:
            raise UserError(
                f"augment=torchvision takes RGB, and the images have {channels} channels: "
                "augment=fused"
            )
        return None

    def __call__(self, picture: Picture, seed: int) -> tuple[Large, Small]:
        """(2, global, global, 3) and (L, local, local, 3) crops, the same for the same seed."""
        image = Image.fromarray(picture.pixels())
        with torch_seed(seed):
            large = [np.asarray(view(image)) for view in self.global_views]
            small = [np.asarray(self.local_view(image)) for _ in range(self.num_local)]
        empty = np.empty((0, self.local_size, self.local_size, 3), np.uint8)
        return np.stack(large), np.stack(small) if small else empty
