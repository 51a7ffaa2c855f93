"""Results as a table for people: a row a measure, a column for each set of features."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ssl_xcit.utils.terminal import PlainConsole, printable

Results = dict[str, dict[str, float]]  # what was measured -> metric -> value
Intervals = Mapping[str, Mapping[str, Sequence[float]]]  # likewise, [low, high]

TITLES = {
    "linear": "linear probe",
    "linear_lr": "  best learning rate",
    "logistic": "logistic regression",
    "map": "retrieval, mAP",
    "recall_at_1": "retrieval, recall at 1",
    "nmi": "clusters, NMI",
    "ari": "clusters, ARI",
    "cluster_accuracy": "clusters, accuracy",
    "label_map": "labels, mAP",
    "r2": "variance explained",
    "mae": "mean absolute error",
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "accuracy, mean of the classes",
    "calibration_error": "calibration error",
    "mean_class_F1": "F1, mean of the classes",
    "miou": "mIoU",
    "pixel_accuracy": "right pixels",
}

EVALUATORS = {
    "knn": "k-NN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "several_labels": "labels",
    "regression": "numbers",
}
FEATURES = {
    "cls": "class token",
    "patch": "mean patch token",
    "cls_patch": "class and mean patch token",
    "last4": "last four blocks",
    "last4_patch": "last four blocks and mean patch token",
}


def shown_in_terminal() -> bool:
    """Whether there is somebody to show a progress bar to."""
    return sys.stdout.isatty()


def title_of(metric: str) -> str:
    """What a row is called: `knn_k20` is shown as `k-NN 20`."""
    if metric in TITLES:
        return TITLES[metric]
    if metric.endswith("_lr"):
        return "  best learning rate"
    if match := re.fullmatch(r"fewshot_(\d+)", metric):
        return f"{match[1]} image{'s' * (match[1] != '1')} a class"
    if match := re.fullmatch(r"(box|mask)_AP(\d*)(?:_(small|medium|large))?", metric):
        kind = f", {match[3]} objects" if match[3] else ""
        return f"{'boxes' if match[1] == 'box' else 'masks'}, AP{match[2]}{kind}"
    if match := re.fullmatch(r"(\w+?)_(easy|medium|hard)(?:_precision_at_(\d+))?", metric):
        return f"{match[1]}, {match[2]}, " + (f"mP@{match[3]}" if match[3] else "mAP")
    if match := re.fullmatch(r"(\w+)_(linear|knn)_(miou|accuracy|l2)", metric):
        measure = {"miou": "mIoU", "accuracy": "pixels", "l2": "best penalty"}[match[3]]
        return (
            f"{'  ' * (match[3] == 'l2')}{match[1]}, {match[2].replace('knn', 'k-NN')}, {measure}"
        )
    if match := re.fullmatch(r"(\w+)_(j|f|jf)", metric):
        return f"{match[1]}, {'J&F' if match[2] == 'jf' else match[2].upper()}"
    for ending, title in (("_jaccard", "Jaccard"), ("_jaccard_mean", "Jaccard, mean of heads"),
                          ("_map", "mAP")):  # fmt: skip
        if metric.endswith(ending):
            return f"{metric.removesuffix(ending)}, {title}"
    return metric.replace("knn_k", "k-NN ").replace("_t", ", T ", metric.startswith("knn"))


def print_table(
    results: Results,
    title: str,
    intervals: Intervals | None = None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """In percent where nothing else is said; the interval is the last column's. Below are the
    features that evaluators took, by row and evaluator.
    """
    console().print(results_table(results, title, intervals))
    for line in features_lines(chosen or {}):
        console().print(line)


def features_lines(chosen: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`features of pretrained: k-NN mean patch token, ...`, a line a row."""
    lines = []
    for row, evaluators in chosen.items():
        kinds = {name: str(v["kind"]) for name, v in evaluators.items() if "kind" in v}
        named = [f"{EVALUATORS.get(k, k)} {FEATURES.get(kind, kind)}" for k, kind in kinds.items()]
        if named:
            lines.append(f"features of {row}: {', '.join(named)}")
    return lines


def console() -> PlainConsole:
    """As wide as the terminal; a file has room."""
    return PlainConsole() if shown_in_terminal() else PlainConsole(width=140)


def results_table(results: Results, title: str, intervals: Intervals | None = None) -> Table:
    """The same, for whoever prints it."""
    table = Table(title=f"{title}, in %", title_justify="left")
    table.add_column("", no_wrap=True)
    for row in results:
        heading = Text(printable(row).replace(" ", "\n"))
        table.add_column(heading, justify="right", no_wrap=True)
    last = list(results)[-1]
    known = (intervals or {}).get(last, {})
    if known:
        table.add_column("95 %", justify="right", no_wrap=True)
    for metric in metrics_of(results):
        cells = [cell_text(metric, values) for values in results.values()]
        if known:
            cells.append(interval_text(metric, known.get(metric)))
        table.add_row(title_of(metric), *cells)
    return table


def metrics_of(results: Results) -> list[str]:
    """In the order they came; a deviation stands with its mean."""
    metrics = dict.fromkeys(metric for row in results.values() for metric in row)
    return [m for m in metrics if not m.endswith("_std") or m[:-4] not in metrics]


def cell_text(metric: str, values: Mapping[str, float]) -> str:
    """Percent with one decimal, a learning rate as it is; a deviation behind its mean."""
    value = values.get(metric)
    if value is None:
        return ""
    spread = values.get(f"{metric}_std")
    return format_value(metric, value) + (f" ± {spread:.1f}" if spread is not None else "")


def interval_text(metric: str, interval: Sequence[float] | None) -> str:
    """`81.0–85.2`, or nothing."""
    if interval is None:
        return ""
    return "–".join(format_value(metric, value) for value in interval)


def format_value(metric: str, value: float) -> str:
    """Percent with one decimal; a learning rate and an error in its own unit as they are."""
    if metric.endswith(("_lr", "_l2")):
        return f"{value:g}"
    return f"{value:.3g}" if metric == "mae" else f"{value:.1f}"
