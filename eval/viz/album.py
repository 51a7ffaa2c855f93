"""Pictures of a page in files beside it, and where they stand in it; `album.html` says how."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .pictures import Picture, thumbnail, write_png


class Tile(NamedTuple):
    """A picture's file below the page's folder; its thumbnail lies in `thumbs/` beside it.

    `features` is the file of its patch features, if a patch can be clicked.
    """

    kind: str
    title: str
    file: str
    features: str = ""

    @property
    def thumb(self) -> str:
        """The file of the thumbnail."""
        folder, _, name = self.file.rpartition("/")
        return f"{folder}/thumbs/{name}"


class Section(NamedTuple):
    """A part of the page: words, one sheet as an overview, then groups of tiles by name, or sheets
    alone, each with its heading.
    """

    name: str
    sheet: str | None
    groups: Sequence[tuple[str, Sequence[Tile]]]
    words: str = ""
    sheets: Sequence[tuple[str, str]] = ()


def write_tile(picture: Picture, out: Path, tile: Tile, side: int) -> None:
    """Write the picture and its thumbnail of so many pixels."""
    write_png(picture, out / tile.file)
    write_png(thumbnail(picture, side), out / tile.thumb)
