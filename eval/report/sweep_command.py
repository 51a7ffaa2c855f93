"""The command `sweep`: a leaderboard, what decides, and a page with pictures of both."""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from ssl_xcit.errors import UserError
from ssl_xcit.files import replacing, writable_folder, writable_or_here
from ssl_xcit.sweeps.trial import FAILED, FINISHED
from ssl_xcit.table import console, format_value, shown_interval, title_of
from ssl_xcit.terminal import say

from ..settings import number
from ..views.markup import command, esc, paragraph, spoken, table
from .importance import importance
from .page import Part, page
from .sweep import WORDS, Ranked, Sweep, read_sweep

NAME = "sweep.html"
PILLS = {"finished": "good", "running": "busy", "failed": "bad"}


def decides(sweep: Sweep) -> dict[str, float]:
    """Share of each setting in what sets the finished trials apart."""
    ended = sweep.finished
    settings = {key: [one.values.get(key, "") for one in ended] for key in sweep.keys}
    return importance(settings, [one.value for one in ended if one.value is not None])


def cells(sweep: Sweep, one: Ranked, place: int) -> list[str]:
    """A line of the leaderboard."""
    ranked = one.state == FINISHED and one.value is not None
    whole = f" of {one.total:,}" if one.total and one.steps < one.total else ""
    return [
        str(place) if ranked else "",
        *(one.values.get(key, "") for key in sweep.keys),
        "" if one.value is None else format_value(sweep.metric, one.value),
        shown_interval(sweep.metric, one.interval),
        f"{one.steps:,}{whole}",
        spoken(one.seconds) if one.seconds else "",
        "" if one.state == FINISHED else WORDS.get(one.state, one.state),
    ]


def headings(sweep: Sweep) -> list[str]:
    """Of the leaderboard."""
    return ["", *sweep.keys, title_of(sweep.metric).strip(), "95 %", "steps", "time", ""]


def print_leaderboard(sweep: Sweep, most: int) -> None:
    """The best first; those that failed with what they said."""
    left_out = f", the best {most} of {len(sweep.trials)}" if len(sweep.trials) > most else ""
    say(f"{sweep.path}: {sweep.in_words()}{left_out}")
    found = Table()
    for heading in headings(sweep):
        found.add_column(heading, justify="right", no_wrap=True)
    for place, one in enumerate(sweep.trials[:most], start=1):
        found.add_row(*cells(sweep, one, place))
    console().print(found)
    for one in sweep.trials:
        if one.state == FAILED:
            words = " ".join(f"{k}={v}" for k, v in one.values.items())
            say(f"failed: {words}: {one.error}")


def axis(key: str, values: Sequence[str]) -> dict[str, Any]:
    """A line of the parallel coordinates: numbers, logarithms of numbers, or words."""
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        words = sorted(set(values))
        return {
            "label": key,
            "values": [words.index(v) for v in values],
            "tickvals": list(range(len(words))),
            "ticktext": words,
        }
    if min(numbers) > 0 and max(numbers) / min(numbers) > 20:
        logs = [math.log10(n) for n in numbers]
        ticks = sorted(set(numbers)) if len(set(numbers)) <= 8 else powers(logs)
        return {
            "label": key,
            "values": logs,
            "tickvals": [math.log10(t) for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
        }
    few = sorted(set(numbers))
    marked = {"tickvals": few, "ticktext": [f"{n:g}" for n in few]} if len(few) <= 8 else {}
    return {"label": key, "values": numbers, **marked}


def powers(logs: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range."""
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    found = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
    return [t for t in found if min(logs) - 0.01 <= math.log10(t) <= max(logs) + 0.01]


def parallel(sweep: Sweep) -> dict[str, Any]:
    """Parallel coordinates of all trials with a value, as data for the page."""
    known = [one for one in sweep.trials if one.value is not None]
    values = [one.value for one in known]
    axes = [axis(key, [one.values.get(key, "") for one in known]) for key in sweep.keys]
    steps = {"label": "steps", "values": [one.steps for one in known]}
    varied = len(set(steps["values"])) > 1
    last = {"label": title_of(sweep.metric).strip(), "values": values}
    return {"axes": [*axes, *([steps] if varied else []), last], "colour": values}


def curves_of(sweep: Sweep, most: int = 40) -> list[dict[str, Any]]:
    """The metric over training, of the best trials."""
    return [
        {
            "name": " ".join(f"{key}={value}" for key, value in one.values.items()),
            "x": [step for step, _ in one.curve],
            "y": [value for _, value in one.curve],
            "best": place == 0,
        }
        for place, one in enumerate(sweep.trials[:most])
        if one.curve
    ]


def parts_of(sweep: Sweep) -> list[Part]:
    """Of the page."""
    rows = [
        [esc(cell) for cell in cells(sweep, one, place)]
        for place, one in enumerate(sweep.trials, start=1)
    ]
    board = Part("leaderboard", "Leaderboard", table(headings(sweep), rows, numeric=True))
    found = [board]
    known = [one for one in sweep.trials if one.value is not None]
    if len(known) > 1 and sweep.keys:
        hint = "Each line is a trial. Drag along an axis to keep the lines that cross it there."
        figure = '<div class="figure" data-figure="parallel"></div>'
        data = {"parallel": parallel(sweep)}
        found.append(
            Part("parallel", "All trials", paragraph(hint, "hint drag") + figure, data=data)
        )
    if shares := decides(sweep):
        hint = (
            "Of what sets the finished trials apart: how far the mean result moves when one "
            "setting takes each of its values, by a random forest fitted to the trials."
        )
        figure = '<div class="figure" data-figure="decides"></div>'
        bars = {"decides": [{"key": k, "share": s} for k, s in shares.items()]}
        html = paragraph(hint, "hint") + figure
        found.append(Part("decides", "What decides", html, data=bars))
    if lines := curves_of(sweep):
        figure = '<div class="figure" data-figure="over"></div>'
        found.append(Part("over", "Over training", figure, data={"over": lines}))
    if failed := [one for one in sweep.trials if one.state == FAILED]:
        rows = [[esc(one.name), esc(one.error)] for one in failed]
        found.append(Part("failed", "Failed trials", table(["trial", "what it said last"], rows)))
    commands = [paragraph("Start the sweep again; what is finished stays:")]
    commands.append(command(str(sweep.about.get("command", ""))))
    if sweep.finished:
        commands.append(paragraph("The best trial's settings, as a run by itself:"))
        commands.append(command(sweep.command(sweep.finished[0])))
        commands.append(command(f"ssl-xcit report run={sweep.path / sweep.finished[0].name}"))
    found.append(Part("commands", "Commands", "".join(commands)))
    return found


def write_page(sweep: Sweep, out: Path) -> None:
    """One HTML file."""
    states = dict.fromkeys(one.state for one in sweep.trials)
    pills = "".join(
        f'<span class="pill {PILLS.get(s, "warn")}">{sweep.count(s)} {esc(WORDS.get(s, s))}</span>'
        for s in states
    )
    head = f'<p class="pills">{pills}</p>'
    if sweep.finished:
        best = sweep.finished[0]
        assert best.value is not None
        words = ", ".join(f"{key} {value}" for key, value in best.values.items())
        interval = shown_interval(sweep.metric, best.interval)
        head += (
            f'<div class="tiles"><div class="tile"><span>{esc(title_of(sweep.metric))}, the best'
            f"</span><b>{esc(format_value(sweep.metric, best.value))}</b>"
            f"<small>{esc(interval)}{'; ' * bool(interval)}{esc(words)}</small></div></div>"
        )
    text = page(sweep.path.name, "a sweep of ssl_xcit", head, parts_of(sweep),
                f"{datetime.now():%Y-%m-%d %H:%M}")  # fmt: skip
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")


def main(cfg: DictConfig) -> None:
    """`ssl-xcit sweep DIR`: prints a leaderboard, writes one HTML file."""
    number("top", cfg.top, int, 1)
    folder = Path(str(cfg.dir)).expanduser()
    sweep = read_sweep(folder, cfg.metric)
    if cfg.out:
        out = Path(str(cfg.out)).expanduser()
        if out.suffix != ".html" or out.is_dir():
            raise UserError(f"out={cfg.out}: a file ending in .html")
        writable_folder(out.parent)
    else:
        out = writable_or_here(folder) / NAME
    if not sweep.trials:
        raise UserError(f"{folder}: no trial has begun yet")
    if sweep.finished == [] and sweep.count(FINISHED):
        raise UserError(
            f"metric={sweep.metric}: no finished trial has it; name one of the final evaluation, "
            "such as metric=linear, or a column of metrics.csv, such as metric=rankme"
        )
    print_leaderboard(sweep, cfg.top)
    if shares := decides(sweep):
        told = ", ".join(f"{key} {100 * share:.0f} %" for key, share in shares.items())
        say(f"what decides: {told}")
    if sweep.finished:
        say("the best as a run by itself:", f"  {sweep.command(sweep.finished[0])}")
        say(f"look closer: ssl-xcit report run={folder / sweep.finished[0].name}")
    write_page(sweep, out)
    say(f"written: {out}; open it in a browser")
