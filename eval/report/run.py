"""What a run folder tells, also where it is incomplete: a run that is still going on, was stopped
or has damaged files.

Nothing here raises because of what a file holds: what cannot be read is left out and said in
`Run.problems`.
"""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ssl_xcit.data import bad
from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.locks import lock_holder
from ssl_xcit.models.manifest import read_manifest
from ssl_xcit.models.weights import checkpoints_of

Curve = tuple[list[int], list[float]]  # steps and values; a value may be infinite or no number
Numbers = dict[str, dict[str, float]]  # row -> metric -> value
Intervals = dict[str, dict[str, tuple[float, float]]]
FINISHED, RUNNING, STOPPED, FAILED = "finished", "running", "stopped", "failed"
FILES = ("config.yaml", "run.json", "metrics.csv", "summary.json", "checkpoints")


@dataclass
class Results:
    """Final numbers: a row for the backbone, and for each baseline.

    Args:
        source: the file that they are from.
        numbers: row -> metric -> value.
        intervals: row -> metric -> 95 %.
        content: all of the file.
    """

    source: str
    numbers: Numbers
    intervals: Intervals
    content: dict[str, Any]


@dataclass
class Run:
    """What is known of a run.

    Args:
        path: its folder.
        config: settings as they were used, nested.
        about: `run.json`: overrides, choices, plan, versions.
        summary: what the run said at its end.
        results: final numbers on the run's own data.
        elsewhere: those on other data.
        curves: by column of `metrics.csv`.
        bad: images that could not be used.
        state: finished, running, stopped or failed.
        words: the state in words.
        problems: what is missing or damaged.
        name: of the folder; beside a run of that name more of the path.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    results: Results | None = None
    elsewhere: list[Results] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    bad: list[Replaced] = field(default_factory=list)
    state: str = STOPPED
    words: str = ""
    problems: list[str] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.path.resolve().name

    @property
    def plan(self) -> dict[str, Any]:
        """Numbers that the run derived from its settings."""
        found = self.about.get("plan") or self.summary.get("plan")
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """The last that is known of: by a report, or saved."""
        found = [steps[-1] for steps, _ in self.curves.values() if steps]
        saved = [int(path.stem.partition("-")[2]) for path in checkpoints_of(self.path)[-1:]]
        return max(found + saved, default=0)

    @property
    def model(self) -> str:
        """As the run calls it, or the choice that was made."""
        return str(self.summary.get("model") or self.choices.get("model") or "unknown model")

    @property
    def data(self) -> str:
        """What it learns from."""
        chosen = str(self.choices.get("data") or self.summary.get("data") or "unknown data")
        settings = self.config.get("data")
        root = settings.get("root") if isinstance(settings, dict) else None
        return f"{chosen}, {root}" if isinstance(root, str) else chosen

    @property
    def choices(self) -> dict[str, Any]:
        """Options of the config groups."""
        found = self.about.get("choices")
        return found if isinstance(found, dict) else {}

    @property
    def overrides(self) -> list[str]:
        """As they were typed."""
        found = self.about.get("overrides")
        return [str(word) for word in found] if isinstance(found, list) else []

    def last(self, column: str) -> float | None:
        """The last value of a curve."""
        return self.curves[column][1][-1] if self.curves.get(column, ([], []))[1] else None

    def seconds(self) -> float | None:
        """Spent in training, over all parts of the run: images seen over images per second, and
        what online evaluation took; None where it is not known.
        """
        rates = dict(zip(*self.curves.get("images_per_second", ([], [])), strict=True))
        epochs = dict(zip(*self.curves.get("epoch", ([], [])), strict=True))
        images, total, before = self.plan.get("num_images"), 0.0, 0.0
        if not isinstance(images, int) or not rates:
            return None
        for step, rate in rates.items():
            if step in epochs and rate > 0:
                total += max(0.0, epochs[step] - before) * images / rate
                before = epochs[step]
        total += sum(self.curves.get("online_seconds", ([], []))[1])
        said = self.summary.get("seconds")  # of the last part only
        return max(total, float(said)) if is_number(said) else total  # type: ignore[arg-type]


def is_number(value: Any) -> bool:
    """Finite, and no switch."""
    return type(value) in (int, float) and math.isfinite(value)


def read_run(path: Path) -> Run:
    """Everything that can be read.

    Raises:
        MissingPath: no such folder.
        UserError: it is no run folder.
    """
    if not path.is_dir():
        raise MissingPath(f"run={path}: no such folder")
    if not any((path / name).exists() for name in FILES):
        raise UserError(
            f"run={path} is no run folder: none of {', '.join(FILES)} is there; name a folder that "
            "ssl-xcit pretrain has made, such as runs/photos"
        )
    run = Run(path)
    run.about = content_of(run, "run.json", needed=True)
    run.summary = content_of(run, "summary.json")
    run.config = settings_of(run)
    read_metrics(run)
    read_results(run)
    with suppress(OSError):
        run.bad = bad.read(path / bad.FILE)
    run.state, run.words = state_of(run)
    if not checkpoints_of(path):
        run.problems.append(
            "there is no checkpoint, so nothing can be drawn of what it has learned"
        )
    return run


def tell_apart(runs: Sequence[Run]) -> None:
    """Names that no two runs share: as much of their paths as that takes."""
    parts, count = [run.path.resolve().parts for run in runs], 1
    while len({each[-count:] for each in parts}) < len({*parts}):
        count += 1
    for run, each in zip(runs, parts, strict=True):
        run.name = str(Path(*each[-count:]))


def content_of(run: Run, name: str, needed: bool = False) -> dict[str, Any]:
    """A JSON file of the folder; empty where there is none."""
    try:
        content = json.loads((run.path / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        if needed:
            run.problems.append(f"{name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{name} cannot be read: {error}")
        return {}
    return content


def settings_of(run: Run) -> dict[str, Any]:
    """`config.yaml`."""
    path = run.path / "config.yaml"
    if not path.is_file():
        run.problems.append("config.yaml is missing")
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(content, dict):
            raise ValueError("no settings")
    except Exception as error:  # yaml and OmegaConf raise a dozen types
        run.problems.append(f"config.yaml cannot be read: {one_line(error)}")
        return {}
    return {str(key): value for key, value in content.items()}


def one_line(error: BaseException) -> str:
    """What an error says, or else its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def read_metrics(run: Run) -> None:
    """`metrics.csv` line by line: one that is damaged is left out, and so is a last one that is
    being written.
    """
    try:
        text = (run.path / "metrics.csv").read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        run.problems.append("metrics.csv is missing: there are no curves")
        return
    except OSError as error:
        run.problems.append(f"metrics.csv cannot be read: {one_line(error)}")
        return
    lines = text.split("\n")
    columns, damaged, last = cells_of(lines[0]), 0, -1
    if "step" not in columns:
        run.problems.append("metrics.csv has no column step: there are no curves")
        return
    for line in lines[1:-1]:  # what follows the last line's end is cut off
        row = cells_of(line)
        try:
            found = {k: float(v) for k, v in zip(columns, row, strict=True) if v != ""}
            step = int(found.pop("step"))
            if step < last:
                raise ValueError("steps go back")
        except (ValueError, KeyError, OverflowError):
            damaged += 1
            continue
        last = step
        for name, value in found.items():
            steps, values = run.curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    if damaged:
        lines_are = "line is" if damaged == 1 else "lines are"
        run.problems.append(f"metrics.csv: {damaged} {lines_are} damaged and left out")
    if not run.curves:
        run.problems.append("metrics.csv holds no numbers yet")


def cells_of(line: str) -> list[str]:
    """Of a line; none where it cannot be parsed."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def read_results(run: Run) -> None:
    """Numbers of `results.json` if those are of the newest weights, and of `summary.json` what the
    former lacks; beside them those on other data.
    """
    own = as_results("results.json", content_of(run, "results.json"), run)
    end = as_results("summary.json", run.summary, run)
    if own is not None and (other := of_other_weights(run, own)):
        run.problems.append(f"results.json is of other weights than the newest: {other}")
        own = None if end is not None else own
    run.results = joined(own, end) if own is not None and end is not None else own or end
    for file in sorted(run.path.glob("results-*.json")):
        if found := as_results(file.name, content_of(run, file.name), run):
            run.elsewhere.append(found)


def joined(own: Results, end: Results) -> Results:
    """All numbers of `own`, and those of `end` that it has not measured."""
    numbers, intervals = dict[str, dict[str, float]](), dict[str, dict[str, tuple[float, float]]]()
    for row in [*end.numbers, *(row for row in own.numbers if row not in end.numbers)]:
        numbers[row] = end.numbers.get(row, {}) | own.numbers.get(row, {})
        known = end.intervals.get(row, {})  # of a number measured again only its own interval
        kept = {m: v for m, v in known.items() if m not in own.numbers.get(row, {})}
        intervals[row] = kept | own.intervals.get(row, {})
    more = any(set(end.numbers[row]) - set(own.numbers.get(row, {})) for row in end.numbers)
    source = f"{own.source} and {end.source}" if more else own.source
    return Results(source, numbers, intervals, end.content | own.content)


def as_results(source: str, content: Mapping[str, Any], run: Run) -> Results | None:
    """What is there in the right form; None where there is nothing."""
    rows = content.get("results")
    numbers = {
        str(row): {str(m): float(v) for m, v in values.items() if is_number(v)}
        for row, values in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(values, dict)
    }
    numbers = {row: values for row, values in numbers.items() if values}
    if not numbers:
        if rows:
            run.problems.append(f"{source}: results are no numbers by row and metric")
        return None
    known = content.get("intervals")
    intervals: Intervals = {}
    for row, values in known.items() if isinstance(known, dict) else ():
        if isinstance(values, dict):
            pairs = {m: v for m, v in values.items() if isinstance(v, list) and len(v) == 2}
            intervals[str(row)] = {
                str(m): (float(v[0]), float(v[1]))
                for m, v in pairs.items()
                if all(map(is_number, v))
            }
    return Results(source, numbers, intervals, dict(content))


def of_other_weights(run: Run, found: Results) -> str:
    """Which, where the manifest says that they are not the newest checkpoint's teacher; else
    nothing.
    """
    if found.content.get("which") == "student":
        return "the student"
    newest = checkpoints_of(run.path)
    entry = read_manifest(run.path / "checkpoints").get(newest[-1].name) if newest else None
    digest = found.content.get("weights_sha256")
    if entry is None or not isinstance(digest, str) or digest == entry.sha256:
        return ""
    return str(found.content.get("weights"))


def state_of(run: Run) -> tuple[str, str]:
    """Finished, running, stopped or failed, and the words for it."""
    total = run.plan.get("total_steps")
    where = f"step {run.step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    if run.summary:  # first: this process may hold the lock of a run that it has just finished
        return FINISHED, "finished"
    if holder := lock_holder(run.path):
        return RUNNING, f"still running, at {where}; {holder}"
    tried = [
        int(m[1])
        for f in run.path.glob("nonfinite-step-*-rank*.json")
        if (m := re.search(r"step-(\d+)", f.name))
    ]
    if tried and max(tried) >= run.step:
        return FAILED, f"failed at {where}: loss or gradient was not finite"
    if isinstance(total, int) and run.step >= total:
        return STOPPED, "trained to the last step, but not evaluated: the same command does that"
    return STOPPED, f"stopped at {where}; the same command goes on"
