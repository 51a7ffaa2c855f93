"""What readers of files give, and how it becomes pixels; what cannot be used is a `BadImage`.

A reader returns `Samples`: the numbers as they are stored and what the file says they mean.
`to_pixels` alone decides what becomes of colours, palettes, transparency and orientation, for every
format and depth.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_xcit.data.preprocess import Pixels, Preprocess

STRIP = 4_000_000  # pixels that are converted at a time
Stored = UInt8[np.ndarray, "rows columns channels"]
RGB = Preprocess()
COLOURS = {"grey": 1, "rgb": 3, "cmyk": 4}  # number of samples
MODES = {  # Pillow's, of 8-bit samples without and with transparency
    ("grey", False): "L",
    ("grey", True): "LA",
    ("rgb", False): "RGB",
    ("rgb", True): "RGBA",
    ("cmyk", False): "CMYK",
}


class BadImage(Exception):
    """This file cannot be used as an image; the message says why."""


class DeepRange(NamedTuple):
    """Range of an image of more than 8 bits: its largest value, and the largest of its type."""

    largest: int
    top: int


def dark_images(ranges: Sequence[DeepRange], preprocess: Preprocess) -> str | None:
    """Return a warning if no image of more than 8 bits comes near the top of its type, such as 12
    bits of a camera in 16: they look nearly black. None: nothing is wrong.
    """
    if not ranges or preprocess.value_range is not None:
        return None
    largest, top = (max(values) for values in zip(*ranges, strict=True))
    if largest >= top // 2:
        return None
    likely = max(255, 2 ** largest.bit_length() - 1)
    return (
        f"no value of {len(ranges):,} images of more than 8 bits is above {likely} of {top}: they "
        f"become nearly black unless preprocess.value_range=[0,{likely}] is set"
    )


@dataclass(eq=False)
class Picture:
    """An image whose header has been read. A JPEG's pixels are decoded when they are needed, then
    at 1/2, 1/4 or 1/8 where that is enough.
    """

    height: int  # in pixels, upright
    width: int  # likewise
    # returns pixels that are at most so many times smaller than the image
    decode: Callable[[float], Pixels]
    kind: str  # format and mode as the file has them, `JPEG RGB`
    deep: DeepRange | None = None  # range of an image of whole numbers of more than 8 bits

    def pixels(self, shrink: float = 1.0) -> Pixels:
        """Return (H, W, channels), at most `shrink` (from 1) times smaller than the image a side.

        Raises:
            BadImage: truncated or corrupt.
        """
        with as_bad_image():
            return self.decode(shrink)


class Samples(NamedTuple):
    """The numbers of an image as they are stored, and what its file says they mean."""

    values: np.ndarray  # (H, W, S)
    top: int  # the value of full intensity; of whole numbers 2 ** bits - 1
    # kind of the first samples, grey, rgb or cmyk; None: the file does not say
    colours: str | None = None
    zero_is_white: bool = False  # of grey
    # kind of the sample behind the colours, straight or premultiplied with the colours; None:
    # further samples are no transparency
    alpha: str | None = None
    orientation: int = 1  # 1 to 8 as in EXIF


def decoded(pixels: Pixels, kind: str, deep: DeepRange | None = None) -> Picture:
    """Return a picture of pixels."""
    height, width, _ = pixels.shape
    return Picture(height, width, lambda _: pixels, kind, deep)


def picture_of(samples: Samples, preprocess: Preprocess, kind: str) -> Picture:
    """Return a picture of samples, decoded now."""
    pixels = to_pixels(samples, preprocess)
    deep = None
    if samples.values.dtype.kind == "u" and samples.top > 255 and samples.values.size:
        count = COLOURS.get(samples.colours or "", samples.values.shape[-1])
        deep = DeepRange(int(samples.values[..., :count].max()), samples.top)
    return decoded(pixels, kind, deep)


@contextmanager
def as_bad_image() -> Iterator[None]:
    """Turn whatever a decoder raises into a BadImage: OSError, SyntaxError, struct.error, ...

    Warnings are silenced: the limits are ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage("not enough memory for it") from error
    except Exception as error:
        words = " ".join(str(error).split())  # one line without addresses: the same everywhere
        raise BadImage(f"{type(error).__name__}: {words.split(' <_io.BytesIO')[0]}") from error


def too_large(preprocess: Preprocess, size: str = "") -> BadImage:
    """Return the error of a decompression bomb."""
    return BadImage(f"by its header more than {preprocess.max_pixels:,} pixels{size}")


def check_size(width: int, height: int, preprocess: Preprocess) -> None:
    """Refuse images that are too large, or have no pixels."""
    if width * height > preprocess.max_pixels:
        raise too_large(preprocess, f": {width} x {height}")
    if min(width, height) < 1:
        raise BadImage(f"no pixels: {width} x {height}")


def to_pixels(samples: Samples, preprocess: Preprocess) -> Pixels:
    """Convert samples to (H, W, channels) in 0..255, upright: the only place that decides how.

    Colours are scaled from `preprocess.value_range`, transparency always from the whole range.

    Raises:
        BadImage: other channels than wanted, no range, or values that are not finite.
    """
    values, channels = samples.values, preprocess.channels
    height, width, count = values.shape
    check_size(width, height, preprocess)
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if samples.colours is None or channels not in (1, 3):
        if count != channels and (count, channels) not in ((1, 3), (3, 1)):
            raise BadImage(f"shape {values.shape}, and preprocess.channels={channels}")
        mode = {1: "L", 3: "RGB"}.get(count)
        plain = channels == count
    else:
        mode = MODES.get((samples.colours, samples.alpha is not None)) or "CMYK"
        count = COLOURS[samples.colours]
        plain = mode == {1: "L", 3: "RGB"}[channels]
    low, high = value_range(values.dtype, samples.top, preprocess)
    pixels = np.empty((height, width, channels), np.uint8)
    rows = max(1, STRIP // width)  # in strips: the copies of a large image stay small
    for top in range(0, height, rows):
        strip = values[top : top + rows]
        colours: np.ndarray = strip[..., :count]
        if samples.alpha == "premultiplied":
            share = strip[..., count : count + 1].astype(np.float32) / samples.top
            colours = np.minimum(colours / np.maximum(share, 1e-9), samples.top)
        part = scaled(colours, low, high)
        if samples.zero_is_white and samples.colours == "grey":
            part = 255 - part
        if not plain:
            if mode in ("LA", "RGBA"):
                clear = scaled(strip[..., count : count + 1], 0, samples.top)
                part = np.concatenate((part, clear), axis=-1)
            image = Image.fromarray(part[..., 0] if mode == "L" else part, mode)
            wanted = "L" if channels == 1 else "RGB"
            part = np.asarray(without_alpha(image, preprocess, wanted)).reshape(-1, width, channels)
        pixels[top : top + rows] = part
    return upright(pixels, samples.orientation)


def value_range(dtype: np.dtype, top: int, preprocess: Preprocess) -> tuple[float, float]:
    """Return the values that become 0 and 255.

    Raises:
        BadImage: pixels of this type need `preprocess.value_range`.
    """
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind not in "uif":
        raise BadImage(f"type {dtype} is no image")
    if dtype == np.uint8:
        return 0, top
    if preprocess.value_range is not None:
        low, high = preprocess.value_range
        return low, high
    if dtype != np.uint16:
        raise BadImage(f"pixels of type {dtype}: set preprocess.value_range=[low,high]")
    return 0, top


def scaled(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values `low` to `high` to 0..255, rounded to the nearest."""
    if array.dtype == np.uint8 and (low, high) == (0, 255):
        return array
    values = array.astype(np.float32)
    values = (values - np.float32(low)) * np.float32(255.0 / (high - low))
    if not np.isfinite(values).all():
        raise BadImage("pixels that are not finite")
    return np.rint(values.clip(0.0, 255.0)).astype(np.uint8)


def without_alpha(image: Image.Image, preprocess: Preprocess, mode: str) -> Image.Image:
    """Composite transparency on the background, and convert to the mode."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, tuple(preprocess.background))
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image if image.mode == mode else image.convert(mode)


def upright(pixels: Stored, orientation: int) -> Pixels:
    """Turn pixels that are stored in one of EXIF's eight orientations."""
    if orientation > 4:  # rows of the file are columns of the image
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
        orientation, (1, 1)
    )
    return np.ascontiguousarray(pixels[::rows, ::columns])
