"""Print the progress of a sweep: a line for each trial that starts or ends, and in a terminal a bar
for each that runs.
"""

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.driver import Watcher
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, STOPPED, Trial
from ssl_xcit.utils.tables import format_value, shown_in_terminal, title_of
from ssl_xcit.utils.terminal import PlainColumn, PlainConsole

WORDS = {PRUNED: "ended early", STOPPED: "stopped, saved"}


class ProgressLines(Watcher):
    """Prints lines and bars; see the module docstring.

    Args:
        total: number of trials.
        metric: ranks them.
    """

    def __init__(self, total: int, metric: str):
        self.total, self.metric = total, metric
        self.done = 0
        self.bars: dict[Trial, int] = {}
        self.progress = Progress(
            PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            PlainColumn("{task.fields[value]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=PlainConsole(soft_wrap=True), transient=True,
            disable=not shown_in_terminal(),
        )  # fmt: skip

    def __enter__(self) -> "ProgressLines":
        self.progress.start()
        self.all = self.progress.add_task("trials", total=self.total, value="")
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(text)

    def started(self, trial: Trial) -> None:
        """See `Watcher`."""
        steps = trials.steps_done(trial.folder)
        resumed = f", going on from about step {steps:,}" if steps else ""
        self.message(f"[{trial.number + 1}/{self.total}] {trial}: started{resumed}")
        self.bars[trial] = self.progress.add_task(f"  {trial}", total=None, value="")

    def progressed(self, trial: Trial, steps: int, total: int | None, value: float | None) -> None:
        """See `Watcher`."""
        self.progress.update(
            self.bars[trial],  # type: ignore[arg-type]
            completed=steps,
            total=total,
            value=self.number(value),
        )

    def ended(self, trial: Trial, state: str, value: float | None, error: str) -> None:
        """See `Watcher`."""
        bar = self.bars.pop(trial, None)
        if bar is None:
            state_words = {FINISHED: "finished before", PRUNED: "ended early before"}.get(
                state, state
            )
        else:
            self.progress.remove_task(bar)  # type: ignore[arg-type]
            state_words = WORDS.get(state, state)
        self.done += state in (FINISHED, PRUNED, FAILED)
        self.progress.update(self.all, completed=self.done)
        details = [self.number(value), error]
        if state == FAILED:
            details = [error, f"see {trial.folder / trials.OUTPUT}"]
        line = "; ".join(filter(None, (state_words, *details)))
        self.message(f"[{trial.number + 1}/{self.total}] {trial}: {line}")

    def number(self, value: float | None) -> str:
        """The metric with its name."""
        return (
            "" if value is None else f"{title_of(self.metric)} {format_value(self.metric, value)}"
        )
