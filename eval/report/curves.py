"""Data of the figures that plotly draws: curves over steps, in groups, and final numbers with their
intervals. The page's script makes the figures, so that they follow its colours.

A run of a million steps has more rows than a screen has pixels: of long curves the smallest and the
largest value of each stretch are kept, so no peak is lost.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_xcit.utils.tables import metrics_of, title_of

from ..statistics import wilson
from .run_reader import Curve, Run, RunResults

MAX_POINTS = 1500  # of one curve
SHARES = re.compile(r"(student_)?knn_k\d+(_t[\d.]+)?")  # of correct answers, in percent
ONLINE = "Online evaluation"
HIDDEN = ("epoch", "healthy", "online_seconds")


class Plot(NamedTuple):
    """One figure."""

    title: str  # its heading
    columns: Mapping[str, str]  # of `metrics.csv`, with their labels
    log: bool = False  # a logarithmic axis
    unit: str = ""  # behind the title; `%` are shares 0..1 shown in percent
    smooth: bool = False  # a line of local means lies over the values
    about: str = ""  # what it means, in a line


GRADIENTS = ("stem", "blocks_first", "blocks_middle", "blocks_last", "class_attention", "head",
             "prototypes")  # fmt: skip
GROUPS: Mapping[str, Sequence[Plot]] = {
    "Learning": (
        Plot("Loss", {"loss": "loss"}, smooth=True, about="of the steps that are reported"),
        Plot(ONLINE, {}, unit="% right"),
    ),
    "Teacher and features": (
        Plot("Teacher entropy", {"teacher_entropy_share": "of ln K"}, unit="%",
             about="100 %: uniform, 0 %: one prototype each"),
        Plot("Rank of the features", {"rankme": "RankMe"}, about="dimensions in use"),
        Plot("Deviation of the features", {"feature_std": "deviation"},
             about="1: all directions, 0: all images alike"),
        Plot("Prototypes", {"prototypes_effective": "equally frequent ones that tell as much"},
             log=True),
        Plot("Length of the center", {"center_norm": "center"}),
    ),
    "Optimisation": (
        Plot("Learning rate", {"lr": "lr"}),
        Plot("Weight decay", {"weight_decay": "weight decay"}),
        Plot("Teacher's EMA", {"ema": "EMA"}),
        Plot("Teacher's temperature", {"teacher_temp": "temperature"}),
        Plot("Gradient norm", {"grad_norm": "all, before clipping"}, log=True, smooth=True),
        Plot("Gradient norm by part", {f"grad_norm_{g}": g.replace("_", " ") for g in GRADIENTS},
             log=True),
    ),
    "Speed and trouble": (
        Plot("Throughput", {"images_per_second": "images/s"}, unit="images/s"),
        Plot("Waiting for data", {"data_wait": "share of the time"}, unit="%"),
        Plot("Online evaluation's share of the time", {"online_share": "share"}, unit="%"),
        Plot("Bad images", {"bad_images": "bad images"}),
        Plot("Steps left out", {"skipped_steps": "not finite"}),
    ),
}  # fmt: skip
EXPECTED_ZERO = ("bad_images", "skipped_steps")


def decimated(curve: Curve, most: int) -> Curve:
    """At most so many points: the smallest and the largest of each stretch, in their order, and the
    last one.
    """
    steps, values = curve
    if len(values) <= most:
        return curve
    array = np.asarray(values, dtype=np.float64)
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), max(1, most // 2 - 1)):
        good = part[np.isfinite(array[part])]
        if len(good):
            kept |= {int(good[array[good].argmin()]), int(good[array[good].argmax()])}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def rounded(value: float) -> float | None:
    """Seven digits, more than a screen shows; None, a gap, for what is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def series(run: int, name: str, curve: Curve, scale: float, images: int | None) -> dict[str, Any]:
    """One line of a figure.

    Args:
        run: number of the run.
        name: label.
        curve: its points.
        scale: of the values.
        images: whose share the values are, in percent; None: the values are no shares.
    """
    steps, values = curve
    line: dict[str, Any] = {
        "run": run,
        "name": name,
        "x": steps,
        "y": [rounded(scale * value) for value in values],
    }
    if images:
        bounds = [
            wilson(round(value / 100 * images), images) if 0 <= value <= 100 else (value, value)
            for value in values
        ]
        line["low"] = [rounded(low) for low, _ in bounds]
        line["high"] = [rounded(high) for _, high in bounds]
    return line


def unhealthy_stretches(run: Run, number: int) -> list[dict[str, Any]]:
    """Steps at which a run was not healthy, from one report to the next."""
    steps, healthy = run.curves.get("healthy", ([], []))
    stretches: list[dict[str, Any]] = []
    sick = False
    for place, (step, value) in enumerate(zip(steps, healthy, strict=True)):
        if value == 0.0:
            end = steps[min(place + 1, len(steps) - 1)]
            if sick:
                stretches[-1]["to"] = end
            else:
                stretches.append({"run": number, "from": step, "to": end})
        sick = value == 0.0
    return stretches


def step_marks(run: Run, title: str) -> list[dict[str, Any]]:
    """Steps at which something changes that a curve shows."""
    known = {
        "Learning rate": ("warmup_steps", "warm-up ends"),
        "Loss": ("freeze_steps", "prototypes begin to learn"),
    }
    key, words = known.get(title, ("", ""))
    marks = [(run.plan.get(key), words)]
    if title == "Loss":
        resumed = run.about.get("resumed")
        marks += [(step, "went on") for step in resumed] if isinstance(resumed, list) else []
    return [{"step": s, "words": w} for s, w in marks if type(s) is int and s > 0]


def columns_of(plot: Plot, runs: Sequence[Run]) -> dict[str, str]:
    """Columns that some run has; of online evaluation all of them."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    if plot.title == ONLINE:
        return {name: label_of(name) for name in names if SHARES.fullmatch(name)}
    return {name: label for name, label in plot.columns.items() if name in names}


def label_of(name: str) -> str:
    """`student_knn_k20` is the student's k-NN 20."""
    inner = name.removeprefix("student_")
    return title_of(inner).strip() + (", student" if inner != name else "")


def is_informative(columns: Mapping[str, str], runs: Sequence[Run]) -> bool:
    """Whether there is anything to see: no curve of zeros where zeros are expected."""
    values = [v for run in runs for name in columns for v in run.curves.get(name, ([], []))[1]]
    return bool(columns) and (any(values) or not columns.keys() <= set(EXPECTED_ZERO))


def figure_groups(runs: Sequence[Run], images: Sequence[int | None]) -> list[dict[str, Any]]:
    """Figures by group, for the page.

    Args:
        runs: one, or several laid over each other.
        images: how many of online evaluation's test images each run has; None: not known.
    """
    most = max(200, MAX_POINTS // len(runs))
    known = {name for plots in GROUPS.values() for plot in plots for name in plot.columns}
    names = dict.fromkeys(name for run in runs for name in run.curves)
    other = [n for n in names if n not in known and n not in HIDDEN and not SHARES.fullmatch(n)]
    others = tuple(
        Plot(label_of(name) if name.startswith(("knn", "student")) else name.replace("_", " "),
             {name: name.replace("_", " ")})
        for name in other
        if name not in ("teacher_entropy", "prototypes_used")  # the same by another measure
    )  # fmt: skip
    groups = []
    for title, plots in {**GROUPS, "More": others}.items():
        figures = [figure(plot, runs, images, most) for plot in plots]
        if drawn := [one for one in figures if one is not None]:
            groups.append({"title": title, "plots": drawn})
    return groups


def figure(
    plot: Plot, runs: Sequence[Run], images: Sequence[int | None], most: int
) -> dict[str, Any] | None:
    """One figure as data; None where there is nothing to show."""
    columns = columns_of(plot, runs)
    if not is_informative(columns, runs):
        return None
    scale = 100.0 if plot.unit == "%" else 1.0
    lines = []
    for number, run in enumerate(runs):
        for column, label in columns.items():
            if column in run.curves:
                count = images[number] if SHARES.fullmatch(column) else None
                line = series(number, label, decimated(run.curves[column], most), scale, count)
                lines.append({**line, "column": column})
    about = plot.about
    if plot.title == ONLINE:
        bounded = any("low" in line for line in lines)
        about = "shaded: 95 % (Wilson)" if bounded else "how many images it tests on is not known"
    return {
        "title": plot.title,
        "unit": plot.unit,
        "log": plot.log,
        "smooth": plot.smooth,
        "about": about,
        "lines": lines,
        "marks": step_marks(runs[0], plot.title) if len(runs) == 1 else [],
        "sick": [s for number, run in enumerate(runs) for s in unhealthy_stretches(run, number)],
    }


def final_numbers(named: Sequence[tuple[str, RunResults]]) -> dict[str, Any]:
    """Points with intervals, a row a metric, of everything in percent, of results by name."""
    rows = []
    several = len(named) > 1
    for number, (name, results) in enumerate(named):
        for row, values in results.numbers.items():
            main = row == results.backbone[0]
            if several and not main:
                continue
            known = results.intervals.get(row, {})
            metrics = [m for m in metrics_of({row: values}) if is_percent(m)]
            rows.append(
                {
                    "name": name if several else row,
                    "run": number,
                    "main": main,
                    "metrics": [title_of(m).strip() for m in metrics],
                    "values": [rounded(values[m]) for m in metrics],
                    "low": [rounded(known[m][0]) if m in known else None for m in metrics],
                    "high": [rounded(known[m][1]) if m in known else None for m in metrics],
                }
            )
    return {"rows": rows}


def is_percent(metric: str) -> bool:
    """Whether a metric is in percent: no learning rate, no penalty, no error in its own unit."""
    return not metric.endswith(("_lr", "_l2")) and metric not in ("mae",)
