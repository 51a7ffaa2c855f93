"""Read a run folder, also where it is incomplete: a run that is still going on, was stopped or has
damaged files.

Nothing here raises because of the content of a file: what cannot be read is left out and noted in
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

from ssl_xcit.data import bad_samples
from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_files import checkpoints_of
from ssl_xcit.models.checkpoint_manifest import read_manifest
from ssl_xcit.utils.locks import lock_holder

Curve = tuple[list[int], list[float]]  # steps and values; a value may be infinite or no number
Numbers = dict[str, dict[str, float]]  # row -> metric -> value
Intervals = dict[str, dict[str, tuple[float, float]]]
FINISHED, RUNNING, STOPPED, FAILED = "finished", "running", "stopped", "failed"
TASKS = ("classification", "segmentation", "detection")
FILES = ("config.yaml", "run.json", "metrics.csv", "summary.json", "checkpoints")


@dataclass
class RunResults:
    """Final numbers: a row for the backbone, and for each baseline."""

    source: str  # the file that they are from
    numbers: Numbers  # row -> metric -> value
    intervals: Intervals  # row -> metric -> 95 %
    content: dict[str, Any]  # all of the file

    @property
    def backbone(self) -> tuple[str, dict[str, float], dict[str, tuple[float, float]]]:
        """The row behind the baselines: its name, values and intervals."""
        row = list(self.numbers)[-1]
        return row, self.numbers[row], self.intervals.get(row, {})


@dataclass
class Run:
    """The content of a run folder."""

    path: Path  # its folder
    config: dict[str, Any] = field(default_factory=dict)  # settings as they were used, nested
    about: dict[str, Any] = field(default_factory=dict)  # `run.json`: overrides, plan, versions
    summary: dict[str, Any] = field(default_factory=dict)  # numbers of its end
    details: dict[str, Any] = field(default_factory=dict)  # of a task's measure at its end
    results: RunResults | None = None  # final numbers on the run's own data
    elsewhere: list[RunResults] = field(default_factory=list)  # those on other data
    curves: dict[str, Curve] = field(default_factory=dict)  # by column of `metrics.csv`
    bad: list[Replaced] = field(default_factory=list)  # images that could not be used
    state: str = STOPPED  # finished, running, stopped or failed
    words: str = ""  # the state in words
    problems: list[str] = field(default_factory=list)  # what is missing or damaged
    name: str = ""  # of the folder; beside a run of that name more of the path

    def __post_init__(self) -> None:
        self.name = self.name or self.path.resolve().name

    @property
    def plan(self) -> dict[str, Any]:
        """Numbers that the run derived from its settings."""
        return mapping(self.about.get("plan") or self.summary.get("plan"))

    @property
    def step(self) -> int:
        """The last that was reported or saved."""
        reported = [steps[-1] for steps, _ in self.curves.values()]
        saved = [int(path.stem.partition("-")[2]) for path in checkpoints_of(self.path)[-1:]]
        return max(reported + saved, default=0)

    @property
    def model(self) -> str:
        """The name of the model, or the option that was chosen."""
        return str(self.summary.get("model") or self.choices.get("model") or "unknown model")

    @property
    def data(self) -> str:
        """The data that it learns from."""
        chosen = str(self.choices.get("data") or self.summary.get("data") or "unknown data")
        root = self.setting("data", "root")
        return f"{chosen}, {root}" if isinstance(root, str) else chosen

    @property
    def transfer(self) -> str | None:
        """The kind of task of a run of `ssl-xcit finetune`; None of pretraining."""
        kind = self.config.get("transfer") or self.summary.get("transfer")
        return kind if kind in TASKS else None

    @property
    def command(self) -> str:
        """The command that made it."""
        return "finetune" if self.transfer or "transfer" in self.choices else "pretrain"

    @property
    def choices(self) -> dict[str, Any]:
        """Options of the config groups."""
        return mapping(self.about.get("choices"))

    @property
    def overrides(self) -> list[str]:
        """The words of its command line."""
        words = self.about.get("overrides")
        return [str(word) for word in words] if isinstance(words, list) else []

    def setting(self, group: str, key: str) -> Any:
        """A setting of a group; None where it is not known."""
        return mapping(self.config.get(group)).get(key)

    def last(self, column: str) -> float | None:
        """The last value of a curve."""
        return self.curves[column][1][-1] if self.curves.get(column, ([], []))[1] else None

    def newest_digest(self) -> str | None:
        """SHA-256 of the newest checkpoint, by its manifest; None where it is not known."""
        newest = checkpoints_of(self.path)[-1:]
        entry = read_manifest(self.path / "checkpoints").get(newest[0].name) if newest else None
        return entry.sha256 if entry else None

    def seconds(self) -> float | None:
        """Seconds spent in training, over all parts of the run: images over images per second, and
        the time of online evaluation; None where it is not known.
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
        last_part = self.summary.get("seconds")
        return max(total, float(last_part)) if is_number(last_part) else total  # type: ignore[arg-type]


def mapping(value: Any) -> dict[str, Any]:
    """A mapping of a file, empty where it is something else."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no switch."""
    return type(value) in (int, float) and math.isfinite(value)


def read_run(path: Path) -> Run:
    """Read what can be read; raises MissingPath for no folder, UserError for no run folder."""
    if not path.is_dir():
        raise MissingPath(f"run={path}: no such folder")
    if not any((path / name).exists() for name in FILES):
        raise UserError(
            f"run={path} is no run folder: none of {', '.join(FILES)} is there; name a folder that "
            "ssl-xcit pretrain or finetune has made, such as runs/photos"
        )
    run = Run(path)
    run.about = content_of(run, "run.json", "run.json is missing")
    run.summary = content_of(run, "summary.json")
    run.config = content_of(run, "config.yaml", "config.yaml is missing")
    run.details = content_of(run, "evaluation.json")
    read_metrics(run)
    read_results(run)
    with suppress(OSError):
        run.bad = bad_samples.read(path / bad_samples.FILE)
    run.state, run.words = run_state(run)
    if not checkpoints_of(path):
        run.problems.append(
            "there is no checkpoint, so nothing can be drawn of what it has learned"
        )
    return run


def tell_apart(runs: Sequence[Run]) -> None:
    """Give the runs names that no two share: as much of their paths as that takes."""
    parts, count = [run.path.resolve().parts for run in runs], 1
    while len({path[-count:] for path in parts}) < len({*parts}):
        count += 1
    for run, path in zip(runs, parts, strict=True):
        run.name = str(Path(*path[-count:]))


def text_of(run: Run, name: str, missing: str = "") -> str | None:
    """The text of a file of the folder, with a note on the problem where there is none."""
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.problems += [missing] if missing else []
    except OSError as error:
        run.problems.append(f"{name} cannot be read: {message_of(error)}")
    return None


def content_of(run: Run, name: str, missing: str = "") -> dict[str, Any]:
    """The content of a JSON or yaml file of the folder; empty where there is none."""
    text = text_of(run, name, missing)
    if text is None:
        return {}
    try:
        if name.endswith(".json"):
            content = json.loads(text)
        else:
            content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if not isinstance(content, dict):
            raise ValueError("no object")
    except Exception as error:  # yaml and OmegaConf raise a dozen types
        run.problems.append(f"{name} cannot be read: {message_of(error)}")
        return {}
    return {str(key): value for key, value in content.items()}


def message_of(error: BaseException) -> str:
    """The message of an error, or else its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def read_metrics(run: Run) -> None:
    """Read `metrics.csv` by lines, without damaged ones and a last one that is being written."""
    text = text_of(run, "metrics.csv", "metrics.csv is missing: there are no curves")
    if text is None:
        return
    lines = text.split("\n")
    columns, damaged, last = list[str](), 0, -1
    with suppress(csv.Error):
        columns = next(csv.reader(lines[:1]), [])
    if "step" not in columns:
        run.problems.append("metrics.csv has no column step: there are no curves")
        return
    for line in lines[1:-1]:  # what follows the last line's end is cut off
        try:
            row = zip(columns, line.split(","), strict=True)
            numbers = {name: float(value) for name, value in row if value}
            step = int(numbers.pop("step"))
            if step < last:
                raise ValueError("steps go back")
        except (ValueError, KeyError, OverflowError):
            damaged += 1
            continue
        last = step
        for name, value in numbers.items():
            steps, values = run.curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    if damaged:
        lines_are = "line is" if damaged == 1 else "lines are"
        run.problems.append(f"metrics.csv: {damaged} {lines_are} damaged and left out")
    if not run.curves:
        run.problems.append("metrics.csv holds no numbers yet")


def read_results(run: Run) -> None:
    """Read the numbers of `results.json` if they are of the newest weights, those of `summary.json`
    that the former lacks, and those on other data.
    """
    own = as_results("results.json", content_of(run, "results.json"), run)
    end = as_results("summary.json", run.summary, run)
    if own is not None and (other := of_other_weights(run, own)):
        run.problems.append(f"results.json is of other weights than the newest: {other}")
        own = None if end is not None else own
    run.results = merged(own, end) if own is not None and end is not None else own or end
    for file in sorted(run.path.glob("results-*.json")):
        if results := as_results(file.name, content_of(run, file.name), run):
            run.elsewhere.append(results)


def merged(own: RunResults, end: RunResults) -> RunResults:
    """All numbers of `own`, and those of `end` that it has not measured."""
    numbers, intervals, more = Numbers(), Intervals(), False
    for row in dict.fromkeys([*end.numbers, *own.numbers]):
        new, old = own.numbers.get(row, {}), end.numbers.get(row, {})
        numbers[row] = old | new
        known = end.intervals.get(row, {})  # of a number measured again only its own interval
        kept = {metric: interval for metric, interval in known.items() if metric not in new}
        intervals[row] = kept | own.intervals.get(row, {})
        more |= not old.keys() <= new.keys()
    source = f"{own.source} and {end.source}" if more else own.source
    return RunResults(source, numbers, intervals, end.content | own.content)


def as_results(source: str, content: Mapping[str, Any], run: Run) -> RunResults | None:
    """The numbers that have the right form; None where there are none."""
    rows, known = mapping(content.get("results")), mapping(content.get("intervals"))
    numbers = {
        row: {str(m): float(v) for m, v in mapping(values).items() if is_number(v)}
        for row, values in rows.items()
    }
    numbers = {row: values for row, values in numbers.items() if values}
    if not numbers:
        if content.get("results"):
            run.problems.append(f"{source}: results are no numbers by row and metric")
        return None
    intervals = {
        row: {
            str(m): (float(v[0]), float(v[1]))
            for m, v in mapping(values).items()
            if isinstance(v, list) and len(v) == 2 and all(map(is_number, v))
        }
        for row, values in known.items()
    }
    return RunResults(source, numbers, intervals, dict(content))


def of_other_weights(run: Run, results: RunResults) -> str:
    """The results' weights, if by the manifest not the newest checkpoint's teacher; or nothing."""
    if results.content.get("which") == "student":
        return "the student"
    newest, digest = run.newest_digest(), results.content.get("weights_sha256")
    if newest is None or not isinstance(digest, str) or digest == newest:
        return ""
    return str(results.content.get("weights"))


def run_state(run: Run) -> tuple[str, str]:
    """The state of a run, and the words for it."""
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
