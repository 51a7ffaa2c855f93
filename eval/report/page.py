"""Lay out a page: one HTML file that holds its style, its script, plotly and all pictures, and
needs no network.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ssl_xcit import __version__
from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import replacing

from ..viz.markup import render, render_macro
from .run_reader import message_of

log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A table of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = ""  # classes: `numeric` where all columns but the first are numbers
    code: int = 0  # the first so many columns are code


@dataclass
class Part:
    """A section of the page."""

    ident: str  # of its element, and in links
    title: str  # its heading
    html: str = ""  # its content; empty where it could not be made
    trouble: str = ""  # why; the page says so
    seconds: float = 0.0  # that it took


def make_part(ident: str, title: str, make: Callable[[], Mapping[str, Any]]) -> Part:
    """A section from the macro `ident` of `sections.html` and what `make` returns, or why not."""
    part, started = Part(ident, title), time.perf_counter()
    try:
        part.html = render_macro("sections.html", ident, **make())
    except Exception as error:  # a partial page is worth more than none
        known = isinstance(error, UserError | OSError)
        part.trouble = "" if known else f"{type(error).__name__}: "
        part.trouble += message_of(error)
        log.warning("report: %s: %s", title, part.trouble)
        log.debug("", exc_info=error)
    part.seconds = time.perf_counter() - started
    return part


def write_page(out: Path, title: str, over: str, head: Markup, parts: Sequence[Part]) -> None:
    """Write the file whole, or not at all: `over` is a line above the title, `head` below it."""
    text = render(
        "page.html",
        title=title,
        over=over,
        head=head,
        parts=parts,
        footer=f"ssl_xcit {__version__}, {datetime.now():%Y-%m-%d %H:%M}",
        plotly=get_plotlyjs,
    )
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")
