"""Write a page about pictures in files beside it: thumbnails that lead to them, sheets, words."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .markup import asset, esc
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


def as_link(file: str) -> str:
    """The name of a file, quoted for an attribute."""
    return html.escape(quote(file))


def whole_sheet(file: str, words: str) -> str:
    """A sheet in full, which scrolls sideways where the window is narrow."""
    return (
        f'<div class="sheet"><a href="{as_link(file)}"><img loading="lazy" '
        f'src="{as_link(file)}" alt="{esc(words)}"></a></div>'
    )


def tiles_of(name: str, tiles: Sequence[Tile]) -> Iterator[str]:
    """Lines of HTML: a heading each kind, below it thumbnails that lead to the files."""
    for kind in dict.fromkeys(tile.kind for tile in tiles):
        heading = f"<h3>{esc(kind)}</h3>" if kind else ""
        yield f'{heading}<div class="tiles{"" if kind else " wide"}">'
        for tile in (tile for tile in tiles if tile.kind == kind):
            data = f' data-features="{as_link(tile.features)}"' if tile.features else ""
            yield (
                f'<figure{data}><a href="{as_link(tile.file)}"><img loading="lazy" '
                f'src="{as_link(tile.thumb)}" alt="{esc(f"{name}: {tile.title}")}"></a>'
                f"<figcaption>{esc(tile.title)}</figcaption></figure>"
            )
        yield "</div>"


def album_page(
    title: str, words: Sequence[str], sections: Sequence[Section], script: str = ""
) -> str:
    """HTML that needs nothing but the files beside it; light or dark as the reader's system is."""
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{esc(title)}</title><style>{asset('album.css')}</style></head><body>",
        f"<h1>{esc(title)}</h1>",
        *(f"<p>{esc(paragraph)}</p>" for paragraph in words),
        "<nav>",
        *(f'<a href="#s{i}">{esc(part.name)}</a>' for i, part in enumerate(sections)),
        "</nav>",
    ]
    for number, part in enumerate(sections):
        lines.append(f'<section><h2 id="s{number}">{esc(part.name)}</h2>')
        if part.words:
            lines.append(f"<p>{esc(part.words)}</p>")
        several = len(part.groups) > 1
        if part.sheet is not None and several:
            lines.append(whole_sheet(part.sheet, f"{part.name}: all pictures side by side"))
        elif part.sheet is not None:
            lines.append(f'<p><a href="{as_link(part.sheet)}">all of it in one picture</a></p>')
        for heading, file in part.sheets:
            lines.append(f"<h3>{esc(heading)}</h3>" if heading else "")
            lines.append(whole_sheet(file, f"{part.name}, {heading}" if heading else part.name))
        for heading, tiles in part.groups:
            lines.append(f"<details><summary>{esc(heading)}</summary>" if several else "<div>")
            lines += tiles_of(part.name, tiles)
            lines.append("</details>" if several else "</div>")
        lines.append("</section>")
    return "\n".join([*lines, script, "</body></html>", ""])
