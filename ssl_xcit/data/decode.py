"""Decode bytes to pixels safely; a file that cannot be used is a `BadImage`.

Pillow decodes 8 bits (torchvision's PNG decoder ends the process on a corrupt file), simplejpeg the
pixels of JPEGs; more bits come from OpenCV and tifffile, for Pillow keeps the upper eight. A reader
returns `Samples`: the numbers as they are stored and what the file says they mean. `to_pixels`
alone decides what becomes of colours, palettes, transparency and orientation, for every format and
depth.

The header is checked before any pixel is allocated, only formats of images are tried (no
PostScript, which runs a program), and truncated files are refused rather than filled with grey.
"""

import io
import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from ssl_xcit.data.formats import HEIC_REMEDY, image_format, readable_formats
from ssl_xcit.data.preprocess import Pixels, Preprocess

STRIP = 4_000_000  # pixels that are converted at a time
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BYTES = 256 * 2**20  # of a file; no image below the limit of pixels is larger
NPY = b"\x93NUMPY"
Stored = UInt8[np.ndarray, "rows columns channels"]
RGB = Preprocess()
ORIENTATION = 274  # tags of EXIF and TIFF
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, PLANAR = 258, 262, 277, 284
DESCRIPTION, EXTRA_SAMPLES, SAMPLE_FORMAT = 270, 338, 339
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


def too_large(preprocess: Preprocess, size: str = "") -> BadImage:
    """Return the error of a decompression bomb."""
    return BadImage(f"by its header more than {preprocess.max_pixels:,} pixels{size}")


def check_size(width: int, height: int, preprocess: Preprocess) -> None:
    """Refuse images that are too large, or have no pixels."""
    if width * height > preprocess.max_pixels:
        raise too_large(preprocess, f": {width} x {height}")
    if min(width, height) < 1:
        raise BadImage(f"no pixels: {width} x {height}")


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


def upright(pixels: Stored, orientation: int) -> Pixels:
    """Turn pixels that are stored in one of EXIF's eight orientations."""
    if orientation > 4:  # rows of the file are columns of the image
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
        orientation, (1, 1)
    )
    return np.ascontiguousarray(pixels[::rows, ::columns])


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


def without_alpha(image: Image.Image, preprocess: Preprocess, mode: str) -> Image.Image:
    """Composite transparency on the background, and convert to the mode."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, tuple(preprocess.background))
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image if image.mode == mode else image.convert(mode)


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


def open_array(array: np.ndarray, preprocess: Preprocess, kind: str) -> Picture:
    """Open (H, W), (H, W, channels) or, with exactly the wanted channels, (channels, H, W)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise BadImage(f"an array of shape {array.shape} is no image")
    wanted = {1: (1, 3), 3: (3, 1)}.get(preprocess.channels, (preprocess.channels,))
    if array.shape[-1] not in wanted and array.shape[0] == preprocess.channels:
        array = np.moveaxis(array, 0, -1)
    bits = 8 * array.dtype.itemsize
    return picture_of(Samples(array, 2**bits - 1), preprocess, kind)


def npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and type of a `.npy` file; what follows in the stream are its values."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise BadImage(f"numpy format {version}")
    return tuple(shape), dtype


def open_npy(content: bytes, preprocess: Preprocess) -> Picture:
    """Open a numpy file of (H, W), (H, W, channels) or (channels, H, W)."""
    stream = io.BytesIO(content)
    shape, dtype = npy_header(stream)
    if len(shape) == 4 and dtype.kind in "uif":
        raise BadImage(f"{shape[0]} images in one array: data.file=FILE.npy takes them")
    if not 2 <= len(shape) <= 3 or dtype.kind not in "uifb":
        raise BadImage(f"an array of shape {shape} and type {dtype} is no image")
    expected = dtype.itemsize * int(np.prod(shape, dtype=object))
    if expected != len(content) - stream.tell():
        raise BadImage(f"truncated: {len(content) - stream.tell():,} of {expected:,} bytes")
    array = np.load(io.BytesIO(content), allow_pickle=False)
    return open_array(array, preprocess, f"NPY {dtype}")


def open_tiff(content: bytes, preprocess: Preprocess) -> Picture:
    """Open what Pillow does not read whole: any channels, 8 to 32 bits, floating point."""
    import tifffile  # only here: it takes a tenth of a second to import

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong, BadImage says

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        if page.dtype is None or not 2 <= len(page.shape) <= 3:
            raise BadImage(f"a TIFF page of shape {page.shape} and type {page.dtype} is no image")
        check_size(page.imagewidth, page.imagelength, preprocess)
        if int(page.nbytes) > 8 * preprocess.max_pixels:
            raise too_large(preprocess, f": {page.shape}")
        whole = math.prod(page.chunked) == len(page.dataoffsets) and all(
            count > 0 and offset + count <= len(content)
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        if not whole:  # tifffile would put zeros in its place
            raise BadImage("truncated")
        stack = file.series[0]  # of pages that belong together
        channels = "C" in stack.axes and len(page.shape) == 2
        if channels and stack.size * stack.dtype.itemsize > 8 * preprocess.max_pixels:
            raise too_large(preprocess, f": {stack.shape}")
        try:
            array = stack.asarray() if channels else page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise BadImage(
                    f"{page.compression.name} needs imagecodecs: pip install 'ssl-xcit[tiff]'"
                ) from error
            raise
        if channels:  # of the first slice and the first moment
            kept = [axis for axis in stack.axes if axis in "CYX"]
            array = array[tuple(slice(None) if axis in "CYX" else 0 for axis in stack.axes)]
            bands = array.transpose([kept.index(axis) for axis in "YXC"])
            samples = Samples(bands, 2 ** (8 * array.dtype.itemsize) - 1)
            return picture_of(samples, preprocess, f"TIFF {page.dtype}")
        if array.ndim == 2:
            array = array[..., None]
        elif page.axes.startswith("S"):  # a plane a sample
            array = np.moveaxis(array, 0, -1)
        return picture_of(tiff_samples(page, array), preprocess, f"TIFF {page.dtype}")


def tiff_samples(page: Any, array: np.ndarray) -> Samples:
    """Return the (H, W, S) array of a TIFF's page with what the page's tags say of it.

    Raises:
        BadImage: colours that need more than these tags.
    """
    count = array.shape[-1]
    photometric = int(page.photometric)
    extra = [int(kind) for kind in page.extrasamples or ()]
    orientation = page.tags.get(ORIENTATION)
    turn = int(orientation.value) if orientation is not None else 1
    turn = turn if 1 <= turn <= 8 else 1
    top = 1 if array.dtype.kind == "f" else 2 ** int(page.bitspersample) - 1
    if photometric == 3 and count == 1 and page.colormap is not None:
        palette = (page.colormap >> 8).astype(np.uint8).T  # no range of values is meant for it
        return Samples(palette[array[..., 0]], 255, "rgb", orientation=turn)
    if photometric not in (0, 1, 2, 5):
        raise BadImage(f"a TIFF of colours {getattr(page.photometric, 'name', photometric)}")
    colours = {2: "rgb", 5: "cmyk"}.get(photometric, "grey")
    alpha = None
    if count < COLOURS[colours] or (colours == "grey" and count > 2):
        return Samples(array, top, orientation=turn)  # bands of a satellite, mostly
    if count > COLOURS[colours] and extra:
        alpha = {1: "premultiplied", 2: "straight"}.get(extra[0])
    return Samples(array, top, colours, photometric == 0, alpha, turn)


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
