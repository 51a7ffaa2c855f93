"""Make an interactive map of images for a page: points by class, thumbnails from near, search, and
selection of files. `assets/atlas.js` draws it by plotly.

All of it is inside the page: places and names as JSON, thumbnails as a few sheets of WebP.
"""

import io
import math
import os.path
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from ssl_xcit.utils.terminal import printable

from .markup import data_uri, render

SHEET = 2048  # most pixels of a sheet's side: a phone decodes it
QUALITY = 78  # of WebP
SYMBOLS = ("circle", "square", "diamond", "triangle-up")  # of plotly, each for ten colours
LAYOUT = {
    "margin": dict.fromkeys("lrtb", 0),
    "showlegend": False,
    "dragmode": "pan",
    "hovermode": "closest",
    "hoverdistance": 24,
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}


@dataclass(frozen=True)
class Atlas:
    """Images and where they lie."""

    places: Float[np.ndarray, "N 2"]  # (N, 2) finite, of any scale; the second is upwards
    names: Sequence[str]  # of files, or ids; N
    classes: Sequence[int] | np.ndarray | None = None  # a class id of each; None: without classes
    class_names: Sequence[str] = ()  # by class id; one without a name is called by its number
    sheets: Sequence[str] = ()  # of `sprites`, in the same order; none: points only
    side: int = 64  # of a thumbnail in the sheets, in pixels

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn; raises ValueError."""
        count = len(self.names)
        if np.shape(self.places) != (count, 2) or not np.isfinite(self.places).all():
            raise ValueError(f"places {np.shape(self.places)} of {count} images, all finite")
        if self.classes is not None and len(self.classes) != count:
            raise ValueError(f"{len(self.classes)} classes of {count} images")


def fitted_places(
    places: Float[np.ndarray, "N 2"],
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "2 2"], float]:
    """Places whose longer side is 1 and whose middle is 0, to five digits; the ends of both axes
    with a margin; and about how far neighbours are from each other.
    """
    count = len(places)
    ends = np.stack([places.min(axis=0), places.max(axis=0)]) if count else np.zeros((2, 2))
    sides = ends[1] - ends[0]
    unit = sides.max() or 1.0
    places = ((places - ends.mean(axis=0)) / unit).round(5)
    half = 0.54 * np.maximum(sides / unit, 0.05)
    cells = max(1, math.ceil((count / 2) ** 0.5))
    taken = len(np.unique(np.floor((places + 0.5) * cells), axis=0))
    spacing = (taken / count) ** 0.5 / cells if count else 1.0
    return places, np.stack([-half, half], axis=1), spacing


def common_folder(names: Sequence[str]) -> str:
    """The folder that all names begin with, up to a slash; the page has it once."""
    prefix = os.path.commonprefix(list(names))  # noqa: RUF071 - cut at a slash below
    return prefix[: prefix.rfind("/") + 1]


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


def atlas_fragment(atlas: Atlas, ident: str) -> Markup:
    """HTML of the map: an element with its data, which `atlas.js` draws; a page needs that
    script, plotly and `atlas.css` once.
    """
    names = [str(name) for name in atlas.names]
    folder = common_folder(names)
    inner = [name[len(folder) :] for name in names]
    classes, legend = None, []
    if atlas.classes is not None:  # numbered without those that no image has
        ids, classes, counts = np.unique(
            np.asarray(atlas.classes, np.int64), return_inverse=True, return_counts=True
        )
        known = atlas.class_names
        words = [str(known[i]) if 0 <= i < len(known) else str(i) for i in ids.tolist()]
        legend = list(zip(words, (f"{n:,}" for n in counts), strict=True))
    places, ranges, spacing = fitted_places(atlas.places)
    content = {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "layout": LAYOUT
        | {
            "xaxis": {"visible": False, "range": ranges[0].tolist()},
            "yaxis": {"visible": False, "range": ranges[1].tolist(), "scaleanchor": "x"},
        },
        "spacing": spacing,
        "symbols": [SYMBOLS[n // 10 % 4] for n in range(max(1, len(legend)))],
        "classes": None if classes is None else classes.tolist(),
        "classNames": [printable(name) for name, _ in legend],
        "folder": folder,
        "names": inner,
        "odd": {i: printable(name) for i, name in enumerate(inner) if not name.isprintable()},
        "side": atlas.side,
        "perSheet": (SHEET // atlas.side) ** 2,
        "sheets": list(atlas.sheets),
    }
    return render(
        "atlas.html", ident=ident, content=content, classes=legend, count=f"{len(names):,}"
    )


def atlas_page(title: str, words: Sequence[str], atlas: Atlas) -> str:
    """A whole page that needs no network."""
    fragment = atlas_fragment(atlas, "atlas")
    return str(
        render("atlas_page.html", title=title, words=words, map=fragment, plotly=get_plotlyjs)
    )
