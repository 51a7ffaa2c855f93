"""The command `sweep`: a leaderboard and a page about a sweep."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.trial import FAILED, FINISHED
from ssl_xcit.utils.tables import console
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Text

from ..report.sweep import SweepResults, read_sweep
from ..report.sweep_page import importance_of, leaderboard, write_sweep_page
from ..viz.markup import page_path


@dataclass(frozen=True)
class SweepSettings:
    """`conf/sweep.yaml`."""

    main: str
    dir: Text
    metric: str | None
    top: Count
    out: Text | None


def print_leaderboard(sweep: SweepResults, most: int) -> None:
    """Print the best trials, then the errors of those that failed."""
    left_out = f", the best {most} of {len(sweep.trials)}" if len(sweep.trials) > most else ""
    say(f"{sweep.path}: {sweep.in_words()}{left_out}")
    board = leaderboard(sweep)
    table = Table()
    for heading in board.headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in board.rows[:most]:
        table.add_row(*row)
    console().print(table)
    for trial in sweep.trials:
        if trial.state == FAILED:
            words = " ".join(f"{key}={value}" for key, value in trial.values.items())
            say(f"failed: {words}: {trial.error}")


def main(settings: SweepSettings) -> None:
    """`ssl-xcit sweep DIR`: prints a leaderboard, writes one HTML file."""
    folder = Path(str(settings.dir)).expanduser()
    sweep = read_sweep(folder, settings.metric)
    out = page_path(settings.out, folder, "sweep.html")
    if not sweep.trials:
        raise UserError(f"{folder}: no trial has begun yet")
    if not sweep.finished and sweep.count(FINISHED):
        raise UserError(
            f"metric={sweep.metric}: no finished trial has it; name one of the final evaluation, "
            "such as metric=linear, or a column of metrics.csv, such as metric=rankme"
        )
    print_leaderboard(sweep, settings.top)
    if shares := importance_of(sweep):
        words = ", ".join(f"{key} {100 * share:.0f} %" for key, share in shares.items())
        say(f"hyper-parameter importance: {words}")
    if sweep.finished:
        best = sweep.finished[0]
        say("the best as a run by itself:", f"  {sweep.command(best)}")
        say(f"look closer: ssl-xcit report run={folder / best.name}")
    write_sweep_page(sweep, out)
    say(f"written: {out}; open it in a browser")
