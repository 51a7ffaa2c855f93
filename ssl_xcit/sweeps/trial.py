"""A trial, a run of a sweep: its state, progress and result, which are read from its run folder."""

import csv
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_xcit.utils.files import read_json, write_json

FILE = "trial.json"
SWEEP_FILE = "sweep.json"
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
PRUNED, FAILED, STOPPED = "pruned", "failed", "stopped"
STATES = (FINISHED, PRUNED, FAILED, STOPPED, RUNNING, WAITING)


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Args:
        number: of Optuna's trial.
        overrides: of the settings that the sweep varies.
        folder: of its run.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return " ".join(self.overrides) or "the default settings"


def read(folder: Path) -> dict[str, Any]:
    """The content of `trial.json`; empty where there is none, or one cut short."""
    return read_json(folder / FILE)


def state_of(folder: Path) -> str:
    """The state of a trial, one of `STATES`."""
    if (folder / "summary.json").is_file():
        return FINISHED
    return str(read(folder).get("state", WAITING))


def note(trial: Trial, state: str, **more: Any) -> None:
    """Write `trial.json` with a new state; earlier starts are kept."""
    before = read(trial.folder)
    now = round(time.time(), 1)
    starts = list(before.get("starts", []))
    if state == RUNNING:
        starts.append({"at": now})
    elif starts and "seconds" not in starts[-1]:
        starts[-1]["seconds"] = round(now - starts[-1]["at"], 1)
    about = {"number": trial.number, "overrides": list(trial.overrides), "state": state}
    write_json({**about, **more, "starts": starts}, trial.folder / FILE)


def total_steps(folder: Path) -> int | None:
    """Steps of the whole run; None before it has begun."""
    total = read_json(folder / "run.json").get("plan", {}).get("total_steps")
    return total if isinstance(total, int) and total > 0 else None


def column(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and finite values of a column of `metrics.csv`."""
    points = []
    with suppress(OSError, csv.Error), (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):  # an empty cell, or a row cut short
                step, value = int(float(row["step"])), float(row[name])
                if math.isfinite(value):
                    points.append((step, value))
    return points


def steps_done(folder: Path) -> int:
    """Steps that a run has taken, by its metrics."""
    rows = column(folder, "loss")
    return rows[-1][0] if rows else 0


def final_value(folder: Path, metric: str) -> float | None:
    """The metric in the final evaluation, or else its last value in `metrics.csv`."""
    results = read_json(folder / "summary.json").get("results", {})
    value = last_results(results).get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    rows = column(folder, metric)
    return rows[-1][1] if rows else None


def last_results(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Results of the pretrained network, which stand behind those of baselines."""
    return results[list(results)[-1]] if results else {}
