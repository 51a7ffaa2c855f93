"""Convert a file's pixels to the network's input: channels, value range, statistics.

It belongs to the weights: a checkpoint carries it, and evaluation reads images as training did.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le, Len, Predicate
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.validation import PLACE, Checker, Count, Positive, Text, Words

MAX_PIXELS = 64_000_000  # a decompression bomb unpacks to hundreds of millions
MAX_RESIZED = 16_000_000  # pixels of an image that evaluation resizes as a whole
Pixels = UInt8[np.ndarray, "height width channels"]

# Of values in 0..1. RGB: ImageNet's; grey: their means over the channels.
STATISTICS = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}
MAX_CHANNELS = 128
Channels = Annotated[int, Ge(1), Le(MAX_CHANNELS)]
Byte = Annotated[int, Ge(0), Le(255)]
Background = Annotated[Sequence[Byte], Len(3, 3), Words("3 whole numbers of 0 to 255")]
ValueRange = Annotated[
    Sequence[float],
    Len(2, 2),
    Predicate(lambda values: values[0] < values[1]),
    Words("[low,high] with low < high"),
]


@dataclass(frozen=True)
class Preprocess:
    """How files become the network's input."""

    channels: Channels = 3  # of the pixels, and the model's `in_chans`
    # of each channel, of values in 0..1; None: the known ones of RGB and grey
    mean: Sequence[float] | None = None
    std: Sequence[Positive] | None = None  # standard deviation, likewise
    background: Background = (255, 255, 255)  # 0..255, the colour behind transparent pixels
    # what becomes 0 and 255 in images of more than 8 bits; None: the whole range of 16 bits.
    # Floating-point images need it
    value_range: ValueRange | None = None
    max_pixels: Count = MAX_PIXELS  # images with more by their header are refused

    def __post_init__(self) -> None:
        """Complete the statistics; lists become tuples.

        Raises:
            UserError: statistics of another number of channels.
        """
        for name, known in zip(
            ("mean", "std"), STATISTICS.get(self.channels, (None, None)), strict=True
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, known)
        for name in ("mean", "std", "background", "value_range"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
                if name in ("mean", "std") and len(values) != self.channels:
                    raise UserError(
                        f"preprocess.{name}={list(values)} must be {self.channels} numbers, one a "
                        "channel"
                    )
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise UserError(f"preprocess.value_range={list(self.value_range)} must be [low,high]")

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation by channel.

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
        """Return what a checkpoint keeps: plain data, all but the limit on sizes."""
        settings = asdict(self)
        del settings["max_pixels"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def preprocess(
    channels: Channels = 3,
    stats: Annotated[Text | None, PLACE] = None,
    background: Background = (255, 255, 255),
    value_range: ValueRange | None = None,
    max_pixels: Count = MAX_PIXELS,
) -> Preprocess:
    """Make it from settings; `stats` is a file that `ssl-xcit stats` wrote.

    Raises:
        MissingPath: no such file.
        UserError: the file is of other images (channels, range), or a value is wrong.
    """
    settings = Preprocess(
        channels, background=background, value_range=value_range, max_pixels=max_pixels
    )
    if stats is None:
        return settings
    path = Path(str(stats)).expanduser()
    try:
        content = json.loads(path.read_text())
        kept = {k: content[k] for k in ("channels", "mean", "std", "background", "value_range")}
    except OSError as error:
        raise MissingPath(
            f"preprocess.stats={stats}: no such file; make it with ssl-xcit stats"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"preprocess.stats={stats}: not a file of ssl-xcit stats") from error
    of_file = of_weights(kept, max_pixels)
    for name in ("channels", "background", "value_range"):
        now, then = getattr(settings, name), getattr(of_file, name)
        if now != then:
            raise UserError(
                f"preprocess.stats={stats} was made with {name}={then}, and this is "
                f"preprocess.{name}={now}: give the same, or make it again with ssl-xcit stats"
            )
    return of_file


def of_weights(content: Mapping[str, Any], max_pixels: int = MAX_PIXELS) -> Preprocess:
    """Make it from what a checkpoint holds, checked; an empty mapping is ImageNet's.

    Raises:
        UserError: not such data.
    """
    if "max_pixels" in content:
        raise UserError("preprocess.max_pixels is a setting of this machine, not of weights")
    settings = {**content, "max_pixels": max_pixels}
    checked: Preprocess = Checker({}).instance(Preprocess, settings, "preprocess")
    return checked


def normalise(
    pixels: UInt8[Tensor, "*any channels h w"], preprocess: Preprocess
) -> Float[Tensor, "*any channels h w"]:
    """Return (x / 255 - mean) / std in float32; the memory's order is kept. Channels-last images
    are treated row by row: loops over three channels take four times as long.
    """
    mean, std = (
        torch.tensor(values).mul_(255.0)[:, None, None].to(pixels.device, non_blocking=True)
        for values in preprocess.statistics()
    )
    out = pixels.to(torch.float32, copy=True)
    by_pixel = out.movedim(-3, -1)
    if by_pixel.is_contiguous():
        mean, std = (values.flatten().repeat(by_pixel.shape[-2]) for values in (mean, std))
        by_pixel.flatten(-2).sub_(mean).div_(std)
        return out
    return out.sub_(mean).div_(std)


def to_views(
    crops: UInt8[Tensor, "B V h w channels"], preprocess: Preprocess
) -> Float[Tensor, "V B channels h w"]:
    """Convert pixels 0..255 to normalised channels-last floats, views first, on their device."""
    views = crops.transpose(0, 1).contiguous().permute(0, 1, 4, 2, 3)
    return normalise(views, preprocess)


def resize_center_crop(
    image: Pixels, resize: int, size: int
) -> UInt8[np.ndarray, "size size channels"]:
    """Resize the short side to `resize` (bicubic), then cut the central `size` x `size` pixels."""
    if image.shape[-1] == 3:
        return np.asarray(resized_center(Image.fromarray(image), resize, size))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(resized_center(p, resize, size)) for p in planes], axis=-1)


def resized_center(picture: Image.Image, resize: int, size: int) -> Image.Image:
    """Return `resize_center_crop` of one RGB or grey picture, to the pixel as torchvision does it.

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
