"""The loop of a sweep: ask the search for trials, start them, follow their metrics, report results.

Finished trials are skipped, stopped ones resumed, failed ones marked, and those that another sweep
trains are waited for. The run folders hold the whole state of a sweep.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.job import IN_USE, POLL, STOP, Job, ask_to_stop
from ssl_xcit.sweeps.launchers import Launcher, RunningJob
from ssl_xcit.sweeps.searches import Search
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, RUNNING, STOPPED, Trial
from ssl_xcit.utils.locks import lock_holder

READ_EVERY = 1.0  # seconds between two reads of a trial's metrics, or ...
READ_SHARE = 20  # ... this many times as long as a read takes
KILL_AFTER = 30.0  # seconds after a second Ctrl-C until trials are killed
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


@dataclass
class ActiveTrial:
    """A trial that runs."""

    trial: Trial
    slot: int
    running: RunningJob
    pruned: bool = False
    reported: set[int] = field(default_factory=set)
    next_read: float = 0.0


class Watcher:
    """Is told of everything that happens in a sweep; this one ignores it."""

    def started(self, trial: Trial) -> None:
        """A trial was started, for the first time or again."""

    def progressed(self, trial: Trial, steps: int, total: int | None, value: float | None) -> None:
        """A trial has taken this many steps; the metric has this value."""

    def ended(self, trial: Trial, state: str, value: float | None, error: str) -> None:
        """A trial has ended, now or in an earlier sweep."""

    def message(self, text: str) -> None:
        """Anything else."""


class Sweep:
    """Runs trials; see the module docstring.

    Args:
        search: gives trials.
        launcher: runs them.
        command: the command line of a trial.
        metric: ranks trials.
        retry_failed: start trials again that failed in an earlier sweep.
        watcher: is told of what happens.
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
        self.active: list[ActiveTrial] = []
        self.held: deque[Trial] = deque()  # by other sweeps
        self.received: int | None = None
        self.asked_again = 0.0
        self.states: dict[Trial, str] = {}

    def run(self) -> int:
        """Run all trials.

        Returns:
            Exit code. 0: all ended well; 1: one failed; 75 or 130: stopped by a signal.
        """
        before = {number: signal.signal(number, self.receive) for number in EXIT_CODES}
        try:
            exhausted = False
            while True:
                while self.received is None and len(self.active) < self.launcher.slots:
                    trial = None if exhausted else self.search.ask()
                    if trial is None:
                        exhausted = True
                        trial = self.next_released()
                    if trial is None:
                        break
                    self.start(trial)
                if not self.active and (self.received is not None or (exhausted and not self.held)):
                    break
                time.sleep(POLL)
                self.poll()
        finally:
            for active in self.active:  # after an error of ours nothing follows them
                ask_to_stop(active.trial.folder, signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            return EXIT_CODES[signal.Signals(self.received)]
        states = set(self.states.values())
        return 1 if FAILED in states else 75 if STOPPED in states else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Stop all trials, which save; after a second Ctrl-C they have `KILL_AFTER` seconds."""
        if self.received is not None and number == signal.SIGINT:
            self.asked_again = time.monotonic()
        self.received = self.received or number
        for active in self.active:
            with suppress(OSError):
                ask_to_stop(active.trial.folder, number)

    def next_released(self) -> Trial | None:
        """A trial that another sweep was training, once it no longer does."""
        for _ in range(len(self.held)):
            trial = self.held.popleft()
            if not lock_holder(trial.folder):
                return trial
            self.held.append(trial)
        return None

    def start(self, trial: Trial) -> None:
        """Start a trial, unless it has ended or another sweep trains it."""
        state = trials.state_of(trial.folder)
        if state in (FINISHED, PRUNED) or (state == FAILED and not self.retry_failed):
            self.conclude(trial, state, str(trials.read(trial.folder).get("error", "")))
            return
        if holder := lock_holder(trial.folder):
            if trial not in self.states:
                self.watcher.message(f"{trial}: waiting for {holder}")
            self.states[trial] = RUNNING
            self.held.append(trial)
            return
        slot = min(set(range(self.launcher.slots)) - {active.slot for active in self.active})
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / STOP).unlink(missing_ok=True)
        trials.note(trial, RUNNING)
        self.states[trial] = RUNNING
        self.watcher.started(trial)
        job = Job(
            tuple(self.command(trial)), str(trial.folder.resolve()), trials.OUTPUT,
            self.launcher.environment(slot),
        )  # fmt: skip
        self.active.append(ActiveTrial(trial, slot, self.launcher.submit(job)))

    def poll(self) -> None:
        """Read the metrics of running trials, and conclude those that have ended."""
        for active in list(self.active):
            if active.running.done():
                self.active.remove(active)
                self.conclude_started(active)
            elif time.monotonic() > active.next_read:
                began = time.monotonic()
                self.follow(active)
                duration = time.monotonic() - began  # metrics of long runs take a while to read
                active.next_read = time.monotonic() + max(READ_EVERY, READ_SHARE * duration)
                if self.asked_again and time.monotonic() - self.asked_again > KILL_AFTER:
                    ask_to_stop(active.trial.folder, signal.SIGKILL)

    def follow(self, active: ActiveTrial) -> None:
        """Report progress, and let the search end a trial by new values of the metric."""
        folder, total = active.trial.folder, trials.total_steps(active.trial.folder)
        values = trials.column(folder, self.metric)
        last = values[-1][1] if values else None
        self.watcher.progressed(active.trial, trials.steps_done(folder), total, last)
        for step, value in values:
            if total and step < total and step not in active.reported and not active.pruned:
                active.reported.add(step)
                if self.search.wants_stop(active.trial, step / total, value):
                    active.pruned = True
                    ask_to_stop(folder, signal.SIGTERM)

    def conclude_started(self, active: ActiveTrial) -> None:
        """Derive the state of a trial from its exit code and its folder."""
        folder, error = active.trial.folder, ""
        (folder / STOP).unlink(missing_ok=True)
        try:
            code = active.running.result()
        except Exception as cause:  # whatever the launcher raises
            code, error = -1, f"the launcher failed: {type(cause).__name__}: {cause}"
        if (folder / "summary.json").is_file():
            state = FINISHED
        elif active.pruned:
            state = PRUNED
        elif code in (75, 130) or self.received is not None:
            state = STOPPED
        elif code == IN_USE or lock_holder(folder):  # another sweep was faster
            self.held.append(active.trial)
            return
        else:
            state, error = FAILED, error or failure_reason(folder, code)
        trials.note(active.trial, state, exit_code=code, **({"error": error} if error else {}))
        self.conclude(active.trial, state, error)

    def conclude(self, trial: Trial, state: str, error: str) -> None:
        """Report the result of a trial to the search and the watcher."""
        value = trials.final_value(trial.folder, self.metric)
        self.states[trial] = state
        retried = state == FAILED and self.retry_failed
        self.search.tell(trial, STOPPED if retried else state, value)
        self.watcher.ended(trial, state, value, error)


def failure_reason(folder: Path, code: int) -> str:
    """The last message of a failed trial, or the signal that killed it."""
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
    return lines[-1] if lines else f"exit code {code}, without output"
