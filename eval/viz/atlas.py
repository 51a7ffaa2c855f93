"""Make an interactive map of images for a page: dots by class, thumbnails from near, search, and
selection of files. `assets/atlas.js` draws it.

All of it is inside the page: places and classes as little-endian numbers in base64, names as JSON,
thumbnails as a few sheets of WebP. No maintained library does this in one file
(docs/atlas.md).
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from .markup import asset, data_uri, esc, script_json

SHEET = 2048  # most pixels of a sheet's side: a phone decodes it
QUALITY = 78  # of WebP


@dataclass(frozen=True)
class Atlas:
    """Images and where they lie."""

    places: Float[np.ndarray, "N 2"]  # (N, 2) finite, of any scale; the second is upwards
    names: Sequence[str]  # of files, or ids; N
    classes: Sequence[int] | np.ndarray | None = None  # a class id of each; None: without classes
    class_names: Sequence[str] = ()  # by class id; one without a name is called by its number
    sheets: Sequence[str] = ()  # of `sprites`, in the same order; none: dots only
    side: int = 64  # of a thumbnail in the sheets, in pixels

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn; raises ValueError."""
        count = len(self.names)
        if np.shape(self.places) != (count, 2) or not np.isfinite(self.places).all():
            raise ValueError(f"places {np.shape(self.places)} of {count} images, all finite")
        if self.classes is not None and len(self.classes) != count:
            raise ValueError(f"{len(self.classes)} classes of {count} images")

    def content(self) -> dict[str, Any]:
        """Data for the script. Classes are numbered from 0 in the order of their ids, without
        those that no image has.
        """
        names = [str(name) for name in self.names]
        folder = common_folder(names)
        classes, words = None, []
        if self.classes is not None:
            ids, classes = np.unique(np.asarray(self.classes, np.int64), return_inverse=True)
            known = self.class_names
            words = [str(known[i]) if 0 <= i < len(known) else str(i) for i in ids.tolist()]
        return {
            "count": len(names),
            "places": base64_of(np.asarray(self.places), "<f4"),
            "classes": None if classes is None else base64_of(classes, "<i4"),
            "classNames": words,
            "folder": folder,
            "names": [name[len(folder) :] for name in names],
            "side": self.side,
            "perSheet": (SHEET // self.side) ** 2,
            "sheets": list(self.sheets),
        }


def base64_of(values: np.ndarray, kind: str) -> str:
    """Numbers as a little-endian type, one after another, in base64."""
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()


def common_folder(names: Sequence[str]) -> str:
    """The folder that all names begin with, up to a slash; the page has it once."""
    first, last = min(names, default=""), max(names, default="")  # others lie between
    pairs = enumerate(zip(first, last, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def sprites(pictures: Iterable[UInt8[np.ndarray, "_ _ 3"]], side: int) -> list[str]:
    """Sheets of thumbnails as WebP in `data:` URIs, row by row: of each picture the central square
    at `side` x `side` pixels. All sheets but the last have as many columns and rows as fit into
    `SHEET` pixels; the last is about square, which its width says.

    Args:
        pictures: of any sizes, taken one at a time.
        side: at most `SHEET`.
    """
    across = SHEET // side
    sheets: list[str] = []
    waiting: list[np.ndarray] = []
    for picture in pictures:
        waiting.append(squared(picture, side))
        if len(waiting) == across**2:
            sheets.append(sprite_sheet(waiting, across))
            waiting = []
    if waiting:
        sheets.append(sprite_sheet(waiting, min(across, math.ceil(len(waiting) ** 0.5))))
    return sheets


def squared(picture: UInt8[np.ndarray, "_ _ 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The central square at another size."""
    height, width, _ = picture.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = picture[top : top + short, left : left + short]
    method = cv2.INTER_AREA if short > side else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(square), (side, side), interpolation=method)


def sprite_sheet(thumbs: Sequence[UInt8[np.ndarray, "side side 3"]], columns: int) -> str:
    """Thumbnails row by row, as a file inside the page."""
    side, rows = len(thumbs[0]), -(-len(thumbs) // columns)
    pixels = np.full((rows * side, columns * side, 3), 128, np.uint8)
    for place, thumb in enumerate(thumbs):
        top, left = place // columns * side, place % columns * side
        pixels[top : top + side, left : left + side] = thumb
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=QUALITY, method=4)
    return data_uri(file.getvalue(), "image/webp")


def atlas_fragment(atlas: Atlas, ident: str) -> str:
    """HTML of one atlas: an element with its data, which `atlas.js` draws; a page needs that script
    and `atlas.css` once.
    """
    return (
        f'<div class="atlas" id="{esc(ident)}">'
        f'<script type="application/json">{script_json(atlas.content())}</script>'
        "<noscript>The map needs JavaScript.</noscript></div>"
    )


def atlas_page(title: str, words: Sequence[str], atlas: Atlas) -> str:
    """A whole page that needs no network."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{esc(title)}</title><style>{asset('atlas-page.css')}{asset('atlas.css')}</style></head>",
            f'<body class="atlas-page"><h1>{esc(title)}</h1>',
            *(f"<p>{esc(paragraph)}</p>" for paragraph in words),
            atlas_fragment(atlas, "atlas"),
            f"<script>{asset('atlas.js')}</script></body></html>",
            "",
        ]
    )
