"""Read a sweep: its trials from the best to the worst, and the command of each."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_xcit.errors import MissingPath
from ssl_xcit.sweeps import trial as trial_files
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, RUNNING, STATES, STOPPED
from ssl_xcit.utils.files import read_json
from ssl_xcit.utils.locks import lock_holder

WORDS = {PRUNED: "ended early"}


@dataclass(frozen=True)
class RankedTrial:
    """A trial of a sweep."""

    name: str  # of its folder
    values: dict[str, str]  # of what is varied, by key
    state: str  # of `trial.STATES`
    value: float | None  # of the metric, at the end or as far as it came; None: not measured
    interval: tuple[float, float] | None  # 95 %, where there is one
    steps: int  # that it took
    total: int | None  # steps of the whole run; None: it has not begun
    seconds: float  # of all its starts
    error: str  # why it failed
    curve: list[tuple[int, float]] = field(default_factory=list)  # of the metric over training


@dataclass(frozen=True)
class SweepResults:
    """A folder of trials."""

    path: Path  # the folder
    about: dict[str, Any]  # its `sweep.json`
    trials: Sequence[RankedTrial]  # the best first, those without a value last

    @property
    def metric(self) -> str:
        """The metric by which trials are ranked."""
        return str(self.about.get("metric", "knn_k20"))

    @property
    def keys(self) -> list[str]:
        """Settings that are varied."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.values))

    @property
    def finished(self) -> list[RankedTrial]:
        """Trials that were measured at their end."""
        return [t for t in self.trials if t.state == FINISHED and t.value is not None]

    def count(self, state: str) -> int:
        """Number of trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    def in_words(self) -> str:
        """`5 finished, 1 failed`."""
        counts = [f"{self.count(s)} {WORDS.get(s, s)}" for s in STATES if self.count(s)]
        return ", ".join(counts)

    def command(self, trial: RankedTrial) -> str:
        """The command that runs a trial's settings once more, into a folder of its own."""
        fixed = [w for w in self.about.get("all_fixed", []) if not w.startswith(("name=", "out="))]
        values = [f"{key}={value}" for key, value in trial.values.items()]
        return shlex.join(["ssl-xcit", str(self.about.get("of", "pretrain")), *fixed, *values])


def read_sweep(path: Path, metric: str | None = None) -> SweepResults:
    """Read a sweep as its files are now, ranked by a metric or its own; it may be running. Raises
    MissingPath where it is no folder of a sweep.
    """
    about = read_json(path / trial_files.SWEEP_FILE)
    if not about:
        near = sorted(p.parent for p in path.parent.glob(f"*/{trial_files.SWEEP_FILE}"))
        hint = f"; there is {near[0]}" if near else ""
        raise MissingPath(f"{path}: no folder of a sweep (no {trial_files.SWEEP_FILE} in it){hint}")
    if metric is not None:
        about["metric"] = metric
    name, sign = str(about.get("metric", "knn_k20")), -1 if about.get("maximize", True) else 1
    folders = sorted(p for p in path.iterdir() if (p / trial_files.FILE).is_file())
    trials = [read_trial(folder, name) for folder in folders]

    def place(trial: RankedTrial) -> tuple[bool, bool, float]:
        value = trial.value
        return value is None, trial.state != FINISHED, 0.0 if value is None else sign * value

    return SweepResults(path, about, sorted(trials, key=place))


def read_trial(folder: Path, metric: str) -> RankedTrial:
    """Read a trial."""
    content, state = trial_files.read(folder), trial_files.state_of(folder)
    if state == RUNNING and not lock_holder(folder) and not is_new(content):
        state = STOPPED
    intervals = read_json(folder / "summary.json").get("intervals", {})
    interval = trial_files.last_results(intervals).get(metric)
    overrides = [str(w).partition("=") for w in content.get("overrides", [])]
    return RankedTrial(
        folder.name,
        {key: value for key, _, value in overrides},
        state,
        trial_files.final_value(folder, metric),
        (float(interval[0]), float(interval[1])) if interval else None,
        trial_files.steps_done(folder),
        trial_files.total_steps(folder),
        sum(float(start.get("seconds", 0.0)) for start in content.get("starts", [])),
        str(content.get("error", "")) if state == FAILED else "",
        trial_files.column(folder, metric),
    )


def is_new(content: dict[str, Any]) -> bool:
    """Whether it was started so lately that it may not hold its lock yet."""
    starts = content.get("starts", [])
    return bool(starts) and "seconds" not in starts[-1] and time.time() - starts[-1]["at"] < 60
