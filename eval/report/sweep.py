"""What a sweep has come to: its trials from the best to the worst, and the command of the best."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_xcit.errors import MissingPath
from ssl_xcit.locks import lock_holder
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.command import FILE
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, RUNNING, STATES, STOPPED

WORDS = {PRUNED: "ended early"}


@dataclass(frozen=True)
class Ranked:
    """A trial.

    Args:
        name: of its folder.
        values: of what is varied, by key.
        state: of `trial.STATES`.
        value: of the metric, at the end or as far as it came; None: not measured.
        interval: 95 %, where there is one.
        steps: that it took.
        total: of the whole run; None: it has not begun.
        seconds: of all its starts.
        error: why it failed.
        curve: (step, value) of the metric over training.
    """

    name: str
    values: dict[str, str]
    state: str
    value: float | None
    interval: tuple[float, float] | None
    steps: int
    total: int | None
    seconds: float
    error: str
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """A folder of trials.

    Args:
        path: the folder.
        about: its `sweep.json`.
        trials: the best first, of equals the one with the first name; then those without a value.
    """

    path: Path
    about: dict[str, Any]
    trials: Sequence[Ranked]

    @property
    def metric(self) -> str:
        """By which trials are ranked."""
        return str(self.about.get("metric", "knn_k20"))

    @property
    def keys(self) -> list[str]:
        """What is varied."""
        return list(dict.fromkeys(key for one in self.trials for key in one.values))

    @property
    def finished(self) -> list[Ranked]:
        """Those that were measured at their end."""
        return [one for one in self.trials if one.state == FINISHED and one.value is not None]

    def count(self, state: str) -> int:
        """Of trials."""
        return sum(one.state == state for one in self.trials)

    def in_words(self) -> str:
        """`5 finished, 1 failed`."""
        told = [f"{self.count(s)} {WORDS.get(s, s)}" for s in STATES if self.count(s)]
        return ", ".join(told)

    def command(self, one: Ranked) -> str:
        """To run a trial's settings once more, into a folder of its own."""
        fixed = [w for w in self.about.get("all_fixed", []) if not w.startswith(("name=", "out="))]
        values = [f"{key}={value}" for key, value in one.values.items()]
        return shlex.join(["ssl-xcit", str(self.about.get("of", "pretrain")), *fixed, *values])


def read_sweep(path: Path, metric: str | None = None) -> Sweep:
    """As its files tell now; it may be running.

    Args:
        path: the folder.
        metric: to rank by; None: the sweep's own.

    Raises:
        MissingPath: it is no folder of a sweep.
    """
    about = trials.read_json(path / FILE)
    if not about:
        near = (
            sorted(p.parent for p in path.parent.glob(f"*/{FILE}")) if path.parent.is_dir() else []
        )
        hint = f"; there is {near[0]}" if near else ""
        raise MissingPath(f"{path}: no folder of a sweep (no {FILE} in it){hint}")
    if metric is not None:
        about["metric"] = metric
    name, sign = str(about.get("metric", "knn_k20")), -1 if about.get("maximize", True) else 1
    folders = sorted(p for p in path.iterdir() if (p / trials.FILE).is_file())
    found = [read_trial(folder, name) for folder in folders]

    def place(one: Ranked) -> tuple[bool, bool, float]:
        value = one.value
        return value is None, one.state != FINISHED, 0.0 if value is None else sign * value

    return Sweep(path, about, sorted(found, key=place))


def read_trial(folder: Path, metric: str) -> Ranked:
    """One of them."""
    content, state = trials.read(folder), trials.state_of(folder)
    if state == RUNNING and not lock_holder(folder) and not is_new(content):
        state = STOPPED
    intervals = trials.read_json(folder / "summary.json").get("intervals", {})
    interval = trials.last_results(intervals).get(metric)
    overrides = [str(w).partition("=") for w in content.get("overrides", [])]
    return Ranked(
        folder.name,
        {key: value for key, _, value in overrides},
        state,
        trials.final_value(folder, metric),
        (float(interval[0]), float(interval[1])) if interval else None,
        trials.steps_done(folder),
        trials.total_steps(folder),
        sum(float(start.get("seconds", 0.0)) for start in content.get("starts", [])),
        str(content.get("error", "")) if state == FAILED else "",
        trials.column(folder, metric),
    )


def is_new(content: dict[str, Any]) -> bool:
    """Whether it was started so lately that it may not hold its lock yet."""
    starts = content.get("starts", [])
    return bool(starts) and "seconds" not in starts[-1] and time.time() - starts[-1]["at"] < 60
