"""Print the progress of a sweep: a line for each trial that starts or ends, and in a terminal a bar
for each that runs.
"""

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.job import OUTPUT
from ssl_xcit.sweeps.trial import FAILED, PRUNED, STOPPED, Trial
from ssl_xcit.utils.tables import format_value, shown_in_terminal, title_of
from ssl_xcit.utils.terminal import PlainColumn, PlainConsole

WORDS = {PRUNED: "ended early", STOPPED: "stopped, saved"}


class ProgressLines(Progress):
    """Prints lines and bars; see the module docstring.

    Args:
        total: number of trials.
        metric: ranks them.
    """

    def __init__(self, total: int, metric: str):
        self.trials, self.metric, self.ends = total, metric, 0
        super().__init__(
            PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            PlainColumn("{task.fields[value]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=PlainConsole(soft_wrap=True), transient=True,
            disable=not shown_in_terminal(),
        )  # fmt: skip
        self.all = self.add_task("trials", total=total, value="")
        self.bars: dict[Trial, TaskID] = {}

    def started(self, trial: Trial) -> None:
        """A trial was started, for the first time or again."""
        steps = trials.steps_done(trial.folder)
        resumed = f", going on from about step {steps:,}" if steps else ""
        self.console.print(f"{trial}: started{resumed}")
        self.bars[trial] = self.add_task(f"  {trial}", total=None, value="")

    def progressed(self, trial: Trial, steps: int, total: int | None, value: float | None) -> None:
        """A trial has taken this many steps; the metric has this value."""
        self.update(self.bars[trial], completed=steps, total=total, value=self.number(value))

    def ended(self, trial: Trial, state: str, value: float | None) -> None:
        """A trial has ended, now or in an earlier sweep."""
        words = WORDS.get(state, state)
        if trial in self.bars:
            self.remove_task(self.bars.pop(trial))
        else:
            words += " before"
        self.ends += state != STOPPED
        self.update(self.all, completed=self.ends)
        details = self.number(value)
        if state == FAILED:
            details = f"{trials.read(trial.folder).get('error')}; see {trial.folder / OUTPUT}"
        line = "; ".join(filter(None, (words, details)))
        self.console.print(f"[{self.ends}/{self.trials}] {trial}: {line}")

    def number(self, value: float | None) -> str:
        """The metric with its name."""
        if value is None:
            return ""
        return f"{title_of(self.metric)} {format_value(self.metric, value)}"
