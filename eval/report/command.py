"""The command `report`: one HTML file about a run, or about several beside each other, that opens
anywhere.

A run writes it by itself when it ends (`report:` in `conf/pretrain.yaml`). Whatever of a run is
missing or damaged, the rest is shown, and the page says what is not there and why.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from os.path import commonpath
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from ssl_xcit.errors import UserError
from ssl_xcit.files import replacing, writable_folder, writable_or_here
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say

from ..settings import number
from ..views import atlas
from ..views.markup import esc
from . import curves, facts, looks
from .features import Options, Seen
from .page import Part, page
from .run import Run, one_line, read_run, tell_apart
from .sets import atlas_part, neighbours_part

log = logging.getLogger(__name__)
NAME = "report.html"
MAX_RUNS = 8
Made = tuple[str, Mapping[str, Any]]  # HTML, and data for the script


class Report:
    """The parts of a report, made one after another; one that fails does not stop the others.

    Args:
        runs: one, or several to compare.
        options: how images are looked at.
    """

    def __init__(self, runs: Sequence[Run], options: Options):
        tell_apart(runs)
        self.runs = runs
        self.seen = [Seen(run, options) for run in runs]
        self.parts: list[Part] = []

    def make(self) -> list[Part]:
        """All of them, in the order of the page."""
        runs, seen = self.runs, self.seen
        self.add("results", "Final numbers", lambda: facts.results_part(runs, seen))
        self.add("curves", "Curves", self.curves)
        self.add("pictures", "What it looks at", lambda: (looks.strip_part(seen), {}))
        self.add("channels", "Channel attention", self.channels)
        self.add("neighbours", "Nearest neighbours", lambda: (neighbours_part(seen), {}))
        self.add("atlas", "Map of the images", self.atlas)
        self.add("settings", "Settings", lambda: (facts.settings_part(runs), {}))
        self.add("commands", "Commands", lambda: (facts.commands_part(runs), {}))
        self.add("environment", "Environment", lambda: (facts.environment_part(runs), {}))
        self.add("bad", "Bad images", lambda: (facts.bad_part(runs), {}))
        return self.parts

    def add(self, ident: str, title: str, make: Callable[[], Made]) -> None:
        """A part, or why there is none."""
        part, started = Part(ident, title), time.perf_counter()
        self.parts.append(part)
        try:
            part.html, data = make()
            part.data = dict(data)
        except Exception as error:  # a partial report is worth more than none
            known = isinstance(error, UserError | OSError)
            part.trouble = (
                one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
            )
            log.warning("report: %s: %s", title, part.trouble)
            log.debug("", exc_info=error)
        part.seconds = time.perf_counter() - started

    def atlas(self) -> Made:
        """A map of the images for each run, with the style and the script that it needs."""
        html = atlas_part(self.seen)
        part = self.parts[-1]
        part.head, part.script = atlas.style(), atlas.script()
        return html, {}

    def curves(self) -> Made:
        """Figures over steps.

        Raises:
            UserError: no run has metrics.
        """
        if not any(run.curves for run in self.runs):
            raise UserError("there are no metrics: metrics.csv is missing or empty")
        found = curves.groups(self.runs, [seen.num_online() for seen in self.seen])
        html = []
        for number_, group in enumerate(found):
            figures = "".join(
                f'<div class="figure small" data-figure="curves" data-group="{number_}" '
                f'data-plot="{place}"></div>'
                for place in range(len(group["plots"]))
            )
            html.append(f'<h3>{esc(group["title"])}</h3><div class="figures">{figures}</div>')
        hint = (
            '<p class="hint drag">Drag to enlarge a stretch of steps in all figures, double-click '
            "to go back.</p>"
        )
        names = [run.name for run in self.runs]
        return hint + "".join(html), {"curves": found, "runs": names}

    def channels(self) -> Made:
        """Entropy of channel attention over depth and training."""
        found = looks.entropy_data(self.seen)
        hint = (
            '<p class="hint">Entropy of the d x d matrices of cross-covariance attention over ln '
            "d: at 1 every channel mixes all channels alike, at 0 it takes one.</p>"
        )
        return hint + '<div class="figure" data-figure="entropy"></div>', {"entropy": found}

    def html(self) -> str:
        """The page."""
        parts = self.make()
        if len(self.runs) == 1:
            title, over = self.runs[0].name, "ssl_xcit pretraining"
            head = facts.headline(self.runs[0])
        else:
            title = " · ".join(run.name for run in self.runs)
            over = f"{len(self.runs)} runs compared"
            head = "".join(
                f'<div class="of-run"><h2 class="run" data-run="{n}">{esc(run.name)}</h2>'
                f"{facts.headline(run)}</div>"
                for n, run in enumerate(self.runs)
            )
        return page(title, over, head, parts, f"{datetime.now():%Y-%m-%d %H:%M}")


def write_report(runs: Sequence[Run], options: Options, out: Path) -> Report:
    """The file, whole or not at all."""
    report = Report(runs, options)
    text = report.html()
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")
    return report


def write(run_dir: Path, device: str = "auto", num_workers: int | None = None) -> Path:
    """`RUN/report.html`, as a run writes it when it ends.

    Args:
        run_dir: the run folder.
        device: where the backbone looks at images.
        num_workers: loader processes; None: one a core, less one.
    """
    out = Path(run_dir) / NAME
    options = Options(device=device, num_workers=num_workers, show=shown_in_terminal())
    write_report([read_run(Path(run_dir))], options, out)
    return out


def folders_of(cfg: DictConfig) -> list[Path]:
    """Of `run` or `runs`.

    Raises:
        UserError: none, both, too many, or one twice.
    """
    given = cfg.runs if cfg.runs is not None else cfg.run
    words = [str(w) for w in given] if isinstance(given, ListConfig) else [str(given)]
    if (cfg.run is None) == (cfg.runs is None) or not words:
        raise UserError("name a run folder, run=runs/photos, or several, runs=[runs/a,runs/b]")
    if cfg.run is not None and len(words) > 1:
        raise UserError(f"run={cfg.run}: one folder; several are runs=[{','.join(words)}]")
    if len(words) > MAX_RUNS:
        raise UserError(f"runs: {len(words)} of them; at most {MAX_RUNS} can be told apart")
    folders = [Path(word).expanduser() for word in words]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"runs={cfg.runs}: one is named twice")
    return folders


def out_file(out: Any, folders: Sequence[Path]) -> Path:
    """Into the run folder; of several into the folder that they are in.

    Raises:
        UserError: `out` is no name of an HTML file.
    """
    if out is None:
        whole = [folder.resolve() for folder in folders]
        common = Path(commonpath(whole)) if len(whole) > 1 else folders[0]
        here = Path.cwd()
        if common == Path(common.anchor):  # they have nothing in common
            common = here
        return (common.relative_to(here) if common.is_relative_to(here) else common) / NAME
    path = Path(str(out)).expanduser()
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"out={out}: a file ending in .html")
    return path


def main(cfg: DictConfig) -> None:
    """`ssl-xcit report`: writes one HTML file."""
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    number("max_images", cfg.max_images, int, 2)
    if cfg.num_workers is not None:
        number("num_workers", cfg.num_workers, int, 0)
    folders = folders_of(cfg)
    out = out_file(cfg.out, folders)
    runs = [read_run(folder) for folder in folders]
    if cfg.out is None:
        out = writable_or_here(out.parent) / out.name
    else:
        try:
            writable_folder(out.parent)
        except UserError as error:
            raise UserError(f"{error}; out=FILE.html writes the page elsewhere") from error
    for run in runs:
        for problem in run.problems:
            log.warning("%s: %s", run.path, problem)
    options = Options(
        cfg.which, cfg.device, cfg.num_workers, cfg.max_images, show=shown_in_terminal()
    )
    write_report(runs, options, out)
    size = out.stat().st_size / 1e6
    say(f"written: {out} ({size:.1f} MB); open it in a browser")
