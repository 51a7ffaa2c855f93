"""Write the page of a sweep: leaderboard, hyper-parameter importance, parallel coordinates."""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_xcit.sweeps.trial import FAILED, FINISHED
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.tables import format_value, interval_text, title_of

from ..viz.markup import command_line, duration_in_words, esc, paragraph, table
from .importance import importance
from .page_layout import Part, report_page
from .sweep import WORDS, SweepResults

PILLS = {"finished": "good", "running": "busy", "failed": "bad"}


def importance_of(sweep: SweepResults) -> dict[str, float]:
    """Importance of each setting for the results of the finished trials."""
    settings = {key: [t.values.get(key, "") for t in sweep.finished] for key in sweep.keys}
    return importance(settings, [t.value for t in sweep.finished if t.value is not None])


def leaderboard(sweep: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each trial, the best first."""
    rows = []
    for place, trial in enumerate(sweep.trials, start=1):
        ranked = trial.state == FINISHED and trial.value is not None
        whole = f" of {trial.total:,}" if trial.total and trial.steps < trial.total else ""
        rows.append(
            [
                str(place) if ranked else "",
                *(trial.values.get(key, "") for key in sweep.keys),
                "" if trial.value is None else format_value(sweep.metric, trial.value),
                interval_text(sweep.metric, trial.interval),
                f"{trial.steps:,}{whole}",
                duration_in_words(trial.seconds) if trial.seconds else "",
                "" if trial.state == FINISHED else WORDS.get(trial.state, trial.state),
            ]
        )
    return ["", *sweep.keys, title_of(sweep.metric).strip(), "95 %", "steps", "time", ""], rows


def axis(key: str, values: Sequence[str]) -> dict[str, Any]:
    """An axis of the parallel coordinates: numbers, logarithms of numbers, or words."""
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
    ticks = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
    return [t for t in ticks if min(logs) - 0.01 <= math.log10(t) <= max(logs) + 0.01]


def parallel(sweep: SweepResults) -> dict[str, Any]:
    """Parallel coordinates of all trials with a value, as data for the page."""
    measured = [trial for trial in sweep.trials if trial.value is not None]
    values = [trial.value for trial in measured]
    axes = [axis(key, [trial.values.get(key, "") for trial in measured]) for key in sweep.keys]
    steps = {"label": "steps", "values": [trial.steps for trial in measured]}
    varied = len(set(steps["values"])) > 1
    last = {"label": title_of(sweep.metric).strip(), "values": values}
    return {"axes": [*axes, *([steps] if varied else []), last], "colour": values}


def curves_of(sweep: SweepResults, most: int = 40) -> list[dict[str, Any]]:
    """The metric over training, of the best trials."""
    return [
        {
            "name": " ".join(f"{key}={value}" for key, value in trial.values.items()),
            "x": [step for step, _ in trial.curve],
            "y": [value for _, value in trial.curve],
            "best": place == 0,
        }
        for place, trial in enumerate(sweep.trials[:most])
        if trial.curve
    ]


def sweep_parts(sweep: SweepResults) -> list[Part]:
    """Parts of the page."""
    headings, rows = leaderboard(sweep)
    cells = [[esc(cell) for cell in row] for row in rows]
    parts = [Part("leaderboard", "Leaderboard", table(headings, cells, numeric=True))]

    def add_figure(ident: str, title: str, hint: str, data: Any, kind: str = "hint") -> None:
        figure = f'<div class="figure" data-figure="{ident}"></div>'
        html = (paragraph(hint, kind) if hint else "") + figure
        parts.append(Part(ident, title, html, data={ident: data}))

    if sum(trial.value is not None for trial in sweep.trials) > 1 and sweep.keys:
        hint = "Each line is a trial. Drag along an axis to keep the lines that cross it there."
        add_figure("parallel", "All trials", hint, parallel(sweep), "hint drag")
    if shares := importance_of(sweep):
        hint = (
            "How far the mean result moves when one setting takes each of its values, by a random "
            "forest fitted to the finished trials; all settings together are 100 %."
        )
        bars = [{"key": key, "share": share} for key, share in shares.items()]
        add_figure("decides", "Hyper-parameter importance", hint, bars)
    if lines := curves_of(sweep):
        add_figure("over", "Over training", "", lines)
    if failed := [trial for trial in sweep.trials if trial.state == FAILED]:
        rows = [[esc(trial.name), esc(trial.error)] for trial in failed]
        parts.append(Part("failed", "Failed trials", table(["trial", "its last message"], rows)))
    commands = [paragraph("Start the sweep again; what is finished stays:")]
    commands.append(command_line(str(sweep.about.get("command", ""))))
    if sweep.finished:
        best = sweep.finished[0]
        commands.append(paragraph("The best trial's settings, as a run by itself:"))
        commands.append(command_line(sweep.command(best)))
        commands.append(command_line(f"ssl-xcit report run={sweep.path / best.name}"))
    return [*parts, Part("commands", "Commands", "".join(commands))]


def write_sweep_page(sweep: SweepResults, out: Path) -> None:
    """Write one HTML file."""
    states = dict.fromkeys(trial.state for trial in sweep.trials)
    pills = "".join(
        f'<span class="pill {PILLS.get(s, "warn")}">{sweep.count(s)} {esc(WORDS.get(s, s))}</span>'
        for s in states
    )
    head = f'<p class="pills">{pills}</p>'
    if sweep.finished:
        best = sweep.finished[0]
        assert best.value is not None
        words = ", ".join(f"{key} {value}" for key, value in best.values.items())
        interval = interval_text(sweep.metric, best.interval)
        head += (
            f'<div class="tiles"><div class="tile"><span>{esc(title_of(sweep.metric))}, the best'
            f"</span><b>{esc(format_value(sweep.metric, best.value))}</b>"
            f"<small>{esc(interval)}{'; ' * bool(interval)}{esc(words)}</small></div></div>"
        )
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    text = report_page(sweep.path.name, "a sweep of ssl_xcit", head, sweep_parts(sweep), now)
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")
