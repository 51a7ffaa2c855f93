"""The page of many pictures beside it in files: thumbnails that lead to them, sheets, words."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .markup import esc
from .pictures import Picture, thumbnail, write_png


class Tile(NamedTuple):
    """A file of a picture below the page's folder; its thumbnail lies in `thumbs/` beside it.

    `features` is the file of its patch features, for who clicks a patch.
    """

    kind: str
    title: str
    file: str
    features: str = ""

    @property
    def thumb(self) -> str:
        """The small one."""
        folder, _, name = self.file.rpartition("/")
        return f"{folder}/thumbs/{name}"


class Section(NamedTuple):
    """A part of the page: words, one sheet to look at first, then groups of tiles by name, or
    sheets alone, each with its heading.
    """

    name: str
    sheet: str | None
    groups: Sequence[tuple[str, Sequence[Tile]]]
    words: str = ""
    sheets: Sequence[tuple[str, str]] = ()


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #202124; --faint: #666a70; --line: #dadce0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171a; --ink: #e8eaed; --faint: #9aa0a6; --line: #3c4043 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem;
     padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1rem 0 .4rem } p, figcaption, nav, li { color: var(--faint) }
a { color: inherit } nav a { margin-right: .8rem; white-space: nowrap } summary { cursor: pointer }
figure { margin: 0 } figcaption { font-size: .8rem; line-height: 1.3; padding-top: .2rem }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }
.tiles img { width: 100%; display: block; border-radius: 4px }
.tiles.wide { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
.sheet { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px;
         background: #fff } .sheet img { display: block; max-width: none }
.similar { position: relative; max-width: 40rem; margin: .4rem 0 }
.similar img { width: 100%; display: block; filter: grayscale(1) }
.similar canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: crosshair }
.similar i { position: absolute; outline: 2px solid #fff; box-shadow: 0 0 0 4px #000;
             pointer-events: none }
@media (prefers-color-scheme: dark) { .sheet, .wide img { filter: brightness(.86) } }
"""


def write_tile(picture: Picture, out: Path, tile: Tile, side: int) -> None:
    """The picture and its thumbnail of so many pixels."""
    write_png(picture, out / tile.file)
    write_png(thumbnail(picture, side), out / tile.thumb)


def as_link(file: str) -> str:
    """The name of a file in an attribute."""
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


def page(title: str, words: Sequence[str], sections: Sequence[Section], script: str = "") -> str:
    """HTML that needs nothing but the files beside it; light or dark as the reader's system is."""
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{esc(title)}</h1>",
        *(f"<p>{esc(each)}</p>" for each in words),
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
