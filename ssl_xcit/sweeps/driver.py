"""The loop of a sweep: ask for trials, start them, look how far they have come, tell what became of
them.

What is finished is skipped, what was stopped goes on, what another sweep is training is waited for,
what fails is marked. The sweep keeps nothing in memory that the run folders do not tell.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.locks import lock_holder
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.job import POLL, STOP, Job, ask_to_stop
from ssl_xcit.sweeps.launchers import Launcher, Running
from ssl_xcit.sweeps.searches import Search
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, RUNNING, STOPPED, Trial

LOOK = 1.0  # seconds between two looks at a trial's metrics, or ...
SELDOM = 20  # ... so many times what a look takes
FORCED = 30.0  # seconds after a second Ctrl-C until trials are killed
IN_USE = "is in use by process"  # as `locks.exclusive` says it
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


@dataclass
class Started:
    """A trial under way."""

    trial: Trial
    slot: int
    running: Running
    pruned: bool = False
    reported: set[int] = field(default_factory=set)
    look_again: float = 0.0


class Watcher:
    """What a person sees of a sweep; by itself nothing."""

    def begins(self, trial: Trial) -> None:
        """A trial is started, for the first time or again."""

    def goes_on(self, trial: Trial, steps: int, total: int | None, value: float | None) -> None:
        """How far it has come."""

    def ends(self, trial: Trial, state: str, value: float | None, words: str) -> None:
        """It has ended, now or in an earlier sweep."""

    def says(self, words: str) -> None:
        """Anything else."""


class Sweep:
    """See the module.

    Args:
        search: gives trials.
        launcher: runs them.
        command: of a trial, as words.
        metric: by which they are judged.
        retry_failed: start those again that failed in an earlier sweep.
        watcher: is told.
    """

    def __init__(
        self,
        search: Search,
        launcher: Launcher,
        command: Callable[[Trial], Sequence[str]],
        metric: str,
        retry_failed: bool = True,
        watcher: Watcher | None = None,
    ):
        self.search = search
        self.launcher = launcher
        self.command = command
        self.metric = metric
        self.retry_failed = retry_failed
        self.watcher = watcher or Watcher()
        self.started: list[Started] = []
        self.elsewhere: deque[Trial] = deque()
        self.received: int | None = None
        self.asked_again = 0.0
        self.states: dict[Trial, str] = {}

    def run(self) -> int:
        """All trials.

        Returns:
            0: all ended well; 1: one failed; 75 or 130: it was asked to stop, and did.
        """
        before = {number: signal.signal(number, self.receive) for number in EXIT_CODES}
        try:
            exhausted = False
            while True:
                while self.received is None and len(self.started) < self.launcher.slots:
                    trial = None if exhausted else self.search.ask()
                    if trial is None:
                        exhausted = True
                        trial = self.free_elsewhere()
                    if trial is None:
                        break
                    self.take(trial)
                if not self.started and (
                    self.received is not None or (exhausted and not self.elsewhere)
                ):
                    break
                time.sleep(POLL)
                self.look()
        finally:
            for one in self.started:  # an error of ours must not leave them alone
                ask_to_stop(one.trial.folder, signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            return EXIT_CODES[signal.Signals(self.received)]
        states = set(self.states.values())
        return 1 if FAILED in states else 75 if STOPPED in states else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Have all trials save and end; the second Ctrl-C leaves at once."""
        if self.received is not None and number == signal.SIGINT:
            self.asked_again = time.monotonic()
        self.received = self.received or number
        for one in self.started:
            with suppress(OSError):
                ask_to_stop(one.trial.folder, number)

    def free_elsewhere(self) -> Trial | None:
        """One of those that others were training, when they no longer do."""
        for _ in range(len(self.elsewhere)):
            trial = self.elsewhere.popleft()
            if not lock_holder(trial.folder):
                return trial
            self.elsewhere.append(trial)
        return None

    def take(self, trial: Trial) -> None:
        """Start a trial, unless it is done or somebody else is at it."""
        state = trials.state_of(trial.folder)
        if state in (FINISHED, PRUNED) or (state == FAILED and not self.retry_failed):
            self.conclude(trial, state, str(trials.read(trial.folder).get("error", "")))
            return
        if holder := lock_holder(trial.folder):
            if trial not in self.states:
                self.watcher.says(f"{trial}: waiting for {holder}")
            self.states[trial] = RUNNING
            self.elsewhere.append(trial)
            return
        slot = min(set(range(self.launcher.slots)) - {one.slot for one in self.started})
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / STOP).unlink(missing_ok=True)
        trials.note(trial, RUNNING)
        self.states[trial] = RUNNING
        self.watcher.begins(trial)
        job = Job(
            tuple(self.command(trial)), str(trial.folder.resolve()), trials.OUTPUT,
            self.launcher.environment(slot),
        )  # fmt: skip
        self.started.append(Started(trial, slot, self.launcher.submit(job)))

    def look(self) -> None:
        """At every trial that runs."""
        for one in list(self.started):
            if one.running.done():
                self.started.remove(one)
                self.ended(one)
            elif time.monotonic() > one.look_again:
                began = time.monotonic()
                self.follow(one)
                spent = time.monotonic() - began  # metrics of long runs take a while to read
                one.look_again = time.monotonic() + max(LOOK, SELDOM * spent)
                if self.asked_again and time.monotonic() - self.asked_again > FORCED:
                    ask_to_stop(one.trial.folder, signal.SIGKILL)

    def follow(self, one: Started) -> None:
        """How far it has come; the search hears new values of the metric, and may end it."""
        folder, total = one.trial.folder, trials.total_steps(one.trial.folder)
        values = trials.column(folder, self.metric)
        last = values[-1][1] if values else None
        self.watcher.goes_on(one.trial, trials.steps_done(folder), total, last)
        for step, value in values:
            if total and step < total and step not in one.reported and not one.pruned:
                one.reported.add(step)
                if self.search.wants_stop(one.trial, step / total, value):
                    one.pruned = True
                    ask_to_stop(folder, signal.SIGTERM)

    def ended(self, one: Started) -> None:
        """What the exit code and the folder say."""
        folder, error = one.trial.folder, ""
        (folder / STOP).unlink(missing_ok=True)
        try:
            code = one.running.result()
        except Exception as trouble:  # whatever the launcher raises
            code, error = -1, f"the launcher failed: {type(trouble).__name__}: {trouble}"
        if (folder / "summary.json").is_file():
            state = FINISHED
        elif one.pruned:
            state = PRUNED
        elif code in (75, 130) or self.received is not None:
            state = STOPPED
        else:
            state, error = FAILED, error or reason(folder, code)
            if lock_holder(folder) or IN_USE in error:  # another sweep was faster
                self.elsewhere.append(one.trial)
                return
        trials.note(one.trial, state, exit_code=code, **({"error": error} if error else {}))
        self.conclude(one.trial, state, error)

    def conclude(self, trial: Trial, state: str, words: str) -> None:
        """Tell the search and whoever watches."""
        value = trials.final_value(trial.folder, self.metric)
        self.states[trial] = state
        retried = state == FAILED and self.retry_failed
        self.search.tell(trial, STOPPED if retried else state, value)
        self.watcher.ends(trial, state, value, words)


def reason(folder: Path, code: int) -> str:
    """Why a trial failed: what the command said last, or the signal that killed it."""
    text = ""
    with suppress(OSError), (folder / trials.OUTPUT).open("rb") as file:
        file.seek(max(0, (folder / trials.OUTPUT).stat().st_size - 20_000))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("ssl-xcit: ")]
    if code in (1, 2) and ours:
        return ours[-1].removeprefix("ssl-xcit: ")
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return lines[-1] if lines else f"exit code {code}, and not a word"


def check_metric(found: Sequence[Any], metric: str) -> None:
    """That finished trials have the metric that they are ranked by.

    Raises:
        UserError: none has.
    """
    if found and all(value is None for value in found):
        raise UserError(
            f"sweep.metric={metric}: no finished trial has it; name one of the final evaluation, "
            "such as linear, or a column of metrics.csv, such as rankme"
        )
