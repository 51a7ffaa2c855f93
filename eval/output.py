"""What an evaluation leaves behind: tables to read, `results.json` with all that it takes to trust
them, `results.md` to paste.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ssl_xcit.data.labels import label_kind
from ssl_xcit.files import replacing, write_json
from ssl_xcit.table import (
    Results,
    console,
    metrics_of,
    print_table,
    shown,
    shown_interval,
    title_of,
)
from ssl_xcit.terminal import literal

from .estimates import Difference, Estimate, compare, holm
from .heads import LinearHead
from .knn import accuracy_by_class

MAX_CLASSES = 40  # printed; all of them are in results.json


@dataclass
class Evaluation:
    """Numbers by what was measured (rows: baselines, backbones) and metric.

    Args:
        results: row -> metric -> value; an `Estimate` where there is an interval.
        seconds: row -> what took so long.
        chosen: row -> evaluator -> the setting that it chose.
        heads: row -> evaluator -> the classifier that it made.
        by_class: row -> metric -> class name -> (percent, number of test images).
        left_out: row -> evaluator or task -> why it has no numbers.
        compared: differences of two rows, once computed.
        overlap: how many test images are training images as well, by kind.
    """

    results: Results = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[str, dict[str, LinearHead]] = field(default_factory=dict)
    by_class: dict[str, dict[str, dict[str, tuple[float, int]]]] = field(default_factory=dict)
    left_out: dict[str, dict[str, Exception]] = field(default_factory=dict)
    compared: dict[tuple[str, str], dict[str, Difference]] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """95 % of every estimate, row -> metric -> [low, high]."""
        return {
            row: {
                m: list(v.interval)
                for m, v in values.items()
                if isinstance(v, Estimate) and v.interval is not None
            }
            for row, values in self.results.items()
        }

    def note_classes(self, row: str, metric: str, labels: np.ndarray, names: Sequence[str]) -> None:
        """Accuracy of each class, where a metric is one number a test image."""
        estimate: Any = self.results[row][metric]
        one_each = isinstance(estimate, Estimate) and estimate.items.shape == labels.shape
        if one_each and label_kind(labels) == "classes":
            found = accuracy_by_class(estimate.items, labels)
            self.by_class.setdefault(row, {})[metric] = {
                names[i] if i < len(names) else str(i): values for i, values in found.items()
            }


def differences(evaluation: Evaluation, first: str, second: str) -> dict[str, Difference]:
    """Of the metrics that both rows have as estimates on the same images; computed once."""
    one, two = (evaluation.results.get(row, {}) for row in (first, second))
    if (first, second) in evaluation.compared:
        return evaluation.compared[first, second]
    pairs = {m: (a, two[m]) for m, a in one.items() if m in two}
    found = {
        m: compare(a, b)
        for m, (a, b) in pairs.items()
        if isinstance(a, Estimate) and isinstance(b, Estimate) and len(a.items) == len(b.items) > 1
    }
    evaluation.compared[first, second] = found
    return found


def verdicts(found: Mapping[str, Difference]) -> dict[str, bool]:
    """Which differences are more than chance, all of them together at 5 % (Holm)."""
    return dict(zip(found, holm(d.p for d in found.values()), strict=True))


def compared(evaluation: Evaluation, first: str, second: str) -> Table:
    """A table of differences, and whether they mean anything."""
    found = differences(evaluation, first, second)
    holds = verdicts(found)
    table = Table(title=f"{second} less {first}, on the same images", title_justify="left")
    for heading in ("", "difference", "95 %", "p", "more than chance (Holm)"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for metric, d in found.items():
        decimals = 3 if metric == "mae" else 1
        table.add_row(
            title_of(metric),
            f"{d.value:+.{decimals}f}",
            f"{d.low:+.{decimals}f} to {d.high:+.{decimals}f}",
            f"{d.p:.2g}",
            "yes" if holds[metric] else "no",
        )
    return table


def print_all(evaluation: Evaluation, title: str, rows: Sequence[str], per_class: bool) -> None:
    """The table, differences where there are several backbones, classes on request."""
    # of several the table of differences has them
    print_table(evaluation.results, title, evaluation.intervals if len(rows) == 1 else None)
    for second in rows[1:]:
        console().print(compared(evaluation, rows[0], second))
    if per_class:
        for row in rows:
            for metric, classes in chosen_classes(evaluation, row).items():
                console().print(class_table(f"{row}, {title_of(metric)}", classes))


def chosen_classes(evaluation: Evaluation, row: str) -> dict[str, dict[str, tuple[float, int]]]:
    """Of the k of k-NN that is best, and of the linear probe."""
    found = evaluation.by_class.get(row, {})
    values = evaluation.results.get(row, {})
    neighbours = [m for m in found if m.startswith("knn_k")]
    best = max(neighbours, key=lambda m: values[m], default=None)
    return {m: found[m] for m in (best, "linear") if m is not None and m in found}


def class_table(title: str, classes: Mapping[str, tuple[float, int]]) -> Table:
    """Worst first."""
    more = f", the worst {MAX_CLASSES} of {len(classes)}" if len(classes) > MAX_CLASSES else ""
    table = Table(title=f"{title}, by class{more}", title_justify="left")
    for heading in ("class", "test images", "in %"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, (value, count) in sorted(classes.items(), key=lambda c: c[1])[:MAX_CLASSES]:
        table.add_row(name, f"{count:,}", f"{value:.1f}")
    return table


def markdown(evaluation: Evaluation, title: str, rows: Sequence[str], about: Sequence[str]) -> str:
    """The same tables to paste."""
    results, intervals = evaluation.results, evaluation.intervals

    def range_of(row: str, metric: str) -> str:
        return shown_interval(metric, intervals.get(row, {}).get(metric))

    lines = [f"## {literal(title)}", ""]
    lines += table_lines(
        ["in %", *(heading for row in results for heading in columns_of(row, rows))],
        [
            [title_of(metric).strip(), *(
                cell
                for row, values in results.items()
                for cell in (
                    [shown(metric, values), range_of(row, metric)]
                    if row in rows
                    else [shown(metric, values)]
                )
            )]
            for metric in metrics_of(results)
        ],
    )  # fmt: skip
    for second in rows[1:]:
        found = differences(evaluation, rows[0], second)
        holds = verdicts(found)
        lines += ["", literal(f"{second} less {rows[0]}, on the same images:"), ""]
        lines += table_lines(
            ["", "difference", "95 %", "p", "more than chance (Holm)"],
            [
                [title_of(m), f"{d.value:+.2f}", f"{d.low:+.2f} to {d.high:+.2f}", f"{d.p:.2g}",
                 "yes" if holds[m] else "no"]
                for m, d in found.items()
            ],
        )  # fmt: skip
    for row in rows:
        for metric, classes in chosen_classes(evaluation, row).items():
            lines += ["", literal(f"{row}, {title_of(metric)}, by class:"), ""]
            ordered = sorted(classes.items(), key=lambda c: c[1])
            lines += table_lines(
                ["class", "test images", "in %"],
                [[name, f"{count:,}", f"{value:.1f}"] for name, (value, count) in ordered],
            )
    return "\n".join([*lines, "", *(f"- {literal(line)}" for line in about), ""])


def columns_of(row: str, backbones: Sequence[str]) -> list[str]:
    """Backbones have an interval beside them."""
    return [row, "95 %"] if row in backbones else [row]


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(literal, cells))} |"

    rule = f"| {' | '.join(['---', *('---:' for _ in headings[1:])])} |"
    return [line(headings), rule, *(line(cells) for cells in rows)]


def write(
    evaluation: Evaluation,
    title: str,
    rows: Sequence[str],
    content: Mapping[str, Any],
    out: Path,
) -> list[Path]:
    """`results.json`, `results.md` beside it, and `heads/NAME.pt` for every classifier."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for second in rows[1:]:
        changes = differences(evaluation, rows[0], second)
        holds = verdicts(changes)
        found[f"{second} less {rows[0]}"] = {
            m: {**asdict(d), "more_than_chance": holds[m]} for m, d in changes.items()
        }
    parts = {
        "intervals": evaluation.intervals,
        "differences": found,
        "chosen": evaluation.chosen,
        "by_class": evaluation.by_class,
        "seconds": evaluation.seconds,
        "left_out": {
            row: {name: str(error) for name, error in missing.items()}
            for row, missing in evaluation.left_out.items()
        },
    }
    write_json(
        {**content, "results": evaluation.results} | {k: v for k, v in parts.items() if v}, out
    )
    about = [
        f"{key}: {value if not isinstance(value, list) else ', '.join(map(str, value))}"
        for key, value in content.items()
        if isinstance(value, str | int | list)
    ]
    page = out.with_suffix(".md")
    with replacing(page) as part:
        part.write_text(markdown(evaluation, title, rows, about), encoding="utf-8")
    written = [out, page]
    for row in rows:
        for name, head in evaluation.heads.get(row, {}).items():
            prefix = f"{safe(row)}-" if len(rows) > 1 else ""
            written.append(out.parent / "heads" / f"{prefix}{name}.pt")
            written[-1].parent.mkdir(exist_ok=True)
            head.save(written[-1])
    return written


def safe(name: str) -> str:
    """A row's name in a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
