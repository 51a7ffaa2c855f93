"""One image to V crops: 2 global views and L local ones (SwAV's multi-crop as in DINO,
arXiv:2104.14294, appendix).

An augmentation is a function of (image, seed) that returns uint8 pixels; normalisation happens once
a batch, on the device that trains (`to_views`). `TorchvisionMultiCrop` is the reference: Pillow and
torchvision, in the published order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_xcit.data.decode import Pixels
from ssl_xcit.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in 0..1


class Crops(NamedTuple):
    """The crops of an image, or of a batch when stacked (leading B)."""

    global_crops: UInt8[Tensor, "*B G size size 3"]
    local_crops: UInt8[Tensor, "*B L small small 3"]
    indices: int | Tensor  # which image this is


@runtime_checkable
class MultiCrop(Protocol):
    """What the loader calls: crops as a pure function of the image and a seed."""

    global_size: int

    def __call__(
        self, image: Pixels, seed: int
    ) -> tuple[UInt8[np.ndarray, "G size size 3"], UInt8[np.ndarray, "L small small 3"]]:
        """Crops of the image, the same for the same seed."""
        ...


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


class TorchvisionMultiCrop:
    """DINO's augmentation through Pillow and torchvision.

    Each crop: random resized crop (bicubic, aspect 3/4 to 4/3), flip 0.5, colour jitter in random
    order, grey, blur, solarise (threshold 128).

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

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        global_scale: Sequence[float] = (0.4, 1.0),
        local_scale: Sequence[float] = (0.05, 0.4),
        jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        jitter_prob: float = 0.8,
        grey_prob: float = 0.2,
        blur_prob: Sequence[float] = (1.0, 0.1, 0.5),
        blur_radius: Sequence[float] = (0.1, 2.0),
        solarise_prob: Sequence[float] = (0.0, 0.2, 0.0),
    ):
        for name, scale in (("global_scale", global_scale), ("local_scale", local_scale)):
            if not 0.0 < scale[0] <= scale[1] <= 1.0:
                raise UserError(f"{name}={list(scale)}: two shares with 0 < low <= high <= 1")
        lengths = {
            "jitter": (jitter, 4),
            "blur_prob": (blur_prob, 3),
            "blur_radius": (blur_radius, 2),
        }
        lengths["solarise_prob"] = (solarise_prob, 3)
        for name, (values, count) in lengths.items():
            if len(values) != count:
                raise UserError(f"{name}={list(values)}: {count} numbers")
        if min(global_size, local_size) < 1 or num_local < 0:
            raise UserError(
                f"global_size={global_size}, local_size={local_size}, num_local={num_local}: "
                "sizes start at 1 pixel, num_local at 0"
            )
        self.global_size = global_size
        self.local_size = local_size
        self.num_local = num_local

        def view(size: int, scale: Sequence[float], which: int) -> v2.Transform:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(
                        size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC
                    ),
                    v2.RandomHorizontalFlip(0.5),
                    v2.RandomApply([v2.ColorJitter(*jitter)], p=jitter_prob),
                    v2.RandomGrayscale(grey_prob),
                    RandomBlur(blur_prob[which], blur_radius),
                    v2.RandomSolarize(128, p=solarise_prob[which]),
                ]
            )

        self.global_views = [view(global_size, global_scale, which) for which in (0, 1)]
        self.local_view = view(local_size, local_scale, 2)

    def __call__(
        self, image: Pixels, seed: int
    ) -> tuple[UInt8[np.ndarray, "G size size 3"], UInt8[np.ndarray, "L small small 3"]]:
        """(2, global, global, 3) and (L, local, local, 3) crops, the same for the same seed."""
        picture = Image.fromarray(image)
        with torch_seed(seed):
            large = [np.asarray(view(picture)) for view in self.global_views]
            small = [np.asarray(self.local_view(picture)) for _ in range(self.num_local)]
        empty = np.empty((0, self.local_size, self.local_size, 3), np.uint8)
        return np.stack(large), np.stack(small) if small else empty


def to_views(crops: UInt8[Tensor, "B V h w 3"]) -> Float[Tensor, "V B 3 h w"]:
    """Pixels 0..255 to normalised channels-last floats, views first; on whatever device they
    are.
    """
    views = crops.transpose(0, 1).contiguous().permute(0, 1, 4, 2, 3)
    return normalise(views)


def normalise(pixels: UInt8[Tensor, "*any 3 h w"]) -> Float[Tensor, "*any 3 h w"]:
    """(x / 255 - mean) / std with ImageNet's statistics, in float32; the memory's order is kept."""
    mean = torch.tensor(MEAN, device=pixels.device).mul_(255.0)[:, None, None]
    std = torch.tensor(STD, device=pixels.device).mul_(255.0)[:, None, None]
    return (pixels.float() - mean).div_(std)


def resize_center_crop(image: Pixels, resize: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """For evaluation: short side to `resize` (bicubic), then the central `size` x `size` pixels."""
    picture = Image.fromarray(image)
    scale = resize / min(picture.size)
    if scale != 1.0:
        width, height = (max(resize, int(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))
