"""Figures of what a head gets right and wrong, as plain data for plotly, from `evaluation.json`:
what is taken for what, values by class, calibration, precision by recall.

What the file holds may be damaged; a part that is not as it should be is not shown.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ssl_xcit.utils.tables import title_of

from .figures import COLOURS, PLAIN, Figure, Trace, errors, plotly_text, rounded
from .page import Table
from .run_reader import is_number, mapping

MAX_CLASSES = 40  # of a heat map, and of bars: of more, the most confused pairs and the worst
MAX_PAIRS = 20  # of classes that are taken for each other
MAX_LINES = 12  # of precision by recall
SCALE = [[0, "rgba(58,128,196,0.04)"], [1, "rgb(58,128,196)"]]  # on light and on dark ground
T = TypeVar("T")


class Confusion(NamedTuple):
    """How often something of each class (row) was taken for each class (column)."""

    truth: Sequence[str]
    predicted: Sequence[str]
    counts: Sequence[Sequence[float]]

    def shares(self) -> list[list[float]]:
        """Counts in percent of their row."""
        return [[100.0 * count / (sum(row) or 1) for count in row] for row in self.counts]


class ClassValues(NamedTuple):
    """A number in percent of each class, with its interval where there is one."""

    metric: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


def whole(make: Callable[[], T]) -> T | None:
    """What is made of a file; None where its content is not as it should be."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def confusion_in(details: Mapping[str, Any], class_names: Sequence[str]) -> Confusion | None:
    """The confusion matrix of any task; `class_names` are needed where it does not name them."""

    def make() -> Confusion:
        named = details.get("confusion")
        if isinstance(named, dict):
            found = Confusion(named["truth"], named["prediction"], named["counts"])
        else:
            counts = named or details["confusion_matrix"]
            known = list(class_names) or [str(k) for k in range(len(counts))]
            found = Confusion(known, known, counts)
        if len(found.counts) != len(found.truth) or not all(
            len(row) == len(found.predicted) and all(map(is_number, row)) for row in found.counts
        ):
            raise ValueError("counts of other classes")
        return Confusion([*map(str, found.truth)], [*map(str, found.predicted)], found.counts)

    return whole(make)


def class_values_in(details: Mapping[str, Any]) -> list[ClassValues]:
    """The numbers of each class, of any task."""

    def of_rows(metric: str) -> ClassValues:
        rows = [row for row in details["per_class"] if is_number(row.get(metric))]
        if not rows:
            raise ValueError(metric)
        known = [row for row in rows if is_number(row.get("low")) and is_number(row.get("high"))]
        return ClassValues(
            metric,
            {str(row["class"]): row[metric] for row in rows},
            {str(row["class"]): (row["low"], row["high"]) for row in known},
        )

    def of_mapping(key: str, metric: str) -> ClassValues:
        values = {str(k): v for k, v in details[key].items() if is_number(v)}
        bounds = mapping(details.get(f"{key}_intervals"))
        return ClassValues(
            metric,
            values,
            {k: (b[0], b[1]) for k, b in bounds.items() if len(b) == 2 and all(map(is_number, b))},
        )

    found = [
        whole(lambda: of_rows("accuracy")),
        whole(lambda: of_rows("average_precision")),
        whole(lambda: of_mapping("class_iou", "IoU")),
        whole(lambda: of_mapping("box_AP_by_class", "box_AP")),
        whole(lambda: of_mapping("mask_AP_by_class", "mask_AP")),
    ]
    return [values for values in found if values is not None and values.values]


def confusion_figure(confusion: Confusion) -> Figure | None:
    """A heat map of shares by row; None of too many classes."""
    rows, columns = len(confusion.truth), len(confusion.predicted)
    if max(rows, columns) > MAX_CLASSES:
        return None
    trace: Trace = {
        "type": "heatmap",
        "z": [[rounded(share) for share in row] for row in confusion.shares()],
        "x": [plotly_text(name) for name in confusion.predicted],
        "y": [plotly_text(name) for name in confusion.truth],
        "customdata": confusion.counts,
        "hovertemplate": "%{y} taken for %{x}: %{z:.1f} % (%{customdata:,})<extra></extra>",
        "colorscale": SCALE,
        "zmin": 0,
        "zmax": 100,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    axis = {"type": "category", "showgrid": False}
    layout = {
        "height": 150 + min(26, 700 // rows) * rows,
        "hovermode": "closest",
        "xaxis": axis | {"title": {"text": "predicted", "standoff": 6}, "tickangle": -45},
        "yaxis": axis | {"title": {"text": "true", "standoff": 6}, "autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout}


def confused_pairs(confusion: Confusion) -> Table | None:
    """The classes that are taken for each other most often, by the share of their row; None where
    there are no errors.
    """
    pairs = [
        (share, truth, predicted, count)
        for truth, shares, counts in zip(
            confusion.truth, confusion.shares(), confusion.counts, strict=True
        )
        for predicted, share, count in zip(confusion.predicted, shares, counts, strict=True)
        if truth != predicted and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [
        [f"{truth} taken for {predicted}", f"{share:.1f} %", f"{count:,}"]
        for share, truth, predicted, count in pairs[:MAX_PAIRS]
    ]
    return Table(["", "of the class", "count"], rows, "numeric") if rows else None


def class_figure(found: Sequence[ClassValues]) -> Figure:
    """A bar for each class and number, the worst first by the first of them; of many classes the
    worst.
    """
    first = found[0]
    order = sorted(first.values, key=lambda name: first.values[name])[:MAX_CLASSES]
    data: list[Trace] = []
    for place, each in enumerate(found):
        values = [each.values.get(name, 0.0) for name in order]
        bounds = [each.intervals.get(n, (v, v)) for n, v in zip(order, values, strict=True)]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plotly_text(title_of(each.metric)),
                "x": [rounded(value) for value in values],
                "y": [plotly_text(name) for name in order],
                "marker": {"color": COLOURS[place]},
                "error_x": errors(values, bounds)
                | {"visible": bool(each.intervals), "thickness": 1.2, "width": 0, "color": PLAIN},
                "hovertemplate": "%{x:.1f} %",
            }
        )
    layout: Trace = {
        "height": 70 + (14 + 10 * len(found)) * len(order),
        "hovermode": "y unified",
        "showlegend": len(found) > 1,
        "legend": {"y": 1.01, "yanchor": "bottom"},
        "xaxis": {"range": [0, 100], "ticksuffix": " %"},
        "yaxis": {"type": "category", "autorange": "reversed", "ticksuffix": "  "},
    }
    return {"data": data, "layout": layout}


def calibration_figure(details: Mapping[str, Any]) -> Figure | None:
    """Accuracy by confidence; None where it was not measured."""

    def make() -> Figure:
        bins = details["reliability"]
        values: dict[str, list[float]] = {
            key: [float(b[key]) for b in bins] for key in ("confidence", "accuracy", "images")
        }
        most = max(values["images"])
        line = {
            "name": "measured",
            "mode": "lines+markers",
            "x": [rounded(v) for v in values["confidence"]],
            "y": [rounded(v) for v in values["accuracy"]],
            "customdata": values["images"],
            "line": {"color": COLOURS[0], "width": 1.5},
            "marker": {"size": [6 + 12 * (n / most) ** 0.5 for n in values["images"]]},
            "hovertemplate": "%{y:.1f} % right at %{x:.1f} % (%{customdata:,} images)"
            "<extra></extra>",
        }
        even = {
            "name": "calibrated", "mode": "lines", "x": [0, 100], "y": [0, 100],
            "line": {"color": PLAIN, "width": 1, "dash": "dot"}, "hoverinfo": "skip",
        }  # fmt: skip
        axis = {"range": [0, 102], "ticksuffix": " %"}
        layout = {
            "height": 320,
            "hovermode": "closest",
            "xaxis": axis | {"title": {"text": "confidence", "standoff": 6}},
            "yaxis": axis | {"title": {"text": "right", "standoff": 6}},
        }
        return {"data": [even, line], "layout": layout}

    return whole(make)


def recall_figure(details: Mapping[str, Any], kind: str) -> Figure | None:
    """Precision at each recall for IoU 0.5, a line a class; None where it was not measured."""

    def make() -> Figure:
        lines = details[f"{kind}_precision_at_recall"]
        chosen = list(lines.items())[:MAX_LINES]
        data = [
            {
                "name": plotly_text(str(name)),
                "mode": "lines",
                "x": [rounded(100.0 * i / (len(values) - 1)) for i in range(len(values))],
                "y": [rounded(100.0 * float(value)) for value in values],
                "line": {"color": COLOURS[i % len(COLOURS)], "width": 1.8},
                "hovertemplate": "%{y:.1f} %",
            }
            for i, (name, values) in enumerate(chosen)
        ]
        axis = {"range": [0, 102], "ticksuffix": " %"}
        layout = {
            "height": 320,
            "showlegend": len(data) > 1,
            "xaxis": axis | {"title": {"text": "recall", "standoff": 6}},
            "yaxis": axis | {"title": {"text": "precision", "standoff": 6}},
            "legend": {"y": -0.26},
        }
        return {"data": data, "layout": layout}

    return whole(make)
