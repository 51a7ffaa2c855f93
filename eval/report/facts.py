"""The parts of the report that are made from a run folder's files alone: head, final numbers,
settings, environment, commands, bad images.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ssl_xcit.data.bad import FILE, kind_of
from ssl_xcit.errors import UserError
from ssl_xcit.hardware import machine
from ssl_xcit.models.manifest import read_manifest
from ssl_xcit.models.weights import checkpoints_of
from ssl_xcit.run_folder import versions
from ssl_xcit.table import format_value, metrics_of, shown, shown_interval, title_of
from ssl_xcit.training.health import HEALTHY

from ..views.markup import command, details, esc, paragraph, spoken, table
from . import curves
from .features import Seen, paired_knn
from .run import Results, Run, is_number, one_line
from .settings import ABSENT, Setting, differing, settings_of_run

HEADLINES = ("knn_k20", "linear", "logistic", "map", "label_map", "r2")
MAX_BAD = 200
STATES = {"finished": "good", "running": "busy", "stopped": "warn", "failed": "bad"}


def headline(run: Run) -> str:
    """State, health and the numbers that are asked for first."""
    pills = [f'<span class="pill {STATES[run.state]}">{esc(run.words)}</span>', health_pill(run)]
    facts = [run.model, run.data]
    if (seconds := run.seconds()) is not None:
        facts.append(f"{spoken(seconds)} of training")
    epochs = run.last("epoch")
    facts.append(f"{run.step:,} steps" + (f", {epochs:.3g} epochs" if epochs is not None else ""))
    lines = [
        f'<p class="facts">{esc(" · ".join(facts))}</p>',
        f'<p class="pills">{"".join(pills)}</p>',
    ]
    if tiles := headline_numbers(run):
        lines.append(f'<div class="tiles">{tiles}</div>')
    if run.problems:
        items = "".join(f"<li>{esc(each)}</li>" for each in run.problems)
        lines.append(
            f'<div class="notice"><p>This report is not complete:</p><ul>{items}</ul></div>'
        )
    if changed := data_changes(run):
        items = "".join(f"<li>{esc(each)}</li>" for each in changed)
        lines.append(
            '<div class="notice"><p>The images changed during this run, so it is not the same as '
            f"one that was not stopped:</p><ul>{items}</ul></div>"
        )
    return "".join(lines)


def data_changes(run: Run) -> list[str]:
    """Where a run went on with other images (`resume.data=changed`), in words."""
    noted = run.about.get("data_changes")
    return [
        f"after step {change.get('step')}: {key}: {words}"
        for change in (noted if isinstance(noted, list) else [])
        if isinstance(change, dict) and isinstance(change.get("data"), dict)
        for key, words in change["data"].items()
    ]


def health_pill(run: Run) -> str:
    """The verdict on collapse, or that there is none."""
    verdict = run.summary.get("health")
    if verdict is None:
        last = run.last("healthy")
        verdict = (
            None if last is None else HEALTHY if last == 1.0 else "not healthy at the last step"
        )
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
        results = run.results
        row = list(results.numbers)[-1]
        values = results.numbers[row]
        named = [m for m in HEADLINES if m in values]
        for metric in (named or [m for m in values if curves.is_percent(m)])[:4]:
            interval = results.intervals.get(row, {}).get(metric)
            below = f"95 %: {shown_interval(metric, interval)}" if interval else "no interval"
            tiles.append(tile(title_of(metric).strip(), format_value(metric, values[metric]),
                              below, best_baseline(results, metric)))  # fmt: skip
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


def best_baseline(results: Results, metric: str) -> str:
    """`colour histogram 81.1`."""
    *baselines, _ = results.numbers
    known = {
        row: results.numbers[row][metric] for row in baselines if metric in results.numbers[row]
    }
    if not known:
        return ""
    row = max(known, key=lambda name: known[name])
    return f"{row}: {format_value(metric, known[row])}"


def results_part(runs: Sequence[Run], seen: Sequence[Seen]) -> tuple[str, dict[str, Any]]:
    """Final numbers with intervals; of several runs their differences.

    Raises:
        UserError: there are none.
    """
    if len(runs) > 1:
        return compared(runs, seen)
    (run,) = runs
    others = [details(f"on other data: {r.source}", results_table(r)) for r in run.elsewhere]
    if run.results is None and others:
        return paragraph("On the run's own data nothing is measured yet.", "hint") + "".join(
            others
        ), {}
    if run.results is None:
        raise UserError(
            "final numbers are measured at the end of a run that has labelled images, or by "
            "ssl-xcit eval"
        )
    first = run.results
    html = [results_table(first), *others]
    words = f"From {first.source}, in %. Bars are 95 % intervals over the test images."
    figure = '<div class="figure" data-figure="numbers"></div>'
    return (
        paragraph(words, "hint") + figure + details("all numbers", "".join(html)),
        {"numbers": curves.final_numbers([(run.name, first)])},
    )


def results_table(results: Results) -> str:
    """A row a metric, a column for each baseline, then the backbone with its interval."""
    rows = results.numbers
    *_, last = rows
    known: Mapping[str, Any] = results.intervals.get(last, {})
    cells = [
        [
            esc(title_of(metric)),
            *(esc(shown(metric, values)) for values in rows.values()),
            esc(shown_interval(metric, known.get(metric))),
        ]
        for metric in metrics_of(rows)
    ]
    return table(["", *rows, "95 %"], cells, numeric=True)


def compared(runs: Sequence[Run], seen: Sequence[Seen]) -> tuple[str, dict[str, Any]]:
    """A column for each run, then what differs by more than chance."""
    measured = [(run.name, run.results) for run in runs if run.results is not None]
    if not measured:
        raise UserError("no run has final numbers")
    rows = {name: list(results.numbers.values())[-1] for name, results in measured}
    intervals = {n: r.intervals.get(list(r.numbers)[-1], {}) for n, r in measured}
    cells = [
        [
            esc(title_of(metric)),
            *(
                cell
                for name, values in rows.items()
                for cell in (
                    esc(shown(metric, values)),
                    esc(shown_interval(metric, intervals[name].get(metric))),
                )
            ),
        ]
        for metric in metrics_of(rows)
    ]
    headings = ["", *(word for name in rows for word in (name, "95 %"))]
    missing = [run.name for run in runs if run.results is None]
    html = [paragraph("In %. Bars are 95 % intervals over the test images.", "hint")]
    if missing:
        html.append(paragraph(f"Without final numbers: {', '.join(missing)}.", "hint"))
    html += ['<div class="figure" data-figure="numbers"></div>']
    html += [details("all numbers", table(headings, cells, numeric=True))]
    html += [differences_of(runs[0], run, seen[0], other)
             for run, other in zip(runs[1:], seen[1:], strict=True)]  # fmt: skip
    return "".join(html), {"numbers": curves.final_numbers(measured)}


def differences_of(one: Run, two: Run, seen: Seen, other: Seen) -> str:
    """Two less one, image by image: as `ssl-xcit eval ckpt=[one,two]` left it, else k-NN alone."""
    title = f"<h3>{esc(two.name)} less {esc(one.name)}, on the same images</h3>"
    headings = ["", "difference", "95 %", "p", "more than chance"]
    if kept := kept_differences(one, two):
        rows = [
            [
                esc(title_of(metric)),
                f"{d['value']:+.2f}",
                f"{d['low']:+.2f} to {d['high']:+.2f}",
                f"{d['p']:.2g}",
                "yes" if d["more_than_chance"] else "no",
            ]
            for metric, d in kept.items()
        ]
        hint = paragraph("From comparison.json; all tests together at 5 % (Holm).", "hint")
        return title + hint + table(headings, rows, numeric=True)
    try:
        found = paired_knn(seen, other)
    except Exception as error:
        words = f"Not compared image by image: {one_line(error)}. The intervals are each run's own."
        return title + paragraph(words, "hint")
    rows = [
        [esc(title_of(metric)), f"{d.value:+.2f}", f"{d.low:+.2f} to {d.high:+.2f}", f"{d.p:.2g}",
         "yes" if d.p <= 0.05 else "no"]
        for metric, d in found.items()
    ]  # fmt: skip
    words = shlex.join(["ssl-xcit", "eval", f"ckpt=[{one.path},{two.path}]"])
    return title + table(headings, rows, numeric=True) + paragraph("All measures:") + command(words)


def kept_differences(one: Run, two: Run) -> dict[str, dict[str, Any]]:
    """Of `comparison.json` beside the first run, when it is about both runs' newest weights."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        content = json.loads((one.path / "comparison.json").read_text(encoding="utf-8"))
        newest = [newest_digest(run) for run in (one, two)]
        if None in newest or content["weights_sha256"] != newest:
            return {}
        (found,) = content["differences"].values()
        keys = ("value", "low", "high", "p")
        return {
            str(metric): d for metric, d in found.items() if all(is_number(d[key]) for key in keys)
        }
    return {}


def newest_digest(run: Run) -> str | None:
    """SHA-256 of the newest checkpoint, as its manifest has it."""
    found = checkpoints_of(run.path)
    entry = read_manifest(run.path / "checkpoints").get(found[-1].name) if found else None
    return entry.sha256 if entry else None


def settings_part(runs: Sequence[Run]) -> str:
    """What is not as by default, then everything; of several runs what differs."""
    if len(runs) > 1:
        return differing_settings(runs)
    (run,) = runs
    if not run.config and not run.choices:
        raise UserError("neither config.yaml nor run.json can be read")
    found, notes = settings_of_run(run)
    changed = [setting for setting in found if setting.changed]
    same = [setting for setting in found if not setting.changed]
    html = [paragraph(f"Compared with the defaults: {note}.", "hint") for note in notes]
    if changed:
        html.append(settings_table(changed, "changed"))
    else:
        html.append(paragraph("Everything is as it is by default."))
    filtered = (
        '<label class="filter">filter <input type="search" data-filter="settings" '
        'placeholder="lr, callbacks, ..."></label>'
    )
    all_of_them = filtered + settings_table([*changed, *same], "settings")
    return "".join(html) + details(f"all {len(found)} settings", all_of_them)


def settings_table(settings: Sequence[Setting], name: str) -> str:
    """Key, value, default, and who chose it."""
    rows = [
        [
            f"<code>{esc(s.key)}</code>",
            f"<code>{esc(s.value)}</code>",
            f"<code>{esc(s.default)}</code>" if s.changed else "",
            how_changed(s),
        ]
        for s in settings
    ]
    return table(["setting", "value", "default", ""], rows, kind=name)


def how_changed(setting: Setting) -> str:
    """Who has chosen it."""
    if not setting.changed:
        return ""
    if ABSENT in (setting.value, setting.default) and not setting.typed:
        return "of another version"
    return "typed" if setting.typed else "by the run"


def differing_settings(runs: Sequence[Run]) -> str:
    """A row for each setting that is not the same in all."""
    rows = [
        [f"<code>{esc(key)}</code>", *(f"<code>{esc(value)}</code>" for value in values)]
        for key, values in differing(runs)
    ]
    if not rows:
        return paragraph("The runs have the same settings.")
    return table(["setting", *(run.name for run in runs)], rows, kind="changed")


def environment_part(runs: Sequence[Run]) -> str:
    """Versions and machines of the runs, and of this report."""
    noted = [run.about.get("versions") for run in runs]
    found = [{str(k): str(v) for k, v in n.items()} if isinstance(n, dict) else {} for n in noted]
    now = versions()
    keys = list(dict.fromkeys([*(k for one in found for k in one), *now]))
    rows = [[esc(k), *(esc(one.get(k, "")) for one in found), esc(now.get(k, ""))] for k in keys]
    machines = [run.about.get("machine") for run in runs]
    then = [{str(k): str(v) for k, v in m.items()} if isinstance(m, dict) else {} for m in machines]
    rows += [[esc(k), *(esc(m.get(k, "")) for m in then), esc(v)] for k, v in machine().items()]
    return table(["", *(run.name for run in runs), "this report"], rows)


def commands_part(runs: Sequence[Run]) -> str:
    """To make the run again, and to look closer."""
    html = []
    for run in runs:
        if len(runs) > 1:
            html.append(f"<h3>{esc(run.name)}</h3>")
        if run.about:
            words = ["ssl-xcit", "pretrain", *run.overrides]
            again = "goes on where it stopped" if run.state != "finished" else "makes the run again"
            html.append(
                paragraph(f"In the folder where it was made, or with another name=, this {again}:")
            )
            html.append(command(shlex.join(words)))
        folder = str(run.path)
        html.append(paragraph("Measure, look at pictures, write this page again:"))
        html += [
            command(shlex.join(["ssl-xcit", "eval", f"ckpt={folder}"])),
            command(shlex.join(["ssl-xcit", "visualize", f"ckpt={folder}"])),
            command(shlex.join(["ssl-xcit", "report", f"run={folder}"])),
        ]
    if len(runs) > 1:
        folders = f"[{','.join(str(run.path) for run in runs)}]"
        html.append(paragraph("Compare image by image, write this page again:"))
        html += [
            command(shlex.join(["ssl-xcit", "eval", f"ckpt={folders}"])),
            command(shlex.join(["ssl-xcit", "report", f"runs={folders}"])),
        ]
    return "".join(html)


def bad_part(runs: Sequence[Run]) -> str:
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
        rows = [[f"<code>{esc(row.name)}</code>", esc(row.reason)] for row in run.bad[:MAX_BAD]]
        more = f" (the first {MAX_BAD}; all are in {FILE})" if len(run.bad) > MAX_BAD else ""
        html.append(details(f"which{more}", table(["file", "reason"], rows)))
    return "".join(html)
