"""Names are data: what a terminal, a log, a page or a file of Markdown shows of them."""

import html
import io
import logging
import sys
import unicodedata

import pytest
from markdown_it import MarkdownIt
from rich.progress import Task
from rich.table import Table

from ssl_xcit.eval.results import Evaluation, class_table, markdown, table_lines
from ssl_xcit.eval.viz.markup import templates
from ssl_xcit.eval.viz.pictures import TEXT, font, shortened
from ssl_xcit.utils.tables import console, results_table
from ssl_xcit.utils.terminal import OneLine, PlainColumn, printable, say, track

NAMES = {  # as they are, and as they are shown
    "plain": "plain", "[red]fox": "[red]fox", "a[/]b": "a[/]b", ":cat:": ":cat:",
    "<b>x</b>": "<b>x</b>", "&lt;": "&lt;", "x\"y'z": "x\"y'z", "a|b": "a|b", "%{x}": "%{x}",
    "$1": "$1", "`c`": "`c`", "*b* _i_ ~~s~~": "*b* _i_ ~~s~~", "[a](b)": "[a](b)",
    "a\\b": "a\\b", "-x": "-x", "# x": "# x", "日本 é": "日本 é", "two\nlines": r"two\nlines",
    "\x1b[2J": r"\x1b[2J", "a\rb": r"a\rb", "tab\t": r"tab\t", "\u202egpj.exe": r"\u202egpj.exe",
    "zero\u200b": r"zero\u200b", "no\xa0break": r"no\xa0break", "caf\udce9": r"caf\udce9",
    "line\u2028": r"line\u2028", "\U000e0041": r"\U000e0041", "\x9b31m": r"\x9b31m",
}  # fmt: skip


@pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=ascii)
def test_a_name_is_shown_as_it_is_spelled(name, shown, capsys):
    assert printable(name) == shown
    markup = templates().from_string("{{ name }}").render(name=name)
    assert html.unescape(markup) == shown
    assert not set('<>"') & set(markup)

    say(f"{name}: one", "two")
    say(name, file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == f"{shown}: one\ntwo\n"
    assert captured.err == f"{shown}\n"

    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s is bad", (name,), None)
    assert OneLine("%(levelname)s: %(message)s").format(record) == f"WARNING: {shown} is bad"

    task = Task(0, name, None, 0, lambda: 0.0)
    assert PlainColumn("{task.description}").render(task).plain == shown
    assert list(track([1, 2], name, show=False)) == [1, 2]

    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console().print(table)
    assert capsys.readouterr().out.count(shown) == 3
    console().print(class_table("k-NN", {name: (50.0, 2)}))
    assert shown in capsys.readouterr().out
    console().print(results_table({name.replace(" ", ""): {"map": 1.0}}, name))
    out = capsys.readouterr().out
    assert f"{shown}, in %" in out
    assert out.count(shown.replace(" ", "")) >= 1

    assert shortened(name, 1000) == shown  # in a picture
    assert font(TEXT).getlength(shortened(name, 1000)) <= 1000


def test_everything_that_is_not_seen_is_an_escape():
    """By Unicode's categories, of which Python's own test of a character knows nothing."""
    unseen = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    hidden = [c for c in every if unicodedata.category(c) in unseen and c != " "]
    seen = "".join(sorted(set(every) - set(hidden)))
    assert printable(seen) == seen
    shown = printable("".join(hidden))
    assert shown.isascii()
    assert shown.count("\\") == len(hidden)
    assert shown.encode().decode("unicode_escape") == "".join(hidden)


def test_a_traceback_keeps_its_lines():
    try:
        raise ValueError("a\x1b")
    except ValueError:
        record = logging.LogRecord("x", 0, "", 0, "two\nlines", (), sys.exc_info())
    lines = OneLine("%(message)s").format(record).splitlines()
    assert lines[0] == r"two\nlines"
    assert len(lines) > 2


def test_a_reader_that_has_gone_stops_nobody():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    say("a line", file=Gone())


def test_headings_of_several_words_keep_their_lines(capsys):
    console().print(results_table({"random weights": {"map": 1.0}}, "title"))
    first, second = (line for line in capsys.readouterr().out.splitlines() if "┃" in line)
    assert first.split() == ["┃", "┃", "random", "┃"]
    assert second.split() == ["┃", "┃", "weights", "┃"]


def text_of(tokens):
    """What a reader of Markdown sees: no token but text may be there."""
    found = []
    for token in tokens:
        for child in token.children or []:
            assert child.type in ("text", "text_special"), (child.type, token.content)
        if token.type == "inline":
            found.append("".join(child.content for child in token.children))
    return found


def test_markdown_shows_names_as_they_are():
    """By a parser: each cell is its name, and the table has as many rows as there are names."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    lines = table_lines(["class", "in %"], [[name, "1.0"] for name in NAMES])
    cells = text_of(parser.parse("\n".join(lines)))
    assert cells == ["class", "in %", *(c for shown in NAMES.values() for c in (shown, "1.0"))]
    for name, shown in NAMES.items():
        made = Evaluation(
            results={name: {"knn_k20": 50.0}}, by_class={name: {"knn_k20": {name: (50.0, 2)}}}
        )
        read = text_of(parser.parse(markdown(made, name, [name], [f"weights: {name}"])))
        assert read[0] == shown
        assert f"{shown}, k-NN 20, by class:" in read
        assert read[-1] == f"weights: {shown}"
