"""Parts of pictures of what a task says of an image: a legend below it, coloured pixels, boxes with
labels and instance masks.
"""

import colorsys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.utils.terminal import printable

Colour = tuple[int, int, int]
PAPER, INK, UNKNOWN = (255, 255, 255), (32, 33, 36), (128, 128, 128)
GOLDEN = (5**0.5 - 1) / 2  # a step around the colour wheel that never comes close to where it was
TONES = ((0.9, 0.65), (0.45, 1.0), (0.9, 1.0))  # saturation and value, in turn
SMALLEST = 384  # long side of a picture in pixels: smaller images are enlarged
TEXT = 13  # height of words in pixels
LINE = TEXT + 6
MARGIN = 6
OPACITY = 0.5  # of masks
IN_LEGEND = 12  # classes


class Label(NamedTuple):
    """Words with the colour of a class."""

    words: str
    colour: Colour


def class_colours(num_classes: int) -> list[Colour]:
    """A colour for each class, the same ones whatever their number."""
    colours = []
    for i in range(num_classes):
        saturation, value = TONES[i % len(TONES)]
        rgb = colorsys.hsv_to_rgb(i * GOLDEN % 1.0, saturation, value)
        red, green, blue = (round(255 * part) for part in rgb)
        colours.append((red, green, blue))
    return colours


def shown(pixels: Pixels, largest: int) -> Image.Image:
    """The image in three channels (the first three, or the first as grey), its long side at most
    `largest` pixels, and at least `SMALLEST` if that is less.
    """
    channels = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    image = Image.fromarray(np.ascontiguousarray(channels))
    long = max(image.size)
    scale = np.clip(long, min(SMALLEST, largest), largest) / long
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def with_masks(
    picture: Image.Image, masks: Bool[np.ndarray, "M height width"], colours: Sequence[Colour]
) -> Image.Image:
    """The picture with coloured regions."""
    drawn = draw_segmentation_masks(
        pil_to_tensor(picture), torch.from_numpy(masks), OPACITY, list(colours)
    )
    return to_pil_image(drawn)


def with_objects(
    pixels: Pixels,
    boxes: Float[np.ndarray, "M 4"],
    labels: Sequence[Label],
    masks: Iterable[Bool[np.ndarray, "height width"]] | None,
    largest: int,
) -> Image.Image:
    """The image with a box, a label and, if there are masks, coloured pixels for each object; the
    last ones on top.
    """
    picture = shown(pixels, largest)
    if not labels:
        return with_legend(picture, [Label("no objects", PAPER)])
    height, width = pixels.shape[:2]
    colours = [label.colour for label in labels]
    if masks is not None:
        small = [
            np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
            for mask in masks
        ]
        picture = with_masks(picture, np.stack(small), colours)
    scale = np.tile((picture.width / width, picture.height / height), 2)
    corners = torch.from_numpy((boxes * scale).clip(0, np.tile(picture.size, 2) - 1))
    line = 1 + max(picture.size) // 400
    drawn = draw_bounding_boxes(pil_to_tensor(picture), corners, colors=colours, width=line)
    picture = to_pil_image(drawn)
    draw = ImageDraw.Draw(picture)
    for label, (left, top, _, _) in zip(labels, corners.tolist(), strict=True):
        words = shortened(label.words, picture.width)
        wide = font().getlength(words) + 6
        x, y = min(left, picture.width - wide), max(0.0, top - LINE + 2)
        draw.rectangle((x, y, x + wide, y + LINE - 2), fill=label.colour)
        draw.text((x + 3, y), words, contrast(label.colour), font())
    return picture


def with_legend(picture: Image.Image, labels: Sequence[Label]) -> Image.Image:
    """The picture with coloured squares and words below it, as many beside each other as fit."""
    kept = list(labels[:IN_LEGEND])
    if len(labels) > IN_LEGEND:
        kept.append(Label(f"and {len(labels) - IN_LEGEND} more", PAPER))
    places, x, y = [], MARGIN, picture.height + MARGIN
    for label in kept:
        words = shortened(label.words, picture.width - 2 * MARGIN - LINE)
        wide = LINE + int(font().getlength(words)) + 2 * MARGIN
        if x > MARGIN and x + wide > picture.width:
            x, y = MARGIN, y + LINE
        places.append((x, y, words))
        x += wide
    sheet = Image.new("RGB", (picture.width, y + LINE + MARGIN), PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for label, (left, top, words) in zip(kept, places, strict=True):
        if label.colour != PAPER:
            draw.rectangle((left, top + 2, left + TEXT, top + 2 + TEXT), fill=label.colour)
        draw.text((left + LINE * (label.colour != PAPER), top), words, INK, font())
    return sheet


def contact_sheet(
    pictures: Sequence[tuple[str, Image.Image]], columns: int = 4, side: int = 320
) -> Image.Image:
    """Pictures beside each other, at most `side` pixels wide and high, with their names above."""
    columns = min(columns, len(pictures))
    small = [picture.copy() for _, picture in pictures]
    for picture in small:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [LINE + max(picture.height for picture in row) + MARGIN for row in rows]
    width = MARGIN + columns * (side + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, ((name, _), picture) in enumerate(zip(pictures, small, strict=True)):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (side + MARGIN), MARGIN + sum(heights[:row])
        draw.text((left, top), shortened(name, side), INK, font())
        sheet.paste(picture, (left, top + LINE))
    return sheet


@cache
def font() -> Any:
    """Pillow's own font."""
    return ImageFont.load_default(TEXT)


def contrast(colour: Colour) -> Colour:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def shortened(words: str, width: int) -> str:
    """Words of so many pixels at most; what is left out at the end becomes dots."""
    words = printable(words)
    if font().getlength(words) <= width:
        return words
    kept = next((n for n in range(len(words) - 1, 0, -1) if fits(f"{words[:n]}...", width)), 0)
    return f"{words[:kept]}..." if kept else ""


def fits(words: str, width: int) -> bool:
    """Whether words are so many pixels wide at most."""
    return bool(font().getlength(words) <= width)
