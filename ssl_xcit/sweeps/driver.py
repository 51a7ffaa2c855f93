"""Run the trials of a sweep: start them, follow their metrics, report results.

Finished trials are skipped, stopped ones resumed, failed ones marked, and those that another sweep
trains are waited for, by their run folders.
"""

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.job import IN_USE, OUTPUT, POLL, STOP, Job, ask_to_stop
from ssl_xcit.sweeps.launchers import Launcher
from ssl_xcit.sweeps.progress import ProgressLines
from ssl_xcit.sweeps.search import Search
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, RUNNING, STOPPED, Trial
from ssl_xcit.utils.locks import lock_holder

READ_EVERY = 1.0  # seconds between two reads of a trial's metrics, or ...
READ_SHARE = 20  # ... this many times as long as a read takes
KILL_AFTER = 30.0  # seconds after a second Ctrl-C until trials are killed
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Sweep:
    """Runs trials; see the module docstring.

    Args:
        search: gives trials, and takes their results.
        launcher: runs them.
        command: the command line of a trial.
        lines: show what happens.
    """

    def __init__(
        self,
        search: Search,
        launcher: Launcher,
        command: Callable[[Trial], Sequence[str]],
        lines: ProgressLines,
    ):
        self.search, self.launcher, self.command = search, launcher, command
        self.metric, self.lines = search.settings.metric, lines
        self.active: list[Path] = []  # folders of trials that run
        self.received: int | None = None
        self.kill_at = float("inf")
        self.states: dict[tuple[str, ...], str] = {}  # by overrides

    def run(self) -> int:
        """Run all trials.

        Returns:
            Exit code. 0: all ended well; 1: one failed; 75 or 130: stopped by a signal.
        """
        before = {number: signal.signal(number, self.receive) for number in EXIT_CODES}
        try:
            for trial, state in self.search.ended_before:
                self.show_end(trial, state)
            with ThreadPoolExecutor(self.launcher.slots) as pool:
                workers = [pool.submit(self.work, slot) for slot in range(self.launcher.slots)]
                while (waited := wait(workers, POLL)).not_done:
                    if any(worker.exception() for worker in waited.done) and not self.received:
                        self.receive(signal.SIGTERM)
                    if time.monotonic() > self.kill_at:
                        self.stop_all(signal.SIGKILL)
            for worker in workers:
                worker.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            return EXIT_CODES[signal.Signals(self.received)]
        states = set(self.states.values())
        return 1 if FAILED in states else 75 if STOPPED in states else 0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Stop all trials, which save; after a second Ctrl-C they have `KILL_AFTER` seconds."""
        if self.received is not None and number == signal.SIGINT:
            self.kill_at = time.monotonic() + KILL_AFTER
        self.received = self.received or number
        self.stop_all(number)

    def stop_all(self, number: int) -> None:
        """Send all trials a signal."""
        for folder in list(self.active):
            with suppress(OSError):
                ask_to_stop(folder, number)

    def work(self, slot: int) -> None:
        """Run one trial after another in this slot of the launcher."""
        while self.received is None and (trial := self.search.next_trial()) is not None:
            state = self.released(trial)
            while not state and self.received is None:
                state = self.trained(trial, slot) or self.released(trial)
            if state:
                if state != STOPPED:
                    value = trials.final_value(trial.folder, self.metric)
                    self.search.tell(trial, state, value)
                self.show_end(trial, state)

    def released(self, trial: Trial) -> str:
        """How a trial has ended, as soon as no other sweep trains it; empty where it has not."""
        told = False
        while self.received is None and (holder := lock_holder(trial.folder)):
            if not told:
                self.lines.console.print(f"{trial}: waiting for {holder}")
            told = True
            time.sleep(POLL)
        return self.search.outcome(trial)

    def trained(self, trial: Trial, slot: int) -> str:
        """Run a trial; returns how it has ended, empty where another sweep was faster."""
        folder, pruned, error = trial.folder, False, ""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        with self.search.alone():
            trials.note(trial, RUNNING)
        self.lines.started(trial)
        words, variables = tuple(self.command(trial)), self.launcher.environment(slot)
        running = self.launcher.submit(Job(words, str(folder.resolve()), variables))
        self.active.append(folder)
        if self.received is not None:  # meanwhile
            self.stop_all(self.received)
        seen: set[int] = set()
        next_read = 0.0
        while not running.done():
            time.sleep(POLL)
            if not pruned and (began := time.monotonic()) > next_read:
                if pruned := self.is_behind(trial, seen):
                    ask_to_stop(folder, signal.SIGTERM)
                now = time.monotonic()  # metrics of long runs take a while to read
                next_read = now + max(READ_EVERY, READ_SHARE * (now - began))
        self.active.remove(folder)
        (folder / STOP).unlink(missing_ok=True)
        try:
            code = running.result()
        except Exception as cause:  # whatever the launcher raises
            code, error = -1, f"the launcher failed: {type(cause).__name__}: {cause}"
        if (folder / "summary.json").is_file():
            state = FINISHED
        elif pruned:
            state = PRUNED
        elif code in (75, 130) or self.received is not None:
            state = STOPPED
        elif code == IN_USE:
            return ""
        else:
            state, error = FAILED, error or failure_reason(folder, code)
        with self.search.alone():
            trials.note(trial, state, exit_code=code, **({"error": error} if error else {}))
        return state

    def is_behind(self, trial: Trial, seen: set[int]) -> bool:
        """Report progress, and whether the search ends a trial by new values of the metric."""
        total, values = trials.total_steps(trial.folder), trials.column(trial.folder, self.metric)
        self.lines.progressed(
            trial, trials.steps_done(trial.folder), total, values[-1][1] if values else None
        )
        new = [(step, value) for step, value in values if step not in seen]
        seen |= {step for step, _ in new}
        return any(
            self.search.wants_stop(trial, step / total, value)
            for step, value in new
            if total and step < total
        )

    def show_end(self, trial: Trial, state: str) -> None:
        """Show and keep how a trial has ended."""
        self.states[trial.overrides] = state
        self.lines.ended(trial, state, trials.final_value(trial.folder, self.metric))


def failure_reason(folder: Path, code: int) -> str:
    """The last message of a failed trial, or the signal that killed it."""
    text = ""
    with suppress(OSError), (folder / OUTPUT).open("rb") as file:
        file.seek(max(0, (folder / OUTPUT).stat().st_size - 20_000))
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
