"""Decode bytes to pixels safely; a file that cannot be used is a `BadImage`.

Pillow decodes 8 bits (torchvision's PNG decoder ends the process on a corrupt file), simplejpeg the
pixels of JPEGs; more bits come from OpenCV and tifffile, for Pillow keeps the upper eight.

The header is checked before any pixel is allocated, only formats of images are tried (no
PostScript, which runs a program), and truncated files are refused rather than filled with grey.
"""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ssl_xcit.data.array_files import ORIENTATION, open_array, open_npy, open_tiff
from ssl_xcit.data.formats import HEIC_REMEDY, image_format, readable_formats
from ssl_xcit.data.picture import (
    RGB,
    STRIP,
    BadImage,
    Picture,
    Samples,
    Stored,
    as_bad_image,
    check_size,
    decoded,
    picture_of,
    too_large,
    upright,
    without_alpha,
)
from ssl_xcit.data.preprocess import Pixels, Preprocess

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BYTES = 256 * 2**20  # of a file; no image below the limit of pixels is larger
NPY = b"\x93NUMPY"
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, PLANAR = 258, 262, 277, 284
DESCRIPTION, EXTRA_SAMPLES, SAMPLE_FORMAT = 270, 338, 339


def open_picture(content: bytes | np.ndarray, preprocess: Preprocess = RGB) -> Picture:
    """Open an encoded image, or pixels as they are stored; upright, with the wanted channels.

    EXIF and TIFF orientation are applied. For three channels grey is repeated, for one colours are
    weighed (ITU-R 601); CMYK and palettes are converted, transparency composited on
    `preprocess.background`; a further sample that the file does not call alpha is left out; of an
    animation the first frame is taken. Other channel counts come from TIFF, .npy, or a file with
    exactly as many. More than 8 bits are scaled from `preprocess.value_range`, by default from the
    whole range of the bits that the file names.

    Raises:
        BadImage: empty, corrupt, no image, other channels than wanted, or more than
            `preprocess.max_pixels` pixels by its header.
    """
    if isinstance(content, np.ndarray):
        return open_array(content, preprocess, f"array {content.dtype}")
    if not content:
        raise BadImage("empty file")
    with as_bad_image():
        if content.startswith(NPY):
            return open_npy(content, preprocess)
        try:
            image = Image.open(io.BytesIO(content), formats=readable_formats())
        except Image.DecompressionBombError as error:  # Pillow's own, higher limit
            raise too_large(preprocess) from error
        except Image.UnidentifiedImageError as error:
            if content.startswith(TIFF):
                return open_tiff(content, preprocess)
            if image_format(content[:32]) == "HEIF" and "HEIF" not in readable_formats():
                raise BadImage(f"HEIC, which needs {HEIC_REMEDY}") from error
            raise
        check_size(*image.size, preprocess)
        top = top_of(image, content)
        if image.format == "TIFF":
            if not pillow_reads_all(image, top, preprocess.channels) or channels_apart(image):
                return open_tiff(content, preprocess)
        elif top > 255 and (deep := read_deep(image, content, top)) is not None:
            mode = image.mode.partition(";")[0]
            return picture_of(deep, preprocess, f"{image.format} {mode};{top.bit_length()}")
        elif top > 255 and preprocess.value_range is not None:
            raise BadImage(
                f"{image.format} of {top.bit_length()} bits: this OpenCV reads 8 of them"
            )
        return open_pillow(image, content, top, preprocess)


def top_of(image: Image.Image, content: bytes) -> int:
    """Return the largest value that the samples of an open file can have by its header."""
    bits = 8
    if image.format == "PNG":
        bits = content[24]
    elif image.format == "TIFF":
        bits = tag(image, BITS_PER_SAMPLE)
    elif image.format == "PPM":
        header = re.sub(rb"#[^\r\n]*", b"", content[:1024])
        if match := re.match(rb"P[2356]\s+\d+\s+\d+\s+(\d+)\s", header):
            return max(255, int(match[1]))  # Pillow scales what is less
    elif image.format == "JPEG2000":
        start = content.find(b"\xff\x4f\xff\x51")  # the code stream's size marker
        if 0 <= start < len(content) - 42:
            bits = (content[start + 42] & 0x7F) + 1
    elif image.format == "AVIF":
        start = content.find(b"av1C")
        flags = content[start + 6] if 0 <= start < len(content) - 6 else 0
        bits = (12 if flags & 0x20 else 10) if flags & 0x40 else 8
    return max(255, 2**bits - 1)


def decode(content: bytes | np.ndarray, preprocess: Preprocess = RGB) -> Pixels:
    """Return all pixels of `open_picture`; raises as it does."""
    return open_picture(content, preprocess).pixels()


def read_file(path: str | Path) -> bytes:
    """Read a file.

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


def read_image(path: str | Path, preprocess: Preprocess = RGB) -> Pixels:
    """Decode a file; raises BadImage."""
    return decode(read_file(path), preprocess)


def open_pillow(image: Image.Image, content: bytes, top: int, preprocess: Preprocess) -> Picture:
    """Return the picture of an open file; all but a JPEG is decoded now."""
    kind = f"{image.format} {image.mode}"
    if image.format in ("JPEG", "MPO"):
        orientation = orientation_of(image)
        width, height = image.size[::-1] if orientation > 4 else image.size

        def decode_jpeg(shrink: float) -> Pixels:
            scale = next(s for s in (8, 4, 2, 1) if s <= max(shrink, 1.0))
            if scale > 1:
                image.draft(None, (image.width // scale or 1, image.height // scale or 1))
            is_rgb = image.mode == "RGB" and preprocess.channels == 3
            pixels = jpeg_pixels(content, *image.size) if is_rgb else None
            if pixels is None:
                image.load()
                pixels = to_array(image, preprocess)
            return upright(pixels, orientation)

        return Picture(height, width, decoded_once(decode_jpeg), kind)
    # Pillow turns a TIFF upright as it loads it, and inverts only 8 bits where zero is white
    zero_is_white = image.format == "TIFF" and tag(image, PHOTOMETRIC, 1) == 0
    no_alpha = image.format == "TIFF" and EXTRA_SAMPLES not in getattr(image, "tag_v2", {})
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)[..., None]
        if image.format == "PPM":  # scaled to the range of 16 bits
            values, top = values.astype(np.uint16), 65535
        samples = Samples(values, top, "grey", zero_is_white, None, orientation_of(image))
        return picture_of(samples, preprocess, kind)
    if image.mode == "RGBA" and no_alpha and preprocess.channels in (1, 3):
        image = Image.merge("RGB", image.split()[:3])
    return decoded(upright(to_array(image, preprocess), orientation_of(image)), kind)


def jpeg_pixels(content: bytes, width: int, height: int) -> Stored | None:
    """Decode a JPEG at the scale that has this size, to the pixels that Pillow would give, sooner.
    None: of a damaged file, whose fault Pillow names, or which it takes as it is; of a few pixels.
    """
    if max(width, height) <= 8:  # the scale is not told by the size
        return None
    try:
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def orientation_of(image: Image.Image) -> int:
    """Return 1 to 8, by EXIF (or XMP)."""
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def decoded_once(decode: Callable[[float], Pixels]) -> Callable[[float], Pixels]:
    """Return a function that decodes at its first call: Pillow's draft changes the image."""
    cached: list[Pixels] = []

    def decode_once(shrink: float) -> Pixels:
        if not cached:
            cached.append(decode(shrink))
        return cached[0]

    return decode_once


def to_array(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """Convert a loaded Pillow image of 8 bits, of any mode, to (H, W, channels) in 0..255."""
    channels = preprocess.channels
    if channels not in (1, 3):
        if len(image.getbands()) == channels and image.mode not in ("PA", "La"):
            return np.asarray(image).reshape(image.height, image.width, channels)
        raise BadImage(f"mode {image.mode}, and preprocess.channels={channels}")
    wanted = "L" if channels == 1 else "RGB"
    if image.mode == wanted and "transparency" not in image.info:
        return np.asarray(image).reshape(image.height, image.width, channels)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    rows = max(1, STRIP // image.width)  # in strips: the copies of a large image stay small
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(without_alpha(strip, preprocess, wanted)).reshape(
            -1, image.width, channels
        )
    return pixels


def tag(image: Image.Image, number: int, default: int = 1) -> int:
    """Return a number of a TIFF's header, of several the first."""
    tags: Any = getattr(image, "tag_v2", {})
    value = tags.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def pillow_reads_all(image: Image.Image, top: int, channels: int) -> bool:
    """Whether Pillow gives all that a TIFF has: not more bits of several samples, nor transparency
    in a plane of its own, nor grey premultiplied with it, nor signed numbers, nor further samples.
    """
    count = tag(image, SAMPLES_PER_PIXEL)
    if tag(image, SAMPLE_FORMAT) == 2 and top == 255:
        return False
    if channels not in (1, 3) and count != len(image.getbands()):
        return False
    if count == 1:
        return top == 255 or tag(image, PHOTOMETRIC) != 3
    apart = count in (2, 4) and tag(image, PLANAR) == 2
    return count <= 4 and top == 255 and not apart and image.mode != "La"


def channels_apart(image: Image.Image) -> bool:
    """Whether a TIFF says that it has channels, which a microscope stores as a page each."""
    tags: Any = getattr(image, "tag_v2", {})
    words = str(tags.get(DESCRIPTION, ""))[:10_000]
    match = re.search(r"^channels=(\d+)|<Pixels[^>]*SizeC=\"(\d+)\"", words, re.MULTILINE)
    return match is not None and int(match[1] or match[2]) > 1


def read_deep(image: Image.Image, content: bytes, top: int) -> Samples | None:
    """Read more than 8 bits of a file by OpenCV, after Pillow has loaded it and so shown that it is
    complete; None: OpenCV cannot.
    """
    image.load()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16:
        if image.format == "PNG":
            raise BadImage("corrupt")
        return None
    array = array.reshape(*array.shape[:2], -1)
    if array.shape[-1] > 2:  # OpenCV's order is blue, green, red
        array = array[..., [2, 1, 0, 3][: array.shape[-1]]]
    colours = "grey" if array.shape[-1] < 3 else "rgb"
    alpha = "straight" if array.shape[-1] in (2, 4) else None
    key = image.info.get("transparency") if image.format == "PNG" and alpha is None else None
    if key is not None:  # one colour that is transparent
        clear = (array == np.array(key)).all(axis=-1, keepdims=True)
        array = np.concatenate((array, np.where(clear, 0, top).astype(np.uint16)), axis=-1)
        alpha = "straight"
    return Samples(array, top, colours, False, alpha, orientation_of(image))
