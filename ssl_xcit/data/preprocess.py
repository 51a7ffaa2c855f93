"""What lies between a file's pixels and the network's input: channels, value range, statistics.

It belongs to the weights: a checkpoint carries it, and evaluation reads images as training did.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.errors import MissingPath, UserError

MAX_PIXELS = 64_000_000  # a decompression bomb unpacks to hundreds of millions
MAX_RESIZED = 16_000_000  # pixels of an image that evaluation resizes as a whole
Pixels = UInt8[np.ndarray, "height width channels"]

# Of values in 0..1. RGB: ImageNet's; grey: their means over the channels.
STATISTICS = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}
MAX_CHANNELS = 128


@dataclass(frozen=True)
class Preprocess:
    """How files become the network's input.

    Args:
        channels: of the pixels, and the model's `in_chans`.
        mean: of each channel, of values in 0..1; None: the known ones of RGB and grey.
        std: standard deviation, likewise.
        background: 0..255, what lies behind transparent pixels.
        value_range: what becomes 0 and 255 in images of more than 8 bits; None: the whole range of
            16 bits. Floating-point images need it.
        max_pixels: images with more by their header are refused.
    """

    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        """Complete the statistics; lists become tuples.

        Raises:
            UserError: a value of the wrong kind or out of its range.
        """
        if type(self.channels) is not int or not 1 <= self.channels <= MAX_CHANNELS:
            raise UserError(f"preprocess.channels={self.channels}: 1 to {MAX_CHANNELS}")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise UserError(f"preprocess.max_pixels={self.max_pixels}: a whole number from 1")
        known = STATISTICS.get(self.channels, (None, None))
        numbers = {
            "mean": (known[0] if self.mean is None else self.mean, self.channels),
            "std": (known[1] if self.std is None else self.std, self.channels),
            "background": (self.background, 3),
            "value_range": (self.value_range, 2),
        }
        for name, (values, count) in numbers.items():
            if values is None:
                continue
            if not is_numbers(values, count):
                raise UserError(f"preprocess.{name}={values}: {count} numbers")
            object.__setattr__(self, name, tuple(values))
        if self.std is not None and min(self.std) <= 0.0:
            raise UserError(f"preprocess.std={list(self.std)}: above 0")
        if not all(type(v) is int and 0 <= v <= 255 for v in self.background):
            raise UserError(f"preprocess.background={list(self.background)}: 3 of 0 to 255")
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise UserError(f"preprocess.value_range={list(self.value_range)}: [low, high]")

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by channel.

        Raises:
            UserError: there are none.
        """
        if self.mean is None or self.std is None:
            raise UserError(
                f"images of {self.channels} channels have no known statistics: make them with "
                f"ssl-xcit stats preprocess.channels={self.channels}, then preprocess.stats=FILE"
            )
        return self.mean, self.std

    def of_weights(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain data, all but the limit on sizes."""
        kept = asdict(self)
        del kept["max_pixels"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def is_numbers(values: Any, count: int) -> bool:
    """A sequence of so many finite numbers."""
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == count
        and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)
    )


def preprocess(
    channels: int = 3,
    stats: str | None = None,
    background: Sequence[int] = (255, 255, 255),
    value_range: Sequence[float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Preprocess:
    """From settings; `stats` is a file that `ssl-xcit stats` wrote.

    Raises:
        MissingPath: no such file.
        UserError: the file is of other images (channels, range), or a value is wrong.
    """
    given = Preprocess(
        channels, background=as_tuple(background), value_range=as_tuple(value_range),
        max_pixels=max_pixels,
    )  # fmt: skip
    if stats is None:
        return given
    path = Path(stats).expanduser()
    try:
        content = json.loads(path.read_text())
        found = {k: content[k] for k in ("channels", "mean", "std", "background", "value_range")}
    except OSError as error:
        raise MissingPath(
            f"preprocess.stats={stats}: no such file; make it with ssl-xcit stats"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"preprocess.stats={stats}: not a file of ssl-xcit stats") from error
    made = of_weights(found, max_pixels)
    for name in ("channels", "background", "value_range"):
        wanted, has = getattr(given, name), getattr(made, name)
        if wanted != has:
            raise UserError(
                f"preprocess.stats={stats} was made with {name}={has}, and this is "
                f"preprocess.{name}={wanted}: give the same, or make it again with ssl-xcit stats"
            )
    return made


def of_weights(content: Mapping[str, Any], max_pixels: int = MAX_PIXELS) -> Preprocess:
    """What a checkpoint holds, checked; an empty mapping is ImageNet's.

    Raises:
        UserError: not such data.
    """
    names = {field.name for field in fields(Preprocess)} - {"max_pixels"}
    unknown = set(content) - names
    if unknown:
        raise UserError(f"preprocessing in the weights: unknown {', '.join(sorted(unknown))}")
    values = {k: as_tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Preprocess(**values, max_pixels=max_pixels)


def as_tuple(values: Any) -> Any:
    """A sequence as a tuple, anything else (to be refused by name) as it is."""
    return tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else values


def normalise(
    pixels: UInt8[Tensor, "*any channels h w"], how: Preprocess
) -> Float[Tensor, "*any channels h w"]:
    """(x / 255 - mean) / std in float32; the memory's order is kept."""
    mean, std = (
        torch.tensor(values, device=pixels.device).mul_(255.0)[:, None, None]
        for values in how.statistics()
    )
    return (pixels.float() - mean).div_(std)


def to_views(
    crops: UInt8[Tensor, "B V h w channels"], how: Preprocess
) -> Float[Tensor, "V B channels h w"]:
    """Pixels 0..255 to normalised channels-last floats, views first; on whatever device they
    are.
    """
    views = crops.transpose(0, 1).contiguous().permute(0, 1, 4, 2, 3)
    return normalise(views, how)


def resize_center_crop(
    image: Pixels, resize: int, size: int
) -> UInt8[np.ndarray, "size size channels"]:
    """For evaluation: short side to `resize` (bicubic), then the central `size` x `size` pixels."""
    if image.shape[-1] == 3:
        return np.asarray(resized_center(Image.fromarray(image), resize, size))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(resized_center(p, resize, size)) for p in planes], axis=-1)


def resized_center(picture: Image.Image, resize: int, size: int) -> Image.Image:
    """`resize_center_crop` of one RGB or grey picture, to the pixel as torchvision does it.

    Of a long and thin picture, which would become larger than `MAX_RESIZED` pixels, only the part
    that is kept is enlarged.
    """
    scale = resize / min(picture.size)
    width, height = (max(resize, int(side * scale)) for side in picture.size)
    if scale == 1.0:
        width, height = picture.size
    left, top = (round((side - size) / 2) for side in (width, height))
    if width * height > MAX_RESIZED:
        start = max(left, 0), max(top, 0)
        end = min(left + size, width), min(top + size, height)
        across, down = picture.width / width, picture.height / height
        box = (start[0] * across, start[1] * down, end[0] * across, end[1] * down)
        sides = end[0] - start[0], end[1] - start[1]
        picture = picture.resize(sides, Image.Resampling.BICUBIC, box=box)
        left, top = left - start[0], top - start[1]
    elif scale != 1.0:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))
