"""Write the report of a run, or of several compared: one HTML file that opens anywhere.

A run writes it by itself when it ends (`report:` in `conf/pretrain.yaml`). Whatever of a run is
missing or damaged, the rest is shown, and the page says what is not there and why.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.utils.tables import shown_in_terminal

from ..viz.markup import render_macro
from . import head_sections, image_sections, sections
from .figures import curve_groups
from .page import Part, make_part, write_page
from .run_features import ReportOptions, RunFeatures, for_each_run
from .run_reader import Run, read_run, tell_apart

NAME = "report.html"
Content = dict[str, Any]  # of a section, by the arguments of its macro
OF_TASKS = ("predictions", "classes")
OF_FEATURES = ("pictures", "channels", "neighbours", "atlas")  # tasks are shown without, if need be
KINDS = {  # words above the title, by the kind of task
    None: "pretraining",
    "classification": "image classification",
    "segmentation": "semantic segmentation",
    "detection": "object detection",
}


def curves_section(features: Sequence[RunFeatures]) -> Content:
    """Figures over steps; raises UserError where no run has metrics."""
    runs = [each.run for each in features]
    if not any(run.curves for run in runs):
        raise UserError("there are no metrics: metrics.csv is missing or empty")
    return {"groups": curve_groups(runs, [each.num_online() for each in features])}


def report_parts(features: Sequence[RunFeatures]) -> list[Part]:
    """The sections in the order of the page; one that fails does not stop the others."""
    runs = [each.run for each in features]
    tasks = [each for each in features if each.run.transfer]
    # of a backbone that was trained by its maps the class token means nothing
    with_features = [f for f in features if f.run.transfer in (None, "classification")]
    numbers = {id(each): number for number, each in enumerate(features)}

    def of_each(some: Sequence[RunFeatures], make: Callable[[RunFeatures], Content]) -> Content:
        made, errors = for_each_run(some, make)
        several = len(features) > 1
        return {"runs": [(f.run.name if several else "", c) for f, c in made], "notes": errors}

    def atlas(run: RunFeatures) -> Content:
        return image_sections.atlas_section(run, numbers[id(run)], len(numbers))

    makers: list[tuple[str, str, Callable[[], Content]]] = [
        ("results", "Final numbers", lambda: sections.results_section(features)),
        ("predictions", "Predictions beside the truth",
         lambda: of_each(tasks, head_sections.predictions_section)),
        ("classes", "Right and wrong", lambda: of_each(tasks, head_sections.classes_section)),
        ("curves", "Curves", lambda: curves_section(features)),
        ("pictures", "What it looks at", lambda: image_sections.pictures_section(with_features)),
        ("channels", "Channel attention", lambda: image_sections.channels_section(with_features)),
        ("neighbours", "Nearest neighbours",
         lambda: of_each(with_features, image_sections.neighbours_section)),
        ("atlas", "Map of the images", lambda: of_each(with_features, atlas)),
        ("settings", "Settings", lambda: sections.settings_section(runs)),
        ("commands", "Commands", lambda: sections.commands_section(runs)),
        ("environment", "Environment", lambda: sections.environment_section(runs)),
        ("bad", "Bad images", lambda: sections.bad_section(features)),
    ]  # fmt: skip
    if not tasks:
        makers = [maker for maker in makers if maker[0] not in OF_TASKS]
    if not with_features:
        makers = [maker for maker in makers if maker[0] not in OF_FEATURES]
    parts = [make_part(*maker) for maker in makers]
    if len(tasks) < len(features):
        return parts
    return [part for part in parts if part.html or part.ident not in OF_FEATURES]


def write_report(runs: Sequence[Run], options: ReportOptions, out: Path) -> list[Part]:
    """Write the file, whole or not at all; returns its sections."""
    tell_apart(runs)
    parts = report_parts([RunFeatures(run, options) for run in runs])
    title, over = " · ".join(run.name for run in runs), f"{len(runs)} runs compared"
    if len(runs) > 1:
        head = render_macro("sections.html", "headlines", **sections.headlines(runs))
    else:
        over = f"ssl_xcit {KINDS[runs[0].transfer]}"
        head = render_macro("sections.html", "headline", **sections.headline(runs[0]))
    write_page(out, title, over, head, parts)
    return parts


def write_run_report(run_dir: Path, device: str = "auto", num_workers: int | None = None) -> Path:
    """Write `RUN/report.html`, as a run does when it ends."""
    out = Path(run_dir) / NAME
    options = ReportOptions(device=device, num_workers=num_workers, show=shown_in_terminal())
    write_report([read_run(Path(run_dir))], options, out)
    return out
