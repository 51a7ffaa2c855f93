"""Bytes to pixels, safely; what a bad image is.

Pillow decodes: torchvision's PNG decoder ends the process on a corrupt file. The header is checked
before any pixel is allocated, only formats of images are tried (no PostScript, which runs a
program), and truncated files are refused rather than filled with grey.
"""

import io
import logging
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ssl_xcit.data.preprocess import Pixels, Preprocess

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
STRIP = 4_000_000  # pixels that are converted at a time
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BYTES = 256 * 2**20  # of a file; no image below the limit of pixels is larger
NPY = b"\x93NUMPY"
RGB = Preprocess()
EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
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
        try:
            image = Image.open(io.BytesIO(content), formats=formats())
        except Image.DecompressionBombError as error:  # Pillow's own, higher limit
            raise too_large(how) from error
        except Image.UnidentifiedImageError:
            if content.startswith(TIFF):
                return open_tiff(content, how)
            raise
        check_size(*image.size, how)
        if image.format == "TIFF" and (tag(image, SAMPLES_PER_PIXEL) > 4 or is_deep(image)):
            return open_tiff(content, how)  # Pillow would drop what it cannot show
        if image.format == "PNG" and is_deep_png(content):
            return open_deep_png(image, content, how)
        return open_pillow(image, how)


def decode(content: bytes | np.ndarray, how: Preprocess = RGB) -> Pixels:
    """All pixels of `open_picture`; raises as it does."""
    return open_picture(content, how).pixels()


def read_file(path: str | Path) -> bytes:
    """A file's content.

    Raises:
        BadImage: it cannot be read, is a pipe or a device, or larger than MAX_BYTES.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe's end may never come
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size > MAX_BYTES:
                raise BadImage(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}")
            return file.read()
    except (OSError, ValueError, MemoryError) as error:
        raise BadImage(f"{type(error).__name__}: {getattr(error, 'strerror', error)}") from error


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
    wanted = "L" if how.channels == 1 else "RGB"
    if image.mode == wanted and "transparency" not in image.info:
        return np.asarray(image).reshape(image.height, image.width, how.channels)
    pixels = np.empty((image.height, image.width, how.channels), np.uint8)
    rows = max(1, STRIP // image.width)  # in strips: the copies of a large image stay small
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(flat(strip, how, wanted)).reshape(
            -1, image.width, how.channels
        )
    return pixels


def flat(image: Image.Image, how: Preprocess, mode: str) -> Image.Image:
    """Without transparency, in the mode."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, how.background)
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image if image.mode == mode else image.convert(mode)


def tag(image: Image.Image, number: int) -> int:
    """A number of a TIFF's header; of several the first, where there is none 1."""
    tags: Any = getattr(image, "tag_v2", {})
    value = tags.get(number, 1)
    return int(value[0] if isinstance(value, tuple) else value)


def is_deep(image: Image.Image) -> bool:
    """A TIFF of several channels of more than 8 bits, of which Pillow keeps the upper 8."""
    return tag(image, SAMPLES_PER_PIXEL) > 1 and tag(image, BITS_PER_SAMPLE) > 8


def is_deep_png(content: bytes) -> bool:
    """A PNG of 16 bits with colours or transparency, of which Pillow keeps the upper 8."""
    return content[24:25] == b"\x10" and content[25:26] in (b"\2", b"\4", b"\6")


def open_deep_png(image: Image.Image, content: bytes, how: Preprocess) -> Picture:
    """Pillow says whether it is whole, OpenCV reads all its bits."""
    kind = f"PNG {image.mode};16"
    image.load()
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim != 3:
        raise BadImage("corrupt")
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}[array.shape[-1]]
    return open_bands(to_uint8(array[..., order], how), how, kind)


def open_bands(array: np.ndarray, how: Preprocess, kind: str) -> Picture:
    """8-bit pixels that may have transparency as their fourth channel."""
    if array.shape[-1] == 4 and how.channels in (1, 3):
        return decoded(to_array(Image.fromarray(array, "RGBA"), how), kind)
    return decoded(from_array(array, how), kind)


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
        if int(page.nbytes) > 8 * how.max_pixels:
            raise too_large(how, f": {page.shape}")
        whole = math.prod(page.chunked) == len(page.dataoffsets) and all(
            count > 0 and offset + count <= len(content)
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        if not whole:  # tifffile would put zeros in its place
            raise BadImage("truncated")
        try:
            array = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise BadImage(
                    f"{page.compression.name} needs imagecodecs: pip install 'ssl-xcit[tiff]'"
                ) from error
            raise
        kind = f"TIFF {page.dtype}"
    if array.ndim == 3 and array.shape[-1] == 4:
        return open_bands(to_uint8(array, how), how, kind)
    return decoded(from_array(array, how), kind)


def from_array(array: np.ndarray, how: Preprocess) -> Pixels:
    """(H, W), (H, W, channels) or, with exactly the wanted channels, (channels, H, W) as 0..255.

    uint8 stays as it is; bool is 0 and 255; others are scaled from `how.value_range`, which is by
    default 0 to 65535 for uint16, and has to be given for other types.

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
    if array.dtype != np.uint16 and how.value_range is None:  # what their values mean, none knows
        raise BadImage(f"pixels of type {array.dtype}: set preprocess.value_range=[low,high]")
    low, high = how.value_range or (0, 65535)
    pixels = np.empty(array.shape, np.uint8)
    rows = max(1, STRIP // max(1, array[0].size))
    for top in range(0, len(array), rows):
        values = array[top : top + rows].astype(np.float32)
        values = (values - np.float32(low)) * np.float32(255.0 / (high - low))
        if not np.isfinite(values).all():
            raise BadImage("pixels that are not finite")
        pixels[top : top + rows] = np.rint(values.clip(0.0, 255.0)).astype(np.uint8)
    return pixels
