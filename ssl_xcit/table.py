"""Results as a table for people and as a file for programs."""

import sys

from rich.console import Console
from rich.table import Table

Results = dict[str, dict[str, float]]  # row (what was measured) -> metric -> value

TITLES = {"linear": "linear", "linear_lr": "its lr"}


def shown_in_terminal() -> bool:
    """Whether there is somebody to show a progress bar to."""
    return sys.stdout.isatty()


def title_of(metric: str) -> str:
    """A column's heading: `knn_k20` is shown as `k-NN 20`."""
    return TITLES.get(metric) or metric.replace("knn_k", "k-NN ")


def print_table(results: Results, title: str) -> None:
    """Rows in the order given; accuracies in percent."""
    metrics = list(dict.fromkeys(metric for row in results.values() for metric in row))
    table = Table(title=f"{title}, top-1 in %", title_justify="left")
    table.add_column("features", no_wrap=True)
    for metric in metrics:
        table.add_column(title_of(metric), justify="right", no_wrap=True)
    for row, values in results.items():
        cells = [format_value(metric, values.get(metric)) for metric in metrics]
        table.add_row(row, *cells)
    Console().print(table)


def format_value(metric: str, value: float | None) -> str:
    """Percent with one decimal, a learning rate as it is."""
    if value is None:
        return ""
    return f"{value:g}" if metric.endswith("_lr") else f"{value:.1f}"
