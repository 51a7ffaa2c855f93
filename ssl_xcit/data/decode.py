"""Bytes to an RGB array, safely; what a bad image is.

Pillow decodes: torchvision's PNG decoder ends the process on a corrupt file. The header is checked
before any pixel is allocated, and truncated files are refused rather than filled with grey.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # an image bomb unpacks to hundreds of millions
Pixels = UInt8[np.ndarray, "height width 3"]


class BadImage(Exception):
    """This file cannot be used as an image; the message says why."""


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """An encoded image as RGB, upright.

    EXIF rotation is applied; grey is repeated three times, 16-bit grey scaled to 8 bits,
    transparency composited on white, CMYK and palettes converted, of an animation the first frame
    taken.

    Raises:
        BadImage: empty, truncated, corrupt, no image, or more than `max_pixels` pixels by its
            header.
    """
    if not content:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImage(
                        f"by its header more than {max_pixels:,} pixels: {width} x {height}"
                    )
                return to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, higher limit
        raise BadImage(f"by its header more than {max_pixels:,} pixels") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(f"{type(error).__name__}: {error}") from error


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """`decode` of a file.

    Raises:
        BadImage: as `decode`, or the file cannot be opened.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror}") from error
    return decode(content, max_pixels)


def to_rgb(image: Image.Image) -> Pixels:
    """A Pillow image of any mode as upright RGB, (H, W, 3) in 0..255."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))
