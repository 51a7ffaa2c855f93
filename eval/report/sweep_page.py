"""Write the page of a sweep: leaderboard, hyper-parameter importance, parallel coordinates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_xcit.sweeps.trial import FAILED, FINISHED
from ssl_xcit.utils.tables import format_value, interval_text, title_of
from ssl_xcit.utils.terminal import duration_in_words

from ..viz.markup import render_macro
from .figures import importance_figure, parallel_figure, progress_figure
from .importance import importance
from .page import Part, Table, make_part, write_page
from .sections import PILLS, Tile
from .sweep import WORDS, SweepResults


def importance_of(sweep: SweepResults) -> dict[str, float]:
    """Importance of each setting for the results of the finished trials."""
    settings = {key: [t.values.get(key, "") for t in sweep.finished] for key in sweep.keys}
    return importance(settings, [t.value for t in sweep.finished if t.value is not None])


def leaderboard(sweep: SweepResults) -> Table:
    """A row for each trial, the best first."""
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
    title = title_of(sweep.metric).strip()
    return Table(["", *sweep.keys, title, "95 %", "steps", "time", ""], rows, "numeric")


def commands(sweep: SweepResults) -> dict[str, Any]:
    """Commands to start the sweep again, and for the best trial."""
    again = [str(sweep.about.get("command", ""))]
    groups = [("Start the sweep again; what is finished stays:", again)]
    if sweep.finished:
        best = sweep.finished[0]
        report = f"ssl-xcit report run={sweep.path / best.name}"
        words = "The best trial's settings, as a run by itself:"
        groups.append((words, [sweep.command(best), report]))
    return {"runs": [("", groups)]}


def sweep_parts(sweep: SweepResults) -> list[Part]:
    """Parts of the page, without those that would be empty."""
    makers: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    makers.append(("leaderboard", "Leaderboard", lambda: {"content": leaderboard(sweep)}))
    if sum(trial.value is not None for trial in sweep.trials) > 1 and sweep.keys:
        makers.append(("parallel", "All trials", lambda: {"figure": parallel_figure(sweep)}))
    if shares := importance_of(sweep):
        figure = importance_figure(shares)
        makers.append(("importance", "Hyper-parameter importance", lambda: {"figure": figure}))
    if curves := progress_figure(sweep):
        makers.append(("progress", "Over training", lambda: {"figure": curves}))
    if failed := [[trial.name, trial.error] for trial in sweep.trials if trial.state == FAILED]:
        table = Table(["trial", "its last message"], failed)
        makers.append(("failed", "Failed trials", lambda: {"content": table}))
    makers.append(("commands", "Commands", lambda: commands(sweep)))
    return [make_part(*maker) for maker in makers]


def write_sweep_page(sweep: SweepResults, out: Path) -> None:
    """Write one HTML file."""
    states = dict.fromkeys(trial.state for trial in sweep.trials)
    pills = [(PILLS.get(s, "warn"), f"{sweep.count(s)} {WORDS.get(s, s)}") for s in states]
    tiles = []
    if sweep.finished:
        best = sweep.finished[0]
        assert best.value is not None
        words = ", ".join(f"{key} {value}" for key, value in best.values.items())
        name, value = f"{title_of(sweep.metric)}, the best", format_value(sweep.metric, best.value)
        below = [interval_text(sweep.metric, best.interval), words]
        tiles.append(Tile(name, value, [line for line in below if line]))
    head = render_macro("sections.html", "pills_and_tiles", pills=pills, tiles=tiles)
    write_page(out, sweep.path.name, "a sweep of ssl_xcit", head, sweep_parts(sweep))
