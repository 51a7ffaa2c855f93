"""The command `report`: one HTML page about a run, or several compared."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import writable_folder, writable_or_here
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Network, Text, Workers

from ..evaluators.protocol import as_list
from ..report.report import NAME, write_report
from ..report.run_features import ReportOptions
from ..report.run_reader import read_run
from ..viz.markup import html_path

log = logging.getLogger(__name__)
MAX_RUNS = 8


@dataclass(frozen=True)
class ReportSettings:
    """`conf/report.yaml`."""

    main: str
    run: Text | Sequence[Text] | None
    runs: Text | Sequence[Text] | None
    which: Network
    max_images: Annotated[int, Ge(2)]
    num_workers: Workers
    device: str
    out: Text | None


def folders_of(run: Text | Sequence[Text] | None, runs: Text | Sequence[Text] | None) -> list[Path]:
    """The folders of `run` or `runs`; raises UserError for none, both, too many, or one twice."""
    words = [str(word) for word in as_list(run if runs is None else runs)]
    if (run is None) == (runs is None) or not words:
        raise UserError("name a run folder, run=runs/photos, or several, runs=[runs/a,runs/b]")
    if run is not None and len(words) > 1:
        raise UserError(f"run: one folder; several are runs=[{','.join(words)}]")
    if len(words) > MAX_RUNS:
        raise UserError(f"runs: {len(words)} of them; at most {MAX_RUNS} can be told apart")
    folders = [Path(word).expanduser() for word in words]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"runs=[{','.join(words)}]: one is named twice")
    return folders


def report_file(out: Text | None, folders: Sequence[Path]) -> Path:
    """The file of the page: in the run folder; of several in the folder that they are in."""
    if out is not None:
        return html_path(out)
    whole = [folder.resolve() for folder in folders]
    common = Path(commonpath(whole)) if len(whole) > 1 else folders[0]
    here = Path.cwd()
    if common == Path(common.anchor):  # they have nothing in common
        common = here
    return (common.relative_to(here) if common.is_relative_to(here) else common) / NAME


def main(settings: ReportSettings) -> None:
    """`ssl-xcit report`: writes one HTML file."""
    s = settings
    folders = folders_of(s.run, s.runs)
    out = report_file(s.out, folders)
    runs = [read_run(folder) for folder in folders]
    if s.out is None:
        out = writable_or_here(out.parent) / out.name
    else:
        try:
            writable_folder(out.parent)
        except UserError as error:
            raise UserError(f"{error}; out=FILE.html writes the page elsewhere") from error
    for run in runs:
        for problem in run.problems:
            log.warning("%s: %s", run.path, problem)
    options = ReportOptions(s.which, s.device, s.num_workers, s.max_images, shown_in_terminal())
    write_report(runs, options, out)
    say(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser")
