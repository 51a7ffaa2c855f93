"""Draw numbers over images: colours, overlays, masks, labelled sheets.

Colours go from black over purple and orange to a pale yellow with rising lightness, so that order
is seen, also in grey and by the colour-blind. The anchors are close to those of matplotlib's magma,
with straight lines between. Everything is (height, width, 3) uint8; labels are in Pillow's own
font.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from ssl_xcit.data.decode import open_picture, read_file
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.terminal import printable

from ..tasks.masks import resize_image

Picture = UInt8[np.ndarray, "_ _ 3"]
Values = Float[np.ndarray, "_ _"]

ANCHORS = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100),
    (251, 135, 97), (254, 194, 135), (252, 253, 191),
)  # fmt: skip
PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (218, 220, 224)
TEXT = 13  # height of labels in pixels
MARGIN = 8
OUTLINE = (255, 214, 64)
BRIGHTEST = 0.995  # quantile of a map that gets the last colour
RUN_LENGTHS = 3  # zlib's Z_RLE


class Drawn(NamedTuple):
    """A picture made from an image: its kind, its caption, and the name of its file."""

    kind: str
    title: str
    name: str
    picture: Picture


class LabelledPicture(NamedTuple):
    """A picture in a sheet, with the words below it."""

    title: str
    picture: Picture


@cache
def colour_table() -> UInt8[np.ndarray, "256 3"]:
    """Colours of 0..255."""
    places = np.linspace(0, 255, len(ANCHORS))
    channels = [np.interp(np.arange(256), places, column) for column in zip(*ANCHORS, strict=True)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def coloured(values: Values) -> Picture:
    """Colours of values in 0..1; what is beyond is clipped."""
    return colour_table()[np.rint(values.clip(0.0, 1.0) * 255).astype(np.uint8)]


def stretched(values: Values, low: float, high: float) -> Values:
    """`low` to 0 and `high` to 1; all 0 where they are equal."""
    if high <= low:
        return np.zeros_like(values)
    return (values - low) / (high - low)


def enlarged(values: Values, height: int, width: int) -> Values:
    """Patches to pixels, smoothly and within the range that they had."""
    smooth = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return smooth.clip(values.min(), values.max())


def blocky(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Patches to pixels, each as a rectangle."""
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)


def fitted_sides(
    height: int, width: int, size: int | None, patch: int
) -> tuple[tuple[int, int], float]:
    """Sides that are multiples of the patch, the long one at most `size`, and the scale, at most 1;
    never larger than they were but for the last patch.
    """
    long = max(height, width)
    limit = long + patch if size is None else size // patch * patch
    scale = min(1.0, limit / long)
    rows, columns = (
        min(max(1, round(side * scale / patch)), limit // patch) for side in (height, width)
    )
    return (rows * patch, columns * patch), scale


def read_fitted(
    path: Path, preprocess: Preprocess, size: int | None, patch: int
) -> tuple[Pixels, tuple[int, int]]:
    """Pixels of a file at `fitted_sides`; the file's own height and width. Raises BadImage."""
    opened = open_picture(read_file(path), preprocess)
    sides, scale = fitted_sides(opened.height, opened.width, size, patch)
    return resize_image(opened.pixels(1.0 / scale), *sides), (opened.height, opened.width)


def visible(pixels: Pixels) -> Picture:
    """Three channels of any number: the first three, or the first as grey."""
    channels = pixels.shape[-1]
    chosen = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    return np.ascontiguousarray(chosen)


def missing_picture(side: int) -> Picture:
    """A grey square in place of a picture that cannot be read."""
    return np.full((side, side, 3), 128, np.uint8)


def grey_of(picture: Picture, brightness: float = 1.0) -> Picture:
    """The picture without colour, by its luma (ITU-R 601)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=brightness), cv2.COLOR_GRAY2RGB)


def overlay(picture: Picture, values: Values, strength: float) -> Picture:
    """Values in 0..1 as colours over the picture in grey; at strength 1 the colours alone."""
    return cv2.addWeighted(grey_of(picture), 1.0 - strength, coloured(values), strength, 0.0)


def highlighted(picture: Picture, mask: Bool[np.ndarray, "height width"]) -> Picture:
    """The picture where the mask is, outlined; the rest dark and without colour."""
    parted = np.where(mask[..., None], picture, grey_of(picture, 0.28))
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outlined = cv2.drawContours(parted.copy(), lines, -1, OUTLINE, 1 + max(mask.shape) // 600)
    return cv2.addWeighted(parted, 0.5, outlined, 0.5, 0.0)  # where a mask is ragged they are many


def with_frame(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    """The picture with a frame around (top, left, bottom, right), black inside white."""
    top, left, bottom, right = box
    line = max(1, round(max(picture.shape) / 500))
    framed = picture.copy()
    for colour, grow in (((255, 255, 255), 3 * line), ((0, 0, 0), line)):
        corners = (left - grow, top - grow), (right - 1 + grow, bottom - 1 + grow)
        cv2.rectangle(framed, *corners, colour, 2 * line)
    return framed


def thumbnail(picture: Picture, side: int) -> Picture:
    """The picture with its long side at most `side`."""
    small = Image.fromarray(picture)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def write_png(picture: Picture, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with replacing(path) as part:
        # of photographs run lengths alone are smaller than zlib's quick levels, and take less time
        Image.fromarray(picture).save(part, "PNG", compress_level=1, compress_type=RUN_LENGTHS)


def read_png(path: Path) -> Picture:
    """Read a file of `write_png`."""
    with Image.open(path) as image:
        return np.asarray(image)


@cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def shortened(words: str, width: int, size: int = TEXT) -> str:
    """Words of so many pixels at most, with dots where some were left out in the middle."""
    words = printable(words)
    if font(size).getlength(words) <= width:
        return words
    for kept in range(len(words) - 1, 1, -1):
        short = f"{words[: kept // 2]}...{words[len(words) - (kept - kept // 2) :]}"
        if font(size).getlength(short) <= width:
            return short
    return ""


def canvas(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Paper, and what draws on it."""
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def labelled_sheet(rows: Sequence[tuple[str, Sequence[LabelledPicture]]]) -> Picture:
    """Cells side by side, a row each with its name above, all columns as wide as the widest."""
    cells = [cell for _, row in rows for cell in row]
    wide = max(cell.picture.shape[1] for cell in cells)
    line = TEXT + 6
    heights = [max(cell.picture.shape[0] for cell in row) + line for _, row in rows]
    heads = [line if name else 0 for name, _ in rows]
    width = MARGIN + max(len(row) for _, row in rows) * (wide + MARGIN)
    image, draw = canvas(MARGIN + sum(heights) + sum(heads) + MARGIN * len(rows), width)
    top = MARGIN
    for (name, row), height, head in zip(rows, heights, heads, strict=True):
        if name:
            draw.text((MARGIN, top), shortened(name, width - 2 * MARGIN), INK, font(TEXT + 1))
        for number, cell in enumerate(row):
            left = MARGIN + number * (wide + MARGIN)
            image.paste(Image.fromarray(cell.picture), (left, top + head))
            below = top + head + cell.picture.shape[0] + 2
            draw.text((left, below), shortened(cell.title, wide), INK, font())
        top += head + height + MARGIN
    return np.asarray(image)
