"""Bytes to pixels, safely; what a bad image is.

Pillow decodes: torchvision's PNG decoder ends the process on a corrupt file. The header is checked
before any pixel is allocated, only formats of images are tried (no PostScript, which runs a
program), and truncated files are refused rather than filled with grey.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_xcit.data.preprocess import Pixels, Preprocess

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY = b"\x93NUMPY"
RGB = Preprocess()
EXIF_ORIENTATION = 0x0112
SAMPLES_PER_PIXEL = 277
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """This file cannot be used as an image; the message says why."""


@cache
def formats() -> tuple[str, ...]:
    """Those that this Pillow was built with; AVIF is not always there."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class Picture:
    """An image whose header has been read. A JPEG's pixels are decoded when they are asked for,
    then at 1/2, 1/4 or 1/8 where that is enough.

    Args:
        height: in pixels, upright.
        width: likewise.
        decode: pixels that are at most so many times smaller than the image.
        kind: format and mode as the file has them, `JPEG RGB`.
    """

    def __init__(self, height: int, width: int, decode: Callable[[float], Pixels], kind: str):
        self.height = height
        self.width = width
        self.kind = kind
        self._decode = decode

    def pixels(self, shrink: float = 1.0) -> Pixels:
        """(H, W, channels), at most `shrink` (from 1) times smaller than the image on each side.

        Raises:
            BadImage: truncated or corrupt.
        """
        with as_bad_image():
            return self._decode(shrink)


def decoded(pixels: Pixels, kind: str) -> Picture:
    """A picture whose pixels are there."""
    height, width, _ = pixels.shape
    return Picture(height, width, lambda _: pixels, kind)


@contextmanager
def as_bad_image() -> Iterator[None]:
    """Whatever a decoder raises is a BadImage: OSError, SyntaxError, ValueError, struct.error, ...

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


def open_picture(content: bytes | np.ndarray, how: Preprocess = RGB) -> Picture:
    """An encoded image, or pixels as they are stored; upright, with the wanted channels.

    EXIF rotation is applied. For three channels grey is repeated, for one colours are weighed
    (ITU-R 601); CMYK and palettes are converted, transparency composited on `how.background`; of
    an animation the first frame is taken. Other channel counts come from TIFF, .npy, or a file
    with exactly as many. More than 8 bits are scaled from `how.value_range`.

    Raises:
        BadImage: empty, corrupt, no image, other channels than wanted, or more than
            `how.max_pixels` pixels by its header.
    """
    if isinstance(content, np.ndarray):
        pixels = from_array(content, how)
        return decoded(pixels, f"array {content.dtype}")
    if not content:
        raise BadImage("empty file")
    with as_bad_image():
        if content.startswith(NPY):
            return open_npy(content, how)
        if content.startswith(TIFF) and how.channels not in (1, 3):
            return open_tiff(content, how)
        try:
            image = Image.open(io.BytesIO(content), formats=formats())
        except Image.DecompressionBombError as error:  # Pillow's own, higher limit
            raise too_large(how) from error
        except Image.UnidentifiedImageError:
            if content.startswith(TIFF):
                return open_tiff(content, how)
            raise
        check_size(*image.size, how)
        if image.format == "TIFF" and samples_per_pixel(image) > 4:
            return open_tiff(content, how)  # Pillow would drop what it cannot show
        return open_pillow(image, how)


def decode(content: bytes | np.ndarray, how: Preprocess = RGB) -> Pixels:
    """All pixels of `open_picture`; raises as it does."""
    return open_picture(content, how).pixels()


def read_file(path: str | Path) -> bytes:
    """A file's content.

    Raises:
        BadImage: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror}") from error


def read_image(path: str | Path, how: Preprocess = RGB) -> Pixels:
    """`decode` of a file; raises BadImage."""
    return decode(read_file(path), how)


def too_large(how: Preprocess, size: str = "") -> BadImage:
    """The refusal of an image bomb."""
    return BadImage(f"by its header more than {how.max_pixels:,} pixels{size}")


def check_size(width: int, height: int, how: Preprocess) -> None:
    """Refuse what is too large, or nothing."""
    if width * height > how.max_pixels:
        raise too_large(how, f": {width} x {height}")
    if min(width, height) < 1:
        raise BadImage(f"no pixels: {width} x {height}")


def open_pillow(image: Image.Image, how: Preprocess) -> Picture:
    """Of an open file; a JPEG waits, anything else is decoded now."""
    kind = f"{image.format} {image.mode}"
    if image.format in ("JPEG", "MPO"):
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
        width, height = image.size
        if turn in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8]):
            width, height = height, width

        def decode_jpeg(shrink: float) -> Pixels:
            scale = next(s for s in (8, 4, 2, 1) if s <= max(shrink, 1.0))
            if scale > 1:
                image.draft(None, (image.width // scale or 1, image.height // scale or 1))
            image.load()
            return to_array(image if turn is None else image.transpose(turn), how)

        return Picture(height, width, once(decode_jpeg), kind)
    image.load()
    turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
    pixels = to_array(image if turn is None else image.transpose(turn), how)
    return decoded(pixels, kind)


def once(decode: Callable[[float], Pixels]) -> Callable[[float], Pixels]:
    """Pillow's draft changes the image, so the first answer stands for all."""
    found: list[Pixels] = []

    def decode_once(shrink: float) -> Pixels:
        if not found:
            found.append(decode(shrink))
        return found[0]

    return decode_once


def to_array(image: Image.Image, how: Preprocess) -> Pixels:
    """A loaded Pillow image of any mode as (H, W, channels) in 0..255."""
    if image.mode == "F" or image.mode.startswith("I"):
        return from_array(np.asarray(image), how)
    if how.channels not in (1, 3):
        if len(image.getbands()) == how.channels and image.mode not in ("PA", "La"):
            return np.asarray(image).reshape(image.height, image.width, how.channels)
        raise BadImage(f"mode {image.mode}, and preprocess.channels={how.channels}")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, how.background)
        image.paste(rgba, mask=rgba.getchannel("A"))
    if how.channels == 1:
        return np.asarray(image if image.mode == "L" else image.convert("L"))[..., None]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def samples_per_pixel(image: Image.Image) -> int:
    """Of a TIFF by its header, where Pillow shows as many as it has a mode for."""
    tags: Any = getattr(image, "tag_v2", {})
    return int(tags.get(SAMPLES_PER_PIXEL, 1))


def open_npy(content: bytes, how: Preprocess) -> Picture:
    """A numpy file of (H, W), (H, W, channels) or (channels, H, W)."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"numpy format {version}")
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else (
        np.lib.format.read_array_header_2_0
    )  # fmt: skip
    shape, _, dtype = read(stream)
    if not 2 <= len(shape) <= 3 or dtype.kind not in "uifb":
        raise BadImage(f"an array of shape {shape} and type {dtype} is no image")
    expected = dtype.itemsize * int(np.prod(shape, dtype=object))
    if expected != len(content) - stream.tell():
        raise BadImage(f"truncated: {len(content) - stream.tell():,} of {expected:,} bytes")
    array = np.load(io.BytesIO(content), allow_pickle=False)
    pixels = from_array(array, how)
    return decoded(pixels, f"NPY {dtype}")


def open_tiff(content: bytes, how: Preprocess) -> Picture:
    """What Pillow does not read: any number of channels, 8 or 16 bits, floating point."""
    import tifffile  # only here: it takes a tenth of a second to import

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong, BadImage says

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        if page.dtype is None or not 2 <= len(page.shape) <= 3:
            raise BadImage(f"a TIFF page of shape {page.shape} and type {page.dtype} is no image")
        check_size(page.imagewidth, page.imagelength, how)
        if int(np.prod(page.shape, dtype=object)) > how.max_pixels * max(how.channels, 4):
            raise too_large(how, f": {page.shape}")
        whole = math.prod(page.chunked) == len(page.dataoffsets) and all(
            count > 0 and offset + count <= len(content)
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        if not whole:  # tifffile would put zeros in its place
            raise BadImage("truncated")
        array = page.asarray()
        kind = f"TIFF {page.dtype}"
    pixels = from_array(array, how)
    return decoded(pixels, kind)


def from_array(array: np.ndarray, how: Preprocess) -> Pixels:
    """(H, W), (H, W, channels) or (channels, H, W) of any number type as 0..255.

    uint8 stays as it is; bool is 0 and 255; others are scaled from `how.value_range`, which is by
    default 0 to 65535, and has to be given for floating point.

    Raises:
        BadImage: other channels, no range, or values that are not finite.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise BadImage(f"an array of shape {array.shape} is no image")
    wanted = {1: (1, 3), 3: (3, 1)}.get(how.channels, (how.channels,))
    if array.shape[-1] not in wanted and array.shape[0] == how.channels:
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in wanted:
        raise BadImage(f"shape {array.shape}, and preprocess.channels={how.channels}")
    check_size(array.shape[1], array.shape[0], how)
    pixels = np.ascontiguousarray(to_uint8(array, how))
    if pixels.shape[-1] == how.channels:
        return pixels
    if how.channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return np.repeat(pixels, 3, axis=-1)


def to_uint8(array: np.ndarray, how: Preprocess) -> np.ndarray:
    """Values as 0..255, rounded to the nearest."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise BadImage(f"type {array.dtype} is no image")
    if array.dtype.kind == "f" and how.value_range is None:
        raise BadImage("floating-point pixels: set preprocess.value_range=[low,high]")
    low, high = how.value_range or (0, 65535)
    values = (array.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    if not np.isfinite(values).all():
        raise BadImage("pixels that are not finite")
    return np.rint(values.clip(0.0, 255.0)).astype(np.uint8)
