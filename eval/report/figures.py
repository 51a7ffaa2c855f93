"""Figures for plotly, as plain data: curves over steps, final numbers with their intervals, entropy
of channel attention, and those of a sweep.

The page's style colours words and grids; colours of curves are seen on light and on dark ground.
A run of a million steps has more rows than a screen has pixels: of long curves the smallest and the
largest value of each stretch are kept, so no peak is lost.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from plotly.colors import sample_colorscale

from ssl_xcit.utils.intervals import wilson
from ssl_xcit.utils.tables import metrics_of, title_of
from ssl_xcit.utils.terminal import printable

from .importance import as_numbers
from .run_reader import Curve, Run, RunResults
from .sweep import SweepResults

Trace = dict[str, Any]  # and other parts of figures, as plotly names them
Figure = dict[str, Any]  # `data` and `layout`
Captioned = tuple[str, str, Figure]  # with a title and a few words
Images = Sequence[int | None]  # number of online evaluation's test images by run; None: not known
MAX_POINTS = 1500  # of one curve
SHARES = re.compile(r"(student_)?knn_k\d+(_t[\d.]+)?")  # of correct answers, in percent
MEASURES = re.compile(  # of tasks, in percent
    r"top[15]|mean_class_accuracy|calibration_error|mAP|(mean_class_)?F1|miou|pixel_accuracy|"
    r"(box|mask)_AP\w*"
)
LOSSES = re.compile(r"loss_\w+")
ONLINE = "Online evaluation"
TESTED = "On test images"
PARTS = "Parts of the loss"
DYNAMIC = {ONLINE: SHARES, TESTED: MEASURES, PARTS: LOSSES}  # patterns of columns by titles
HIDDEN = ("epoch", "healthy", "online_seconds", "teacher_entropy", "prototypes_used")
# contrast of at least 3 : 1 with the page, light or dark
COLOURS = ("#3a80c4", "#d0682a", "#3a9765", "#9a6ac0", "#a98418", "#d2588a", "#1f9897", "#7d8791")
PLAIN, BAD = "#7d8791", "#c4463e"
DEPTH = ["#3f9bb5", "#9a52b8"]  # from the first to the last block, or from the worst to the best
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")


class Plot(NamedTuple):
    """One figure of curves."""

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
        Plot(PARTS, {}),
        Plot(ONLINE, {}, unit="% right"),
        Plot(TESTED, {}, unit="in %"),
    ),
    "Teacher and features": (
        Plot("Teacher entropy", {"teacher_entropy_share": "of ln K"}, unit="%",
             about="100 %: uniform, 0 %: one prototype each"),
        Plot("Rank of the features", {"rankme": "RankMe"}, about="dimensions in use"),
        Plot("Deviation of the features", {"feature_std": "deviation"},
             about="1: all directions, 0: all images alike"),
        Plot("Prototypes", {"prototypes_effective": "equally frequent ones that tell as much"},
             log=True),
        Plot("Prototypes of patches", {"patch_prototypes_effective": "equally frequent ones"},
             log=True),
        Plot("Teacher entropy of patches", {"patch_entropy_share": "of ln K"}, unit="%"),
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
EXPECTED_ZERO = {"bad_images", "skipped_steps"}


def plotly_text(words: str) -> str:
    """Text for plotly, which takes some HTML in its words."""
    return html.escape(printable(words), quote=False)


def rounded(value: float) -> float | None:
    """Seven digits, more than a screen shows; None, a gap, for what is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def decimated(curve: Curve, most: int) -> Curve:
    """At most so many points: the extremes of each stretch, in their order, and the last one."""
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


def local_means(values: Sequence[float]) -> list[float | None]:
    """Means of what is finite within a fortieth of the curve on both sides."""
    window = np.ones(2 * max(1, round(len(values) / 40)) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    with np.errstate(invalid="ignore"):
        return [rounded(v) for v in sums / np.convolve(finite, window, "same")]


def errors(values: Sequence[float], bounds: Sequence[tuple[float, float]]) -> Trace:
    """Error bars from the lower to the upper bounds."""
    pairs = list(zip(values, bounds, strict=True))
    up = [high - value for value, (_, high) in pairs]
    down = [value - low for value, (low, _) in pairs]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


def curve_traces(
    name: str, curve: Curve, line: Trace, smooth: bool, images: int | None
) -> list[Trace]:
    """A curve, over it a line of its local means where it is long and `smooth`, or below it the
    band of its intervals where the values are shares of so many images, in percent (None: they are
    no shares).
    """
    steps, values = curve
    common: Trace = {"x": steps, "name": name, "legendgroup": name, "mode": "lines"}
    quiet = common | {"hoverinfo": "skip"}
    trace = common | {
        "y": [rounded(value) for value in values],
        "mode": "lines+markers" if len(values) <= 12 else "lines",
        "line": line | {"width": 1.8},
        "hovertemplate": "%{y:.4~g}",
    }
    if smooth and len(values) >= 20:
        faint = line | {"color": f"{line['color']}66", "width": 1}
        mean = quiet | {"y": local_means(values), "line": line | {"width": 2}}
        return [trace | {"line": faint, "showlegend": False}, mean]
    if not images:
        return [trace]
    bounds = [
        wilson(round(value / 100 * images), images) if 0 <= value <= 100 else (value, value)
        for value in values
    ]
    trace["customdata"] = [[rounded(low), rounded(high)] for low, high in bounds]
    trace["hovertemplate"] = "%{y:.1f} (%{customdata[0]:.1f} to %{customdata[1]:.1f})"
    if len(values) < 3:  # no band between so few
        return [trace | {"error_y": errors(values, bounds)}]
    lows, highs = zip(*trace["customdata"], strict=True)
    edge = quiet | {"line": {"width": 0}, "showlegend": False}
    band = edge | {"y": highs, "fill": "tonexty", "fillcolor": f"{line['color']}29"}
    return [edge | {"y": lows}, band, trace]


def unhealthy_stretches(run: Run) -> list[tuple[int, int]]:
    """Steps at which a run was not healthy, from one report to the next."""
    steps, healthy = run.curves.get("healthy", ([], []))
    reports = zip(steps, [*steps[1:], *steps[-1:]], healthy, strict=True)
    stretches = []
    for sick, group in groupby(reports, key=lambda report: report[2] == 0.0):
        (start, end, _), *others = group
        if sick:
            stretches.append((start, others[-1][1] if others else end))
    return stretches


def step_marks(run: Run, title: str) -> list[tuple[int, str]]:
    """Steps at which something changes that a curve shows, in words."""
    marks: list[tuple[Any, str]] = []
    if title == "Learning rate":
        marks.append((run.plan.get("warmup_steps"), "warm-up ends"))
    if title == "Loss":
        resumed = run.about.get("resumed")
        marks.append((run.plan.get("freeze_steps"), "prototypes begin to learn"))
        marks += [(step, "went on") for step in resumed] if isinstance(resumed, list) else []
    return [(step, words) for step, words in marks if type(step) is int and step > 0]


def columns_of(plot: Plot, runs: Sequence[Run]) -> dict[str, str]:
    """Columns that some run has; of `DYNAMIC` plots all that have their pattern."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    if pattern := DYNAMIC.get(plot.title):
        return {name: label_of(name) for name in names if pattern.fullmatch(name)}
    return {name: label for name, label in plot.columns.items() if name in names}


def label_of(name: str) -> str:
    """`student_knn_k20` is the student's k-NN 20, `loss_box_reg` is box reg."""
    if LOSSES.fullmatch(name):
        return re.sub(r"^(loss_)+", "", name).replace("_", " ")
    inner = name.removeprefix("student_")
    return title_of(inner).strip() + (", student" if inner != name else "")


def curve_groups(runs: Sequence[Run], images: Images) -> list[tuple[str, list[Captioned]]]:
    """Figures by the titles of groups; several runs lie over each other."""
    known = {name for plots in GROUPS.values() for plot in plots for name in plot.columns}
    names = dict.fromkeys(name for run in runs for name in run.curves)
    known |= {n for n in names for pattern in DYNAMIC.values() if pattern.fullmatch(n)}
    other = [n for n in names if n not in known and n not in HIDDEN]
    others = []
    for name in other:
        words = label_of(name) if name.startswith(("knn", "student")) else name.replace("_", " ")
        others.append(Plot(words, {name: words}))
    groups = []
    for title, plots in {**GROUPS, "More": others}.items():
        figures = [curve_figure(plot, runs, images) for plot in plots]
        if drawn := [figure for figure in figures if figure is not None]:
            groups.append((title, drawn))
    return groups


def curve_figure(plot: Plot, runs: Sequence[Run], images: Images) -> Captioned | None:
    """One figure; None where there is nothing to see, not even zeros where others are expected."""
    columns = columns_of(plot, runs)
    values = (v for run in runs for name in columns for v in run.curves.get(name, ([], []))[1])
    if not columns or (columns.keys() <= EXPECTED_ZERO and not any(values)):
        return None
    several, scale = len(runs) > 1, 100.0 if plot.unit == "%" else 1.0
    data: list[Trace] = []
    for number, run in enumerate(runs):
        for place, (column, words) in enumerate(columns.items()):
            if column not in run.curves:
                continue
            steps, found = decimated(run.curves[column], max(200, MAX_POINTS // len(runs)))
            name = f"{run.name}, {words}" if several and len(columns) > 1 else run.name
            line = {
                "color": COLOURS[(number if several else place) % len(COLOURS)],
                "dash": DASHES[place % len(DASHES)] if several else "solid",
            }
            data += curve_traces(
                plotly_text(name if several else words),
                (steps, [scale * value for value in found]),
                line,
                plot.smooth,
                images[number] if SHARES.fullmatch(column) else None,
            )
    across = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    sick = across | {"fillcolor": BAD, "opacity": 0.15, "line": {"width": 0}, "layer": "below"}
    dotted = across | {"type": "line", "line": {"color": PLAIN, "width": 1, "dash": "dot"}}
    text = {"y": 1, "yref": "paper", "showarrow": False, "xanchor": "left", "yanchor": "top"}
    marks = [] if several else step_marks(runs[0], plot.title)
    last = max((steps[-1] for run in runs for steps, _ in run.curves.values()), default=1)
    lines = len({trace["name"] for trace in data})
    about = plot.about
    if plot.title == ONLINE:
        known = any("customdata" in trace for trace in data)
        about = "95 % intervals (Wilson)" if known else "how many images it tests on is not known"
    xaxis = {
        "range": [0, max(1, last) * 1.01],  # the same in all figures
        "fixedrange": False,
        "tickformat": ",d",
        "unifiedhovertitle": {"text": "step %{x:,d}"},
    }
    layout = {
        "xaxis": xaxis,
        "yaxis": {"type": "log", "dtick": "D2", "tickformat": "~g"} if plot.log else {},
        "shapes": [
            *(sick | {"x0": a, "x1": b} for run in runs for a, b in unhealthy_stretches(run)),
            *(dotted | {"x0": step, "x1": step} for step, _ in marks),
        ],
        "annotations": [text | {"x": step, "text": plotly_text(words)} for step, words in marks],
        "showlegend": lines > 1,
        "height": 270 if lines > 4 else 230,
    }
    caption = " · ".join(words for words in (plot.unit, about) if words)
    return plot.title, caption, {"data": data, "layout": layout}


def is_percent(metric: str) -> bool:
    """Whether a metric is in percent: no learning rate, no penalty, no error in its own unit."""
    return not metric.endswith(("_lr", "_l2")) and metric != "mae"


def numbers_figure(named: Sequence[tuple[str, RunResults]]) -> Figure:
    """Points with intervals, a row a metric, of everything in percent, of results by name; the
    baselines of one as hollow points.
    """
    several = len(named) > 1
    data: list[Trace] = []
    for number, (name, results) in enumerate(named):
        for place, (row, values) in enumerate(results.numbers.items()):
            main = row == results.backbone[0]
            if several and not main:
                continue
            shown = {m: values[m] for m in metrics_of({row: values}) if is_percent(m)}
            known = results.intervals.get(row, {}) if main else {}
            colour = COLOURS[number % len(COLOURS)] if main else PLAIN
            symbol = "circle" if main else ("circle-open", "diamond-open", "square-open")[place % 3]
            bars = errors(list(shown.values()), [known.get(m, (v, v)) for m, v in shown.items()])
            words = [" ({:.1f} to {:.1f})".format(*known[m]) if m in known else "" for m in shown]
            trace = {
                "name": plotly_text(name if several else row),
                "mode": "markers",
                "x": [rounded(value) for value in shown.values()],
                "y": [plotly_text(title_of(m).strip()) for m in shown],
                "customdata": words,
                "hovertemplate": "%{x:.1f}%{customdata}",
                "marker": {"color": colour, "size": 10 if main else 8, "symbol": symbol},
                "error_x": bars | {"visible": bool(known), "thickness": 1.6, "width": 0},
            }
            data.append(trace)
    metrics = list(dict.fromkeys(metric for trace in data for metric in trace["y"]))
    order = {"autorange": "reversed", "categoryorder": "array", "categoryarray": metrics}
    layout = {
        "height": 80 + 27 * len(metrics),
        "hovermode": "y unified",
        "showlegend": True,
        "legend": {
            "y": 1.01, "yanchor": "bottom", "traceorder": "normal" if several else "reversed",
        },
        "xaxis": {"ticksuffix": " %"},
        "yaxis": order | {"ticksuffix": "  "},
    }  # fmt: skip
    return {"data": data, "layout": layout}


class Entropy(NamedTuple):
    """Entropy of channel attention of a run."""

    name: str  # of the run
    number: int  # its place among the runs
    steps: Sequence[int]
    values: Sequence[Sequence[float]]  # (steps, blocks)


def entropy_figure(runs: Sequence[Entropy]) -> Figure:
    """Over training, a line a block; of several runs, or of one step, over depth."""
    over = len(runs) == 1 and len(runs[0].steps) > 1
    blocks = max(len(run.values[-1]) for run in runs)
    lines: list[tuple[str, Sequence[int], Sequence[float], str]]
    if over:
        (run,) = runs
        colours = sample_colorscale(DEPTH, np.linspace(0, 1, blocks).tolist())
        columns = enumerate(zip(zip(*run.values, strict=False), colours, strict=False), start=1)
        lines = [(f"block {n}", run.steps, y, colour) for n, (y, colour) in columns]
    else:
        lines = []
        for run in runs:
            name, y = plotly_text(f"{run.name}, step {run.steps[-1]}"), run.values[-1]
            lines.append((name, [*range(1, 1 + len(y))], y, COLOURS[run.number % len(COLOURS)]))
    common = {"mode": "lines+markers", "hovertemplate": "%{y:.4f}"}
    data = [
        common | {"name": name, "x": x, "y": y, "line": {"color": colour, "width": 2}}
        for name, x, y, colour in lines
    ]
    title = {"text": "step" if over else "block", "standoff": 6}
    ticks = {} if over else {"dtick": math.ceil(blocks / 12)}
    layout = {
        "height": 300,
        "showlegend": len(data) > 1,
        "xaxis": {"title": title, "tickformat": ",d", **ticks},
        "legend": {"y": -0.24},
    }
    return {"data": data, "layout": layout}


def parallel_figure(sweep: SweepResults, most: int = 8) -> Figure:
    """Parallel coordinates of trials with a value; `most` ticks an axis, at values that occur."""
    measured = [trial for trial in sweep.trials if trial.value is not None]
    dimensions: list[Trace] = []
    for key in sweep.keys:
        words = [trial.values.get(key, "") for trial in measured]
        values = as_numbers(words)
        if values is None:
            values = np.unique(words, return_inverse=True)[1].astype(np.float64)
        places, first = np.unique(values, return_index=True)
        every = slice(None, None, -(-len(places) // most))
        texts = [printable(words[i]) for i in first[every]]  # not as HTML
        ticks = {"tickvals": places[every].tolist(), "ticktext": texts}
        dimensions.append({"label": plotly_text(key), "values": values.tolist(), **ticks})
    steps = [trial.steps for trial in measured]
    if len(set(steps)) > 1:
        dimensions.append({"label": "steps", "values": steps})
    results = [trial.value for trial in measured]
    dimensions.append({"label": plotly_text(title_of(sweep.metric).strip()), "values": results})
    trace = {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": {"color": results, "colorscale": list(enumerate(DEPTH))},
        "rangefont": {"color": "rgba(0,0,0,0)", "size": 1},
        "unselected": {"line": {"opacity": 0.06}},
    }
    layout = {"height": 360, "margin": {"l": 60, "r": 50, "t": 46, "b": 18}}
    return {"data": [trace], "layout": layout}


def importance_figure(shares: Mapping[str, float]) -> Figure:
    """A bar for each setting."""
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [100 * share for share in shares.values()],
        "y": [plotly_text(key) for key in shares],
        "marker": {"color": COLOURS[0]},
        "hoverinfo": "x",
    }
    yaxis = {"autorange": "reversed", "ticksuffix": "  "}
    layout: Trace = {"height": 60 + 30 * len(shares), "hovermode": "closest", "yaxis": yaxis}
    layout["xaxis"] = {"ticksuffix": " %", "hoverformat": ".0f"}
    return {"data": [bars], "layout": layout}


def progress_figure(sweep: SweepResults, most: int = 40) -> Figure | None:
    """The metric over training of the best trials, the best apart; None: it was not measured."""
    faint, best = ({"color": f"{COLOURS[0]}66", "width": 1.5}, {"color": COLOURS[1], "width": 2.5})
    data = [
        {
            "name": plotly_text(" ".join(f"{key}={value}" for key, value in trial.values.items())),
            "mode": "lines+markers" if len(trial.curve) < 20 else "lines",
            "x": [step for step, _ in trial.curve],
            "y": [value for _, value in trial.curve],
            "line": faint if place else best,
            "hovertemplate": "%{y:.4~g}, step %{x:,d}",
        }
        for place, trial in reversed(list(enumerate(sweep.trials[:most])))
        if trial.curve
    ]
    xaxis = {"tickformat": ",d", "fixedrange": False}
    layout = {"height": 320, "hovermode": "closest", "xaxis": xaxis}
    return {"data": data, "layout": layout} if data else None
