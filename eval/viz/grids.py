"""Draw rows of pictures with words below each: neighbours of a query, images of a prototype."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from .pictures import FAINT, INK, MARGIN, TEXT, Picture, canvas, font, shortened

SIDE = 120  # of a cell's picture, in pixels
SMALL = 11  # height of the second line below it
WRONG = (200, 30, 45)
FRAME = 4  # pixels around a wrong one
SPLIT = 20  # between a query and its neighbours


class GridCell(NamedTuple):
    """A square picture, the words below it, and whether it is marked as wrong."""

    picture: Picture
    words: str
    name: str = ""
    wrong: bool = False


class GridRow(NamedTuple):
    """Cells under a heading, and the query that they answer apart from them, if there is one."""

    heading: str
    query: GridCell | None
    cells: Sequence[GridCell]


def grid(rows: Sequence[GridRow]) -> Picture:
    """All rows below each other; wrong cells have a frame and words of its colour."""
    lines = TEXT + 4 + SMALL + 4
    apart = any(row.query is not None for row in rows)
    most = max(len(row.cells) for row in rows)
    start = MARGIN + (SIDE + 2 * SPLIT if apart else 0)
    width = start + most * (SIDE + MARGIN)
    heads = [TEXT + 8 if row.heading else 0 for row in rows]
    image, draw = canvas(sum(heads) + len(rows) * (SIDE + lines + 2 * MARGIN) + MARGIN, width)

    def put(cell: GridCell, left: int, top: int) -> None:
        square = Image.fromarray(cell.picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(square, (left, top))
        if cell.wrong:
            corner = (left, top, left + SIDE - 1, top + SIDE - 1)
            draw.rectangle(corner, outline=WRONG, width=FRAME)
        ink, below = WRONG if cell.wrong else INK, top + SIDE + 2
        draw.text((left, below), shortened(cell.words, SIDE), ink, font())
        draw.text((left, below + TEXT + 4), shortened(cell.name, SIDE, SMALL), INK, font(SMALL))

    top = MARGIN
    for row, head in zip(rows, heads, strict=True):
        if row.heading:
            draw.text((MARGIN, top), shortened(row.heading, width - 2 * MARGIN), INK, font())
        top += head
        if row.query is not None:
            put(row.query, MARGIN, top)
            middle = start - SPLIT
            draw.line((middle, top, middle, top + SIDE), FAINT, 2)
        for number, cell in enumerate(row.cells):
            put(cell, start + number * (SIDE + MARGIN), top)
        top += SIDE + lines + 2 * MARGIN
    return np.asarray(image)
