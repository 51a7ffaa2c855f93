"""Images in, drawings out: colours for numbers, overlays, masks, labelled sheets.

Colours go from black over purple and orange to a pale yellow with rising lightness, so that order
is seen, also in grey and by the colour-blind. The anchors are close to those of matplotlib's magma,
with straight lines between. Everything is (height, width, 3) uint8; labels are in Pillow's own
font.
"""

import glob
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from ssl_xcit.data.decode import open_picture, read_file
from ssl_xcit.data.folders import image_files
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import replacing
from ssl_xcit.terminal import printable

from ..masks import resize_image

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
RUN_LENGTHS = 3  # zlib's Z_RLE


class Drawn(NamedTuple):
    """A picture of an image: what kind it is, its caption, and the name of its file."""

    kind: str
    title: str
    name: str
    picture: Picture


class Cell(NamedTuple):
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
    found = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return found.clip(values.min(), values.max())


def blocky(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Patches to pixels, each as a rectangle."""
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)


def found_images(wanted: str | Sequence[str] | None, most: int) -> tuple[list[Path], int]:
    """Image files, at most so many, evenly spaced; and how many there are.

    Args:
        wanted: files, folders with anything below, patterns; None: the built-in photographs.
        most: of more some are taken.

    Raises:
        MissingPath: a file or folder that is not there, or a pattern that fits nothing.
        UserError: an empty list.
    """
    found: list[Path] = []
    if wanted is None:
        found, wanted = [file for _, file in photographs()], []
    elif not wanted:
        raise UserError("images=[]: name files, folders or patterns; null: built-in photographs")
    for each in [wanted] if isinstance(wanted, str) else wanted:
        path = Path(each).expanduser()
        if path.is_dir():
            try:
                here = [path / name for name in image_files(path)]
            except MissingPath as error:  # which calls it root
                raise MissingPath(str(error).replace("root=", "images=", 1)) from error
        elif path.is_file():
            here = [path]
        else:
            fitting = sorted(glob.glob(str(path), recursive=True))
            here = [Path(name) for name in fitting if not Path(name).is_dir()]
        if not here:
            raise MissingPath(
                f"images={each}: no file fits; name a file, a folder, or a pattern in quotes, such "
                "as images='DIR/**/*.jpg'"
            )
        found += here
    files = list(dict.fromkeys(found))
    if len(files) <= most:
        return files, len(files)
    places = np.linspace(0, len(files) - 1, most).round().astype(int)
    return [files[i] for i in places], len(files)


def folder_names(words: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """As names of folders, each once, also where capitals do not count, and none of `others`."""
    found: list[str] = []
    taken = {name.casefold() for name in others}
    for word in words:
        plain = re.sub(r"[^\w.-]+", "_", word, flags=re.ASCII).strip("._")[:80] or "image"
        name, number = plain, 2
        while name.casefold() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.casefold())
        found.append(name)
    return found


def read_fitted(
    path: Path, how: Preprocess, size: int | None, patch: int
) -> tuple[Pixels, tuple[int, int]]:
    """Pixels whose sides are multiples of the patch and at most `size`; the file's own height and
    width.

    Raises:
        BadImage: it cannot be read.
    """
    found = open_picture(read_file(path), how)
    sides = (found.height, found.width)
    limit = max(sides) + patch if size is None else size // patch * patch
    scale = min(1.0, limit / max(sides))
    height, width = (
        min(max(1, round(side * scale / patch)), limit // patch) * patch for side in sides
    )
    return resize_image(found.pixels(1.0 / scale), height, width), sides


def visible(pixels: Pixels) -> Picture:
    """Three channels of any number: the first three, or the first as grey."""
    channels = pixels.shape[-1]
    chosen = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    return np.ascontiguousarray(chosen)


def grey_of(picture: Picture, brightness: float = 1.0) -> Picture:
    """Without colour, by its luma (ITU-R 601)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=brightness), cv2.COLOR_GRAY2RGB)


def overlay(picture: Picture, values: Values, strength: float) -> Picture:
    """Values in 0..1 as colours over the picture in grey; at strength 1 the colours alone."""
    return cv2.addWeighted(grey_of(picture), 1.0 - strength, coloured(values), strength, 0.0)


def highlighted(picture: Picture, mask: Bool[np.ndarray, "height width"]) -> Picture:
    """The picture where the mask is, outlined; the rest dark and without colour."""
    found = np.where(mask[..., None], picture, grey_of(picture, 0.28))
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outlined = cv2.drawContours(found.copy(), lines, -1, OUTLINE, 1 + max(mask.shape) // 600)
    return cv2.addWeighted(found, 0.5, outlined, 0.5, 0.0)  # where a mask is ragged they are many


def marked(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    """With a frame around (top, left, bottom, right), black inside white, seen on any ground."""
    top, left, bottom, right = box
    line = max(1, round(max(picture.shape) / 500))
    found = picture.copy()
    for colour, grow in (((255, 255, 255), 3 * line), ((0, 0, 0), line)):
        corners = (left - grow, top - grow), (right - 1 + grow, bottom - 1 + grow)
        cv2.rectangle(found, *corners, colour, 2 * line)
    return found


def thumbnail(picture: Picture, side: int) -> Picture:
    """Its long side at most `side`."""
    small = Image.fromarray(picture)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def write_png(picture: Picture, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        # of photographs run lengths alone are smaller than zlib's quick levels, and take less time
        Image.fromarray(picture).save(part, "PNG", compress_level=1, compress_type=RUN_LENGTHS)


def read_png(path: Path) -> Picture:
    """What `write_png` wrote."""
    with Image.open(path) as image:
        return np.asarray(image)


@cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
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


def sheet(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Picture:
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
