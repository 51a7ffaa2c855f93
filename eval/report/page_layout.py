"""Lay out a page: one HTML file that holds its style, its script, plotly and all pictures, and
needs no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly.offline import get_plotlyjs

from ssl_xcit import __version__

from ..viz.markup import all_printable, asset, esc, script_json

FIGURES = ("curves", "numbers", "entropy", "parallel", "decides", "over")  # drawn by plotly


@dataclass
class Part:
    """A section of the page."""

    ident: str  # of its element, and in links
    title: str  # its heading
    html: str = ""  # its content; empty where it could not be made
    trouble: str = ""  # why; the page says so
    data: dict[str, Any] = field(default_factory=dict)  # for the page's script, by name
    head: str = ""  # style that it needs
    script: str = ""  # that it needs
    seconds: float = 0.0  # that it took

    def body(self) -> str:
        """HTML of the section."""
        if self.trouble:
            inner = f'<p class="trouble">This part is missing: {esc(self.trouble)}</p>'
        else:
            inner = self.html
        return f'<section id="{esc(self.ident)}"><h2>{esc(self.title)}</h2>{inner}</section>'


def report_page(title: str, subtitle: str, head: str, parts: Sequence[Part], when: str) -> str:
    """HTML of the whole page."""
    data: dict[str, Any] = {}
    for part in parts:
        data |= part.data
    content = script_json(all_printable(data))
    links = "".join(f'<a href="#{esc(p.ident)}">{esc(p.title)}</a>' for p in parts)
    plotly = f"<script>{get_plotlyjs()}</script>" if needs_plotly(data) else ""
    scripts = "".join(f"<script>{part.script}</script>" for part in parts if part.script)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="robots" content="noindex">',
            '<link rel="icon" href="data:,">',
            f"<title>{esc(title)}</title>",
            f"<style>{asset('report.css')}{''.join(part.head for part in parts)}</style>",
            "</head><body>",
            f'<header><p class="over">{esc(subtitle)}</p><h1>{esc(title)}</h1>{head}</header>',
            f'<nav aria-label="Contents">{links}</nav><main>',
            *(part.body() for part in parts),
            "</main>",
            f"<footer>ssl_xcit {esc(__version__)}, {esc(when)}</footer>",
            f'<script type="application/json" id="data">{content}</script>',
            plotly,
            scripts,
            f"<script>{asset('report.js')}</script></body></html>",
            "",
        ]
    )


def needs_plotly(data: Mapping[str, Any]) -> bool:
    """Whether there is a figure; the library is most of a page without pictures."""
    return any(data.get(name) for name in FIGURES)
