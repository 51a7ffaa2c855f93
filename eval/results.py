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
from ssl_xcit.utils.files import replacing, write_json
from ssl_xcit.utils.tables import (
    Results,
    cell_text,
    console,
    features_lines,
    interval_text,
    metrics_of,
    print_table,
    title_of,
)
from ssl_xcit.utils.terminal import literal

from .evaluators.knn import accuracy_by_class
from .evaluators.linear_heads import LinearHead
from .statistics import Difference, Estimate, holm, paired_difference

MAX_CLASSES = 40  # printed; all of them are in results.json
OF_HEADS = ("top1", "mAP", "miou", "box_AP", "mask_AP")  # numbers of heads that classes have
ByClass = dict[str, tuple[float, int]]  # class name -> (percent, number of test images)
DIFFERENCE_HEADINGS = ("", "difference", "95 %", "p", "significant (Holm, 5 %)")
CLASS_HEADINGS = ("class", "test images", "in %")


@dataclass
class Evaluation:
    """Numbers by row (baselines, backbones), then by metric, evaluator or task.

    `results` has an `Estimate` where there is an interval, `chosen` the settings that evaluators
    chose, `left_out` why there are no numbers, `overlap` the numbers of test images that are
    training images as well, by kind, `bounds` intervals that were measured with their numbers,
    `bad_images` which test images of a head could not be read.
    """

    results: Results = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[str, dict[str, LinearHead]] = field(default_factory=dict)
    by_class: dict[str, dict[str, ByClass]] = field(default_factory=dict)
    left_out: dict[str, dict[str, Exception]] = field(default_factory=dict)
    compared: dict[tuple[str, str], dict[str, Difference]] = field(default_factory=dict)  # two rows
    overlap: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bad_images: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """95 % intervals, row -> metric -> [low, high]: as measured, else of the estimates."""
        return {
            row: self.bounds[row]
            if row in self.bounds
            else {
                m: list(v.interval)
                for m, v in values.items()
                if isinstance(v, Estimate) and v.interval is not None
            }
            for row, values in self.results.items()
        }

    def note_classes(self, row: str, metric: str, labels: np.ndarray, names: Sequence[str]) -> None:
        """Note the accuracy of each class, where a metric is one number a test image."""
        estimate: Any = self.results[row][metric]
        one_each = isinstance(estimate, Estimate) and estimate.items.shape == labels.shape
        if one_each and label_kind(labels) == "classes":
            self.by_class.setdefault(row, {})[metric] = {
                names[i] if i < len(names) else str(i): accuracy
                for i, accuracy in accuracy_by_class(estimate.items, labels).items()
            }


def differences(evaluation: Evaluation, first: str, second: str) -> dict[str, Difference]:
    """Of the metrics that both rows have as estimates on the same images; computed once."""
    if (first, second) not in evaluation.compared:
        one, two = (evaluation.results.get(row, {}) for row in (first, second))
        evaluation.compared[first, second] = {
            m: paired_difference(a, b)
            for m, a in one.items()
            if isinstance(a, Estimate)
            and isinstance(b := two.get(m), Estimate)
            and len(a.items) == len(b.items) > 1
        }
    return evaluation.compared[first, second]


def significant(paired: Mapping[str, Difference]) -> dict[str, bool]:
    """Which differences are significant, all of them together at 5 % (Holm)."""
    return dict(zip(paired, holm(d.p for d in paired.values()), strict=True))


def difference_rows(paired: Mapping[str, Difference], decimals: int | None) -> list[list[str]]:
    """Cells of `DIFFERENCE_HEADINGS`; `decimals` None: three of an error in its unit, else one."""
    verdicts, rows = significant(paired), []
    for metric, d in paired.items():
        n = decimals if decimals is not None else 3 if metric == "mae" else 1
        interval = f"{d.low:+.{n}f} to {d.high:+.{n}f}"
        verdict = "yes" if verdicts[metric] else "no"
        rows.append([title_of(metric), f"{d.value:+.{n}f}", interval, f"{d.p:.2g}", verdict])
    return rows


def difference_table(evaluation: Evaluation, first: str, second: str) -> Table:
    """Paired differences of two rows."""
    table = Table(title=f"{second} - {first} (paired)", title_justify="left")
    for heading in DIFFERENCE_HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in difference_rows(differences(evaluation, first, second), None):
        table.add_row(*row)
    return table


def print_all(evaluation: Evaluation, title: str, rows: Sequence[str], per_class: bool) -> None:
    """Print the table, differences where there are several backbones, classes on request."""
    # of several the table of differences has them
    intervals = evaluation.intervals if len(rows) == 1 else None
    print_table(evaluation.results, title, intervals, chosen_of(evaluation, rows))
    for second in rows[1:]:
        if differences(evaluation, rows[0], second):
            console().print(difference_table(evaluation, rows[0], second))
    for row in rows if per_class else ():
        for metric, classes in chosen_classes(evaluation, row).items():
            console().print(class_table(f"{row}, {title_of(metric)}", classes))


def chosen_of(evaluation: Evaluation, rows: Sequence[str]) -> dict[str, Any]:
    """What evaluators chose for these rows."""
    return {row: evaluation.chosen[row] for row in rows if row in evaluation.chosen}


def chosen_classes(evaluation: Evaluation, row: str) -> dict[str, ByClass]:
    """Accuracy by class of k-NN with the best k, of the linear probe, and of a task's own head."""
    by_class = evaluation.by_class.get(row, {})
    knn = [metric for metric in by_class if metric.startswith("knn_k")]
    best = max(knn, key=lambda metric: evaluation.results[row][metric], default=None)
    chosen = (best, "linear", *OF_HEADS)
    return {m: by_class[m] for m in chosen if m is not None and m in by_class}


def class_rows(classes: ByClass) -> list[list[str]]:
    """Cells of `CLASS_HEADINGS`, worst first."""
    ordered = sorted(classes.items(), key=lambda item: item[1])
    return [[name, f"{count:,}", f"{value:.1f}"] for name, (value, count) in ordered]


def class_table(title: str, classes: ByClass) -> Table:
    """Accuracy by class, worst first."""
    more = f", the worst {MAX_CLASSES} of {len(classes)}" if len(classes) > MAX_CLASSES else ""
    table = Table(title=f"{title}, by class{more}", title_justify="left")
    for heading in CLASS_HEADINGS:
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in class_rows(classes)[:MAX_CLASSES]:
        table.add_row(*row)
    return table


def markdown(evaluation: Evaluation, title: str, rows: Sequence[str], about: Sequence[str]) -> str:
    """The same tables to paste; backbones have an interval beside them."""
    results, intervals = evaluation.results, evaluation.intervals
    headings, cells = ["in %"], [[title_of(m).strip()] for m in metrics_of(results)]
    for row, values in results.items():
        headings += [row, "95 %"] if row in rows else [row]
        for metric, line in zip(metrics_of(results), cells, strict=True):
            line.append(cell_text(metric, values))
            if row in rows:
                line.append(interval_text(metric, intervals.get(row, {}).get(metric)))
    lines = [f"## {literal(title)}", "", *table_lines(headings, cells)]
    for second in rows[1:]:
        if not (paired := differences(evaluation, rows[0], second)):
            continue
        lines += ["", literal(f"{second} - {rows[0]} (paired):"), ""]
        lines += table_lines(DIFFERENCE_HEADINGS, difference_rows(paired, 2))
    for words in features_lines(chosen_of(evaluation, rows)):
        lines += ["", literal(words)]
    for row in rows:
        for metric, classes in chosen_classes(evaluation, row).items():
            lines += ["", literal(f"{row}, {title_of(metric)}, by class:"), ""]
            lines += table_lines(CLASS_HEADINGS, class_rows(classes))
    return "\n".join([*lines, "", *(f"- {literal(line)}" for line in about), ""])


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(literal, cells))} |"

    rule = f"| {' | '.join(['---', *('---:' for _ in headings[1:])])} |"
    return [line(headings), rule, *(line(cells) for cells in rows)]


def write_results(
    evaluation: Evaluation, title: str, rows: Sequence[str], content: Mapping[str, Any], out: Path
) -> list[Path]:
    """Write `results.json`, `results.md` beside it, and `heads/NAME.pt` for every classifier."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paired = {}
    for second in rows[1:]:
        changes = differences(evaluation, rows[0], second)
        verdicts = significant(changes)
        paired[f"{second} less {rows[0]}"] = {
            m: {**asdict(d), "more_than_chance": verdicts[m]} for m, d in changes.items()
        }
    parts = {
        "intervals": evaluation.intervals,
        "differences": paired,
        "chosen": evaluation.chosen,
        "by_class": evaluation.by_class,
        "seconds": evaluation.seconds,
        "bad_images": {k: v for k, v in evaluation.bad_images.items() if v["count"]},
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
        safe_row = "".join(c if c.isalnum() or c in "-_." else "_" for c in row)
        for name, head in evaluation.heads.get(row, {}).items():
            prefix = f"{safe_row}-" if len(rows) > 1 else ""
            written.append(out.parent / "heads" / f"{prefix}{name}.pt")
            written[-1].parent.mkdir(exist_ok=True)
            head.save(written[-1])
    return written
