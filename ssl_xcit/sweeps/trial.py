"""A trial: a run of a sweep, what became of it, and how far it has come. All of it lies in its run
folder, so that the sweep itself remembers nothing.
"""

import csv
import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_xcit.files import write_json

FILE = "trial.json"
OUTPUT = "output.txt"
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
PRUNED, FAILED, STOPPED = "pruned", "failed", "stopped"
STATES = (FINISHED, PRUNED, FAILED, STOPPED, RUNNING, WAITING)


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Args:
        number: from 0, in the order that they were made.
        overrides: what sets it apart from the others.
        folder: of its run.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return " ".join(self.overrides) or "the settings as they are"


def read(folder: Path) -> dict[str, Any]:
    """`trial.json`; nothing where there is none, or one cut short."""
    return read_json(folder / FILE)


def read_json(path: Path) -> dict[str, Any]:
    """A file's dictionary, or an empty one."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def state_of(folder: Path) -> str:
    """What became of it, as its folder tells."""
    if (folder / "summary.json").is_file():
        return FINISHED
    return str(read(folder).get("state", WAITING))


def note(trial: Trial, state: str, **more: Any) -> None:
    """Write what is known of it now; earlier starts stay."""
    before = read(trial.folder)
    now = round(time.time(), 1)
    starts = list(before.get("starts", []))
    if state == RUNNING:
        starts.append({"at": now})
    elif starts and "seconds" not in starts[-1]:
        starts[-1]["seconds"] = round(now - starts[-1]["at"], 1)
    content = {
        "number": trial.number,
        "overrides": list(trial.overrides),
        "state": state,
        **more,
        "starts": starts,
    }
    write_json(content, trial.folder / FILE)


def total_steps(folder: Path) -> int | None:
    """Of the whole run, once it has begun."""
    total = read_json(folder / "run.json").get("plan", {}).get("total_steps")
    return total if isinstance(total, int) and total > 0 else None


def column(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a column of `metrics.csv`."""
    found = []
    with suppress(OSError, csv.Error), (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):  # an empty cell, or a row cut short
                step, value = int(float(row["step"])), float(row[name])
                if math.isfinite(value):
                    found.append((step, value))
    return found


def steps_done(folder: Path) -> int:
    """As far as the metrics go."""
    rows = column(folder, "loss")
    return rows[-1][0] if rows else 0


def final_value(folder: Path, metric: str) -> float | None:
    """Of the final evaluation; where that does not have it, the last in `metrics.csv`."""
    results = read_json(folder / "summary.json").get("results", {})
    value = last_results(results).get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    rows = column(folder, metric)
    return rows[-1][1] if rows else None


def last_results(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pretrained network's: baselines stand before it."""
    return results[list(results)[-1]] if results else {}
