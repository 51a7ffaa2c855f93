"""Write the report of a run, or of several compared: one HTML file that opens anywhere.

A run writes it by itself when it ends (`report:` in `conf/pretrain.yaml`). Whatever of a run is
missing or damaged, the rest is shown, and the page says what is not there and why.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.tables import shown_in_terminal

from ..viz.markup import asset, esc
from . import curves, sections
from .dataset_sections import atlas_section, neighbours_section, of_each
from .image_sections import entropy_data, pictures_section
from .page_layout import Part, report_page
from .run_features import ReportOptions, RunFeatures
from .run_reader import Run, message_of, read_run, tell_apart

log = logging.getLogger(__name__)
NAME = "report.html"
Made = tuple[str, Mapping[str, Any]]  # HTML, and data for the script


class Report:
    """The parts of a report, made one after another; one that fails does not stop the others."""

    def __init__(self, runs: Sequence[Run], options: ReportOptions):
        tell_apart(runs)
        self.runs = runs
        self.features = [RunFeatures(run, options) for run in runs]
        self.parts: list[Part] = []

    def make(self) -> list[Part]:
        """Make all of them, in the order of the page."""
        runs, features = self.runs, self.features
        self.add("results", "Final numbers", lambda: sections.results_section(runs, features))
        self.add("curves", "Curves", self.curves)
        self.add("pictures", "What it looks at", lambda: (pictures_section(features), {}))
        self.add("channels", "Channel attention", self.channels)
        self.add("neighbours", "Nearest neighbours",
                 lambda: (of_each(features, neighbours_section), {}))  # fmt: skip
        self.add("atlas", "Map of the images", self.atlas)
        self.add("settings", "Settings", lambda: (sections.settings_section(runs), {}))
        self.add("commands", "Commands", lambda: (sections.commands_section(runs), {}))
        self.add("environment", "Environment", lambda: (sections.environment_section(runs), {}))
        self.add("bad", "Bad images", lambda: (sections.bad_section(runs), {}))
        return self.parts

    def add(self, ident: str, title: str, make: Callable[[], Made]) -> None:
        """Add a part, or why there is none."""
        part, started = Part(ident, title), time.perf_counter()
        self.parts.append(part)
        try:
            part.html, data = make()
            part.data = dict(data)
        except Exception as error:  # a partial report is worth more than none
            known = isinstance(error, UserError | OSError)
            part.trouble = (
                message_of(error) if known else f"{type(error).__name__}: {message_of(error)}"
            )
            log.warning("report: %s: %s", title, part.trouble)
            log.debug("", exc_info=error)
        part.seconds = time.perf_counter() - started

    def atlas(self) -> Made:
        """A map of the images for each run, with the style and the script that it needs."""
        numbers = {id(features): number for number, features in enumerate(self.features)}
        part = self.parts[-1]
        part.head, part.script = asset("atlas.css"), asset("atlas.js")
        count = len(numbers)
        return of_each(self.features, lambda run: atlas_section(run, numbers[id(run)], count)), {}

    def curves(self) -> Made:
        """Figures over steps.

        Raises:
            UserError: no run has metrics.
        """
        if not any(run.curves for run in self.runs):
            raise UserError("there are no metrics: metrics.csv is missing or empty")
        groups = curves.figure_groups(self.runs, [run.num_online() for run in self.features])
        html = []
        for number, group in enumerate(groups):
            figures = "".join(
                f'<div class="figure small" data-figure="curves" data-group="{number}" '
                f'data-plot="{place}"></div>'
                for place in range(len(group["plots"]))
            )
            html.append(f'<h3>{esc(group["title"])}</h3><div class="figures">{figures}</div>')
        hint = (
            '<p class="hint drag">Drag to enlarge a stretch of steps in all figures, double-click '
            "to go back.</p>"
        )
        names = [run.name for run in self.runs]
        return hint + "".join(html), {"curves": groups, "runs": names}

    def channels(self) -> Made:
        """Entropy of channel attention over depth and training."""
        entropy = entropy_data(self.features)
        hint = (
            '<p class="hint">Entropy of the d x d matrices of cross-covariance attention over ln '
            "d: at 1 every channel mixes all channels alike, at 0 it takes one.</p>"
        )
        return hint + '<div class="figure" data-figure="entropy"></div>', {"entropy": entropy}

    def html(self) -> str:
        """The page."""
        parts = self.make()
        if len(self.runs) == 1:
            title, over = self.runs[0].name, "ssl_xcit pretraining"
            head = sections.headline(self.runs[0])
        else:
            title = " · ".join(run.name for run in self.runs)
            over = f"{len(self.runs)} runs compared"
            head = "".join(
                f'<div class="of-run"><h2 class="run" data-run="{n}">{esc(run.name)}</h2>'
                f"{sections.headline(run)}</div>"
                for n, run in enumerate(self.runs)
            )
        return report_page(title, over, head, parts, f"{datetime.now():%Y-%m-%d %H:%M}")


def write_report(runs: Sequence[Run], options: ReportOptions, out: Path) -> Report:
    """Write the file, whole or not at all."""
    report = Report(runs, options)
    text = report.html()
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")
    return report


def write_run_report(run_dir: Path, device: str = "auto", num_workers: int | None = None) -> Path:
    """Write `RUN/report.html`, as a run does when it ends."""
    out = Path(run_dir) / NAME
    options = ReportOptions(device=device, num_workers=num_workers, show=shown_in_terminal())
    write_report([read_run(Path(run_dir))], options, out)
    return out
