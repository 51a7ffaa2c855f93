"""Content of the report's sections from a run folder's files alone: head, final numbers, settings,
environment, commands, bad images. `sections.html` says how they look.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ssl_xcit.data.bad_samples import FILE, kind_of
from ssl_xcit.errors import UserError
from ssl_xcit.training.health import HEALTHY
from ssl_xcit.training.run_dir import versions
from ssl_xcit.utils.hardware import machine
from ssl_xcit.utils.tables import cell_text, format_value, interval_text, metrics_of, title_of
from ssl_xcit.utils.terminal import duration_in_words

from ..results import DIFFERENCE_HEADINGS, difference_rows
from ..statistics import Difference
from .figures import COLOURS, is_percent, label_of, numbers_figure
from .head_sections import left_out
from .page import Table
from .run_features import RunFeatures, named, paired_knn
from .run_reader import FINISHED, Run, RunResults, is_number, mapping, message_of
from .settings_diff import ABSENT, Setting, differing, settings_of_run

Content = dict[str, Any]  # of a section, by the arguments of its macro
HEADLINES = (
    "knn_k20", "linear", "logistic", "map", "label_map", "r2", "top1", "top5", "mAP", "miou",
    "pixel_accuracy", "mean_class_accuracy", "box_AP", "box_AP50", "mask_AP", "mask_AP50",
)  # fmt: skip
MAX_BAD = 200
PILLS = {"finished": "good", "running": "busy", "failed": "bad"}  # by state; others `warn`


class Tile(NamedTuple):
    """An important number."""

    name: str
    value: str
    below: Sequence[str]  # lines


def headline(run: Run) -> Content:
    """State, health and the most important numbers."""
    facts = [run.model, run.data]
    if run.transfer:
        facts.insert(0, run.transfer)
    if (seconds := run.seconds()) is not None:
        facts.append(f"{duration_in_words(seconds)} of training")
    epochs = run.last("epoch")
    facts.append(f"{run.step:,} steps" + (f", {epochs:.3g} epochs" if epochs is not None else ""))
    return {
        "facts": " · ".join(facts),
        "pills": [
            (PILLS.get(run.state, "warn"), run.words),
            *([] if run.transfer else [health_pill(run)]),
        ],
        "tiles": list(tiles_of(run)),
        "problems": run.problems,
        "data_changes": data_changes(run),
    }


def headlines(runs: Sequence[Run]) -> Content:
    """That of each run, with its colour in the figures."""
    pairs = zip(runs, COLOURS, strict=False)
    return {"runs": [{"name": r.name, "colour": c, "headline": headline(r)} for r, c in pairs]}


def data_changes(run: Run) -> list[str]:
    """Where a run went on with other images (`resume.data=changed`), in words."""
    changes = run.about.get("data_changes")
    return [
        f"after step {change.get('step')}: {key}: {words}"
        for change in (changes if isinstance(changes, list) else [])
        if isinstance(change, dict) and isinstance(change.get("data"), dict)
        for key, words in change["data"].items()
    ]


def health_pill(run: Run) -> tuple[str, str]:
    """The verdict on collapse, or that there is none."""
    verdict = run.summary.get("health")
    if verdict is None and (last := run.last("healthy")) is not None:
        verdict = HEALTHY if last == 1.0 else "not healthy at the last step"
    if verdict is None:
        return "", "health not judged"
    steps = sum(value == 0.0 for value in run.curves.get("healthy", ([], []))[1])
    if verdict == HEALTHY and steps:
        return "warn", f"healthy at the end, {steps} reports were not"
    return "good" if verdict == HEALTHY else "warn", str(verdict)


def tiles_of(run: Run) -> Iterator[Tile]:
    """Up to four numbers, each with its interval and the best baseline; without any the loss."""
    if run.results is None:
        for metric, name in (("knn_k20", label_of("knn_k20")), ("loss", "loss")):
            if (last := run.last(metric)) is not None:
                yield Tile(name, f"{last:.4g}", ["at the last report"])
        return
    _, values, intervals = run.results.backbone
    known = [m for m in HEADLINES if m in values]
    for metric in (known or [m for m in values if is_percent(m)])[:4]:
        interval = intervals.get(metric)
        below = f"95 %: {interval_text(metric, interval)}" if interval else "no interval"
        baseline = best_baseline(run.results, metric)
        value = format_value(metric, values[metric])
        yield Tile(title_of(metric).strip(), value, [below, *([baseline] if baseline else [])])


def best_baseline(results: RunResults, metric: str) -> str:
    """`colour histogram: 81.1`."""
    *baselines, _ = results.numbers.items()
    known = {row: values[metric] for row, values in baselines if metric in values}
    best = max(known, key=lambda row: known[row], default="")
    return f"{best}: {format_value(metric, known[best])}" if known else ""


def results_section(features: Sequence[RunFeatures]) -> Content:
    """Final numbers with intervals; of several runs also differences. Raises UserError for none."""
    runs = [each.run for each in features]
    measured = [(run.name, run.results) for run in runs if run.results is not None]
    words = "in %. Bars are 95 % intervals over the test images."
    tables = [
        (f"{'also' if run.transfer else 'on other data'}: {r.source}", results_table(r))
        for run in runs
        for r in run.elsewhere
    ]
    if len(runs) > 1:
        notes, tables = [f"I{words[1:]}"], [("all numbers", comparison_table(measured))]
    elif measured:
        ((_, results),) = measured
        notes = [f"From {results.source}, {words}"]
        tables.insert(0, ("all numbers", results_table(results)))
    elif tables:
        notes = ["On the run's own data nothing is measured yet."]
    else:
        raise UserError(
            "final numbers are measured at the end of a run that has labelled images, or by "
            "ssl-xcit eval"
        )
    if measured and (missing := [run.name for run in runs if run.results is None]):
        notes.append(f"Without final numbers: {', '.join(missing)}.")
    return {
        "notes": notes,
        "figure": numbers_figure(measured) if measured else None,
        "tables": tables,
        "differences": [paired_differences(features[0], other) for other in features[1:]],
    }


def results_table(results: RunResults) -> Table:
    """A row a metric, a column for each baseline, then the backbone with its interval."""
    rows, (_, _, intervals) = results.numbers, results.backbone
    cells = [
        [
            title_of(metric),
            *(cell_text(metric, values) for values in rows.values()),
            interval_text(metric, intervals.get(metric)),
        ]
        for metric in metrics_of(rows)
    ]
    return Table(["", *rows, "95 %"], cells, "numeric")


def comparison_table(measured: Sequence[tuple[str, RunResults]]) -> Table:
    """A row a metric, for each run a column and one with its interval; UserError for no run."""
    if not measured:
        raise UserError("no run has final numbers")
    backbones = {name: results.backbone for name, results in measured}
    cells = []
    for metric in metrics_of({name: values for name, (_, values, _) in backbones.items()}):
        row = [title_of(metric)]
        for _, values, intervals in backbones.values():
            row += [cell_text(metric, values), interval_text(metric, intervals.get(metric))]
        cells.append(row)
    headings = ["", *(word for name in backbones for word in (name, "95 %"))]
    return Table(headings, cells, "numeric")


def paired_differences(one: RunFeatures, two: RunFeatures) -> Content:
    """Second run minus the first, by image: as `ssl-xcit eval` left it, else k-NN alone."""
    title, words, command = f"{two.run.name} - {one.run.name}", "", ""
    differences = recorded_differences(one.run, two.run)
    kinds = one.run.transfer, two.run.transfer
    if differences:
        words = "From comparison.json."
    elif any(kinds):
        words = "Not compared image by image. The intervals are each run's own."
        if kinds[0] == kinds[1]:
            command = shlex.join(["ssl-xcit", "eval", f"ckpt=[{one.run.path},{two.run.path}]"])
    else:
        try:
            differences = paired_knn(one, two)
            if others := [run.name for run in (one.run, two.run) if knn_kind(run) != "cls"]:
                words = f"Of class tokens; the numbers above of {' and '.join(others)} are of "
                words += "features that were chosen, which this command compares:"
            command = shlex.join(["ssl-xcit", "eval", f"ckpt=[{one.run.path},{two.run.path}]"])
        except Exception as error:
            words = f"Not compared image by image: {message_of(error)}. "
            words += "The intervals are each run's own."
    rows = difference_rows(differences, 2)
    table = Table(DIFFERENCE_HEADINGS, rows, "numeric") if rows else None
    return {"title": title, "words": words, "table": table, "command": command}


def knn_kind(run: Run) -> str:
    """What the run's final k-NN was measured on."""
    rows = list(mapping(run.summary.get("results")))
    if not rows:
        return "cls"
    chosen = mapping(mapping(run.summary.get("chosen")).get(rows[-1]))  # behind the baselines
    return str(mapping(chosen.get("knn")).get("kind", "cls"))


def recorded_differences(one: Run, two: Run) -> dict[str, Difference]:
    """Those of `comparison.json` beside the first run, if about both runs' newest weights."""
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


def settings_section(runs: Sequence[Run]) -> Content:
    """Settings that are not the defaults, then all of them; of several runs those that differ."""
    if len(runs) > 1:
        rows = [[key, *values] for key, values in differing(runs)]
        changed = Table(["setting", *(run.name for run in runs)], rows, "changed", 1 + len(runs))
        words = "The runs have the same settings."
        return {"notes": [], "words": words, "changed": changed, "everything": None}
    (run,) = runs
    if not run.config and not run.choices:
        raise UserError("neither config.yaml nor run.json can be read")
    settings, notes = settings_of_run(run)
    settings.sort(key=lambda setting: not setting.changed)
    return {
        "notes": notes,
        "words": "Everything is as it is by default.",
        "changed": settings_table([s for s in settings if s.changed], "changed"),
        "everything": settings_table(settings, "settings"),
    }


def settings_table(settings: Sequence[Setting], kind: str) -> Table:
    """Key, value, default, and who chose it."""
    rows = [[s.key, s.value, s.default if s.changed else "", chosen_by(s)] for s in settings]
    return Table(["setting", "value", "default", ""], rows, kind, code=3)


def chosen_by(setting: Setting) -> str:
    """Who has chosen a setting that is not the default."""
    if not setting.changed:
        return ""
    if ABSENT in (setting.value, setting.default) and not setting.typed:
        return "of another version"
    return "typed" if setting.typed else "by the run"


def environment_section(runs: Sequence[Run]) -> Content:
    """Versions and machines of the runs, and of this report."""
    rows = []
    for key, now in (("versions", versions()), ("machine", machine())):
        columns = [mapping(run.about.get(key)) for run in runs]
        old = [name for column in columns for name in column] if key == "versions" else []
        rows += [
            [name, *(str(column.get(name, "")) for column in (*columns, now))]
            for name in dict.fromkeys([*old, *now])
        ]
    return {"content": Table(["", *(run.name for run in runs), "this report"], rows)}


def commands_section(runs: Sequence[Run]) -> Content:
    """Commands to make the run again, and to evaluate it: words, and lines for a shell."""

    def lines(*commands: list[str]) -> list[str]:
        return [shlex.join(["ssl-xcit", *command]) for command in commands]

    of_runs = []
    for name, run in named(runs):
        groups = []
        if run.about:
            again = "goes on where it stopped" if run.state != FINISHED else "makes the run again"
            words = f"In the folder where it was made, or with another name=, this {again}:"
            groups.append((words, lines([run.command, *run.overrides])))
        folder = str(run.path)
        pictures = "predict" if run.transfer else "visualize"
        images = ["images=DIR"] if run.transfer else []
        own = lines(["eval", f"ckpt={folder}"], [pictures, f"ckpt={folder}", *images],
                    ["report", f"run={folder}"])  # fmt: skip
        groups.append(("Measure, look at pictures, write this page again:", own))
        of_runs.append((name, groups))
    if len(runs) > 1:
        folders = f"[{','.join(str(run.path) for run in runs)}]"
        both = lines(["report", f"runs={folders}"])
        words = "Write this page again:"
        if len({run.transfer for run in runs}) == 1:
            both = lines(["eval", f"ckpt={folders}"]) + both
            words = "Compare image by image, write this page again:"
        of_runs.append(("", [(words, both)]))
    return {"runs": of_runs}


def bad_section(features: Sequence[RunFeatures]) -> Content:
    """Images and annotations that could not be used, and why."""
    names = named([each.run for each in features])
    return {
        "runs": [
            (name, [bad_images(run), *([more] if (more := left_out(each)) else [])])
            for (name, run), each in zip(names, features, strict=True)
        ]
    }


def bad_images(run: Run) -> Content:
    """How many of a run, of which kinds, and the first of them."""
    if not run.bad:
        return {"words": "Every image that was needed could be read.", "table": None}
    kinds = Counter(kind_of(row.reason) for row in run.bad)
    total = run.plan.get("num_images")
    of = f" of {total:,}" if isinstance(total, int) else ""
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    more = f" (the first {MAX_BAD}; all are in {FILE})" if len(run.bad) > MAX_BAD else ""
    rows = [[row.name, row.reason] for row in run.bad[:MAX_BAD]]
    return {
        "words": f"{len(run.bad):,}{of} images could not be used: {counted}.",
        "title": f"which{more}",
        "table": Table(["file", "reason"], rows, code=1),
    }
