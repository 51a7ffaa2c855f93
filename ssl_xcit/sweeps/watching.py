"""What a person sees of a sweep: a line for each trial that begins or ends, and in a terminal a bar
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
from ssl_xcit.table import format_value, shown_in_terminal, title_of
from ssl_xcit.terminal import PlainColumn, PlainConsole

WORDS = {PRUNED: "ended early", STOPPED: "stopped, saved"}


class Lines(Watcher):
    """See the module.

    Args:
        total: how many trials there will be.
        metric: what they are judged by.
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

    def __enter__(self) -> "Lines":
        self.progress.start()
        self.all = self.progress.add_task("trials", total=self.total, value="")
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.progress.stop()

    def says(self, words: str) -> None:
        """A line, above the bars."""
        self.progress.console.print(words)

    def begins(self, trial: Trial) -> None:
        """See `Watcher`."""
        again = trials.steps_done(trial.folder)
        more = f", going on from about step {again:,}" if again else ""
        self.says(f"[{trial.number + 1}/{self.total}] {trial}: started{more}")
        self.bars[trial] = self.progress.add_task(f"  {trial}", total=None, value="")

    def goes_on(self, trial: Trial, steps: int, total: int | None, value: float | None) -> None:
        """See `Watcher`."""
        self.progress.update(
            self.bars[trial],  # type: ignore[arg-type]
            completed=steps,
            total=total,
            value=self.number(value),
        )

    def ends(self, trial: Trial, state: str, value: float | None, words: str) -> None:
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
        tail = [self.number(value), words]
        if state == FAILED:
            tail = [words, f"see {trial.folder / trials.OUTPUT}"]
        told = "; ".join(filter(None, tail))
        self.says(
            f"[{trial.number + 1}/{self.total}] {trial}: {state_words}" + f"; {told}" * bool(told)
        )

    def number(self, value: float | None) -> str:
        """The metric, named."""
        return (
            "" if value is None else f"{title_of(self.metric)} {format_value(self.metric, value)}"
        )
