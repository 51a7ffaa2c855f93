"""What is written to a terminal, a log or a page of Markdown: names are data, so a user's `[red]`,
`:cat:`, ESC or line break appears as it is spelled and does nothing.
"""

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
MARKDOWN = re.compile(  # what has a meaning inside a line, or at its beginning
    r"[\\`*<>\[\]|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|^[-+#](?!\d)"
)


def printable(text: str) -> str:
    r"""The text with everything that is not seen (control characters, marks of direction or of no
    width, spaces other than U+0020) or that is no text (bytes of a file's name) as an escape: `\r`,
    `\x1b`, `\u202e`, `\udcff`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def literal(text: str) -> str:
    """Text on one line of Markdown that means nothing but itself."""
    return MARKDOWN.sub(r"\\\g<0>", printable(text))


def say(*lines: str, file: Any = None) -> None:
    """Print each on one line, to standard output by default, unless nobody reads any more: Ctrl-C
    ends `| tee log` as well, and not the step.
    """
    with suppress(OSError):
        print(*map(printable, lines), sep="\n", file=file or sys.stdout, flush=True)


def duration_in_words(seconds: float) -> str:
    """`3 min 2 s`, `5 h 12 min`, `2 d 3 h`."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


class OneLine(logging.Formatter):
    """A record's message on one line; a traceback that comes with it keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return printable(super().formatMessage(record))


class PlainConsole(Console):
    """Prints a string, in the cell of a table too, as text: it has no markup, no emoji codes and no
    control characters. What needs a line break or a style is a `rich.text.Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`."""
        kept = {k: v for k, v in options.items() if k in ("style", "justify", "overflow") and v}
        return Text(printable(text), **kept)


class PlainColumn(TextColumn):
    """A column of a progress bar whose fields are text."""

    def render(self, task: Task) -> Text:
        """See `TextColumn`."""
        return Text(printable(self.text_format.format(task=task)), style=self.style)


def track(
    each: Iterable[T], title: str, total: int | None = None, show: bool = True
) -> Iterator[T]:
    """The same items, with a progress bar meanwhile; `total` is None: as many as `len` says."""
    if not show:
        yield from each
        return
    columns = (
        PlainColumn("{task.description}", "progress.description"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, transient=True) as progress:
        yield from progress.track(each, total, description=title)
