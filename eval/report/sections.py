"""Sections of the report from a run folder's files alone: head, final numbers, settings,
environment, commands, bad images.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ssl_xcit.data.bad_samples import FILE, kind_of
from ssl_xcit.errors import UserError
from ssl_xcit.training.health import HEALTHY
from ssl_xcit.training.run_dir import versions
from ssl_xcit.utils.hardware import machine
from ssl_xcit.utils.tables import cell_text, format_value, interval_text, metrics_of, title_of

from ..results import DIFFERENCE_HEADINGS, difference_rows
from ..statistics import Difference
from ..viz.markup import command_line, details, duration_in_words, esc, paragraph, table
from . import curves
from .run_features import RunFeatures, paired_knn
from .run_reader import FAILED, FINISHED, RUNNING, STOPPED, Run, RunResults, is_number, message_of
from .settings_diff import ABSENT, Setting, differing, settings_of_run

HEADLINES = ("knn_k20", "linear", "logistic", "map", "label_map", "r2")
MAX_BAD = 200
PILLS = {FINISHED: "good", RUNNING: "busy", STOPPED: "warn", FAILED: "bad"}


def headline(run: Run) -> str:
    """State, health and the most important numbers."""
    parts = [run.model, run.data]
    if (seconds := run.seconds()) is not None:
        parts.append(f"{duration_in_words(seconds)} of training")
    epochs = run.last("epoch")
    parts.append(f"{run.step:,} steps" + (f", {epochs:.3g} epochs" if epochs is not None else ""))
    pill = f'<span class="pill {PILLS[run.state]}">{esc(run.words)}</span>'
    lines = [
        f'<p class="facts">{esc(" · ".join(parts))}</p>',
        f'<p class="pills">{pill}{health_pill(run)}</p>',
    ]
    if tiles := headline_numbers(run):
        lines.append(f'<div class="tiles">{tiles}</div>')
    lines.append(notice("This report is not complete:", run.problems))
    title = "The images changed during this run, so it is not the same as one that was not stopped:"
    lines.append(notice(title, data_changes(run)))
    return "".join(lines)


def notice(title: str, lines: Sequence[str]) -> str:
    """A list in a frame; nothing where it is empty."""
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<div class="notice"><p>{title}</p><ul>{items}</ul></div>' if lines else ""


def data_changes(run: Run) -> list[str]:
    """Where a run went on with other images (`resume.data=changed`), in words."""
    changes = run.about.get("data_changes")
    return [
        f"after step {change.get('step')}: {key}: {words}"
        for change in (changes if isinstance(changes, list) else [])
        if isinstance(change, dict) and isinstance(change.get("data"), dict)
        for key, words in change["data"].items()
    ]


def health_pill(run: Run) -> str:
    """The verdict on collapse, or that there is none."""
    verdict = run.summary.get("health")
    if verdict is None and (last := run.last("healthy")) is not None:
        verdict = HEALTHY if last == 1.0 else "not healthy at the last step"
    if verdict is None:
        return '<span class="pill">health not judged</span>'
    steps = sum(value == 0.0 for value in run.curves.get("healthy", ([], []))[1])
    words = str(verdict)
    if verdict == HEALTHY and steps:
        words = f"healthy at the end, {steps} reports were not"
    return f'<span class="pill {"good" if words == HEALTHY else "warn"}">{esc(words)}</span>'


def headline_numbers(run: Run) -> str:
    """Up to four, each with its interval and the best baseline; without any the loss."""
    tiles = []
    if run.results is not None:
        _, values, intervals = run.results.backbone
        known = [m for m in HEADLINES if m in values]
        for metric in (known or [m for m in values if curves.is_percent(m)])[:4]:
            interval = intervals.get(metric)
            below = f"95 %: {interval_text(metric, interval)}" if interval else "no interval"
            tiles.append(tile(title_of(metric).strip(), format_value(metric, values[metric]),
                              below, best_baseline(run.results, metric)))  # fmt: skip
    else:
        for metric in ("knn_k20", "loss"):
            if (value := run.last(metric)) is not None:
                name = curves.label_of(metric) if metric != "loss" else "loss"
                tiles.append(tile(name, f"{value:.4g}", "at the last report", ""))
    return "".join(tiles)


def tile(name: str, value: str, below: str, more: str) -> str:
    """A number."""
    last = f"<small>{esc(more)}</small>" if more else ""
    return (
        f'<div class="tile"><span>{esc(name)}</span><b>{esc(value)}</b>'
        f"<small>{esc(below)}</small>{last}</div>"
    )


def best_baseline(results: RunResults, metric: str) -> str:
    """`colour histogram 81.1`."""
    *baselines, _ = results.numbers.items()
    known = {row: values[metric] for row, values in baselines if metric in values}
    if not known:
        return ""
    row = max(known, key=lambda name: known[name])
    return f"{row}: {format_value(metric, known[row])}"


def results_section(
    runs: Sequence[Run], features: Sequence[RunFeatures]
) -> tuple[str, dict[str, Any]]:
    """Final numbers with intervals; of several runs their differences.

    Raises:
        UserError: there are none.
    """
    if len(runs) > 1:
        return comparison_section(runs, features)
    (run,) = runs
    others = [details(f"on other data: {r.source}", results_table(r)) for r in run.elsewhere]
    if run.results is None and others:
        hint = paragraph("On the run's own data nothing is measured yet.", "hint")
        return hint + "".join(others), {}
    if run.results is None:
        raise UserError(
            "final numbers are measured at the end of a run that has labelled images, or by "
            "ssl-xcit eval"
        )
    words = f"From {run.results.source}, in %. Bars are 95 % intervals over the test images."
    figure = '<div class="figure" data-figure="numbers"></div>'
    tables = "".join([results_table(run.results), *others])
    return (
        paragraph(words, "hint") + figure + details("all numbers", tables),
        {"numbers": curves.final_numbers([(run.name, run.results)])},
    )


def results_table(results: RunResults) -> str:
    """A row a metric, a column for each baseline, then the backbone with its interval."""
    rows, (_, _, intervals) = results.numbers, results.backbone
    cells = [
        [
            esc(title_of(metric)),
            *(esc(cell_text(metric, values)) for values in rows.values()),
            esc(interval_text(metric, intervals.get(metric))),
        ]
        for metric in metrics_of(rows)
    ]
    return table(["", *rows, "95 %"], cells, numeric=True)


def comparison_section(
    runs: Sequence[Run], features: Sequence[RunFeatures]
) -> tuple[str, dict[str, Any]]:
    """A column for each run, then paired differences."""
    measured = [(run.name, run.results) for run in runs if run.results is not None]
    if not measured:
        raise UserError("no run has final numbers")
    backbones = {name: results.backbone for name, results in measured}
    cells = []
    for metric in metrics_of({name: values for name, (_, values, _) in backbones.items()}):
        cells.append([esc(title_of(metric))])
        for _, values, intervals in backbones.values():
            interval = interval_text(metric, intervals.get(metric))
            cells[-1] += [esc(cell_text(metric, values)), esc(interval)]
    headings = ["", *(word for name in backbones for word in (name, "95 %"))]
    missing = [run.name for run in runs if run.results is None]
    html = [paragraph("In %. Bars are 95 % intervals over the test images.", "hint")]
    if missing:
        html.append(paragraph(f"Without final numbers: {', '.join(missing)}.", "hint"))
    html += ['<div class="figure" data-figure="numbers"></div>']
    html += [details("all numbers", table(headings, cells, numeric=True))]
    html += [paired_differences(features[0], other) for other in features[1:]]
    return "".join(html), {"numbers": curves.final_numbers(measured)}


def paired_differences(one: RunFeatures, two: RunFeatures) -> str:
    """Second run minus the first, image by image: as `ssl-xcit eval ckpt=[one,two]` left it, else
    k-NN alone.
    """
    title = f"<h3>{esc(two.run.name)} - {esc(one.run.name)} (paired)</h3>"
    differences = recorded_differences(one.run, two.run)
    hint, command = "", ""
    if differences:
        hint = paragraph("From comparison.json.", "hint")
    else:
        try:
            differences = paired_knn(one, two)
        except Exception as error:
            words = f"Not compared image by image: {message_of(error)}."
            return title + paragraph(f"{words} The intervals are each run's own.", "hint")
        words = shlex.join(["ssl-xcit", "eval", f"ckpt=[{one.run.path},{two.run.path}]"])
        command = paragraph("All measures:") + command_line(words)
    rows = [[esc(cell) for cell in row] for row in difference_rows(differences, 2)]
    return title + hint + table(DIFFERENCE_HEADINGS, rows, numeric=True) + command


def recorded_differences(one: Run, two: Run) -> dict[str, Difference]:
    """Those of `comparison.json` beside the first run, when it is about both runs' newest
    weights.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        content = json.loads((one.path / "comparison.json").read_text(encoding="utf-8"))
        newest = [run.newest_digest() for run in (one, two)]
        if None in newest or content["weights_sha256"] != newest:
            return {}
        (by_metric,) = content["differences"].values()
        numbers = {
            str(metric): [d[key] for key in ("value", "low", "high", "p")]
            for metric, d in by_metric.items()
        }
        return {m: Difference(*map(float, n)) for m, n in numbers.items() if all(map(is_number, n))}
    return {}


def settings_section(runs: Sequence[Run]) -> str:
    """Settings that are not the defaults, then all of them; of several runs those that differ."""
    if len(runs) > 1:
        return differing_settings(runs)
    (run,) = runs
    if not run.config and not run.choices:
        raise UserError("neither config.yaml nor run.json can be read")
    settings, notes = settings_of_run(run)
    settings.sort(key=lambda setting: not setting.changed)
    changed = [setting for setting in settings if setting.changed]
    html = [paragraph(f"Compared with the defaults: {note}.", "hint") for note in notes]
    if changed:
        html.append(settings_table(changed, "changed"))
    else:
        html.append(paragraph("Everything is as it is by default."))
    search = (
        '<label class="filter">filter <input type="search" data-filter="settings" '
        'placeholder="lr, callbacks, ..."></label>'
    )
    everything = search + settings_table(settings, "settings")
    return "".join(html) + details(f"all {len(settings)} settings", everything)


def settings_table(settings: Sequence[Setting], name: str) -> str:
    """Key, value, default, and who chose it."""
    rows = [
        [code(s.key), code(s.value), code(s.default) if s.changed else "", chosen_by(s)]
        for s in settings
    ]
    return table(["setting", "value", "default", ""], rows, kind=name)


def code(words: str) -> str:
    """Text as code."""
    return f"<code>{esc(words)}</code>"


def chosen_by(setting: Setting) -> str:
    """Who has chosen a setting that is not the default."""
    if not setting.changed:
        return ""
    if ABSENT in (setting.value, setting.default) and not setting.typed:
        return "of another version"
    return "typed" if setting.typed else "by the run"


def differing_settings(runs: Sequence[Run]) -> str:
    """A row for each setting that is not the same in all."""
    rows = [[code(key), *map(code, values)] for key, values in differing(runs)]
    if not rows:
        return paragraph("The runs have the same settings.")
    return table(["setting", *(run.name for run in runs)], rows, kind="changed")


def environment_section(runs: Sequence[Run]) -> str:
    """Versions and machines of the runs, and of this report."""
    rows = []
    for key, now in (("versions", versions()), ("machine", machine())):
        noted = [run.about.get(key) for run in runs]
        columns: list[Mapping[str, Any]] = [n if isinstance(n, dict) else {} for n in noted]
        old = [name for column in columns for name in column] if key == "versions" else []
        rows += [
            [esc(name), *(esc(column.get(name, "")) for column in (*columns, now))]
            for name in dict.fromkeys([*old, *now])
        ]
    return table(["", *(run.name for run in runs), "this report"], rows)


def commands_section(runs: Sequence[Run]) -> str:
    """Commands to make the run again, and to evaluate it."""
    html = []

    def add(words: str, *commands: list[str]) -> None:
        html.append(paragraph(words))
        html.extend(command_line(shlex.join(["ssl-xcit", *command])) for command in commands)

    for run in runs:
        if len(runs) > 1:
            html.append(f"<h3>{esc(run.name)}</h3>")
        if run.about:
            again = "goes on where it stopped" if run.state != FINISHED else "makes the run again"
            words = f"In the folder where it was made, or with another name=, this {again}:"
            add(words, ["pretrain", *run.overrides])
        folder = str(run.path)
        add(
            "Measure, look at pictures, write this page again:",
            ["eval", f"ckpt={folder}"],
            ["visualize", f"ckpt={folder}"],
            ["report", f"run={folder}"],
        )
    if len(runs) > 1:
        folders = f"[{','.join(str(run.path) for run in runs)}]"
        words = "Compare image by image, write this page again:"
        add(words, ["eval", f"ckpt={folders}"], ["report", f"runs={folders}"])
    return "".join(html)


def bad_section(runs: Sequence[Run]) -> str:
    """Images that could not be used, and why."""
    html = []
    for run in runs:
        if len(runs) > 1:
            html.append(f"<h3>{esc(run.name)}</h3>")
        if not run.bad:
            html.append(paragraph("Every image that was needed could be read."))
            continue
        kinds = Counter(kind_of(row.reason) for row in run.bad)
        total = run.plan.get("num_images")
        of = f" of {total:,}" if isinstance(total, int) else ""
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        html.append(paragraph(f"{len(run.bad):,}{of} images could not be used: {counted}."))
        rows = [[code(row.name), esc(row.reason)] for row in run.bad[:MAX_BAD]]
        more = f" (the first {MAX_BAD}; all are in {FILE})" if len(run.bad) > MAX_BAD else ""
        html.append(details(f"which{more}", table(["file", "reason"], rows)))
    return "".join(html)
