"""Commands from Python: the same settings as on the command line, a `Run` in return."""

import base64
import csv
import html
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_xcit import cli
from ssl_xcit.errors import UserError
from ssl_xcit.utils.tables import cell_text, metrics_of, title_of

if TYPE_CHECKING:
    from ssl_xcit.models.xcit import XCiT

INTERRUPTED = 130


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it was trained and measured to the end; otherwise the same call goes on."""
        return (self.folder / "summary.json").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """What a finished run leaves: results, plan, health, seconds, versions.

        Raises:
            UserError: it is not finished.
        """
        if not self.finished:
            raise UserError(f"{self.folder} is not finished: the same call goes on with it")
        return dict(json.loads((self.folder / "summary.json").read_text()))

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Final numbers, by row (baselines, `pretrained`) and metric, in percent."""
        return dict(self.summary["results"])

    @property
    def metrics(self) -> dict[str, list[float]]:
        """Columns of `metrics.csv`: losses, schedules, health, one value a report (nan: none)."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {key: [float(row[key] or "nan") for row in rows] for key in (rows or [{}])[0]}

    @property
    def backbone(self) -> "XCiT":
        """The momentum teacher's backbone at the end, in eval mode: images (B, channels, H, W) to
        features (B, C).
        """
        from ssl_xcit.models.weights import load_backbone

        return load_backbone(self.folder)

    def evaluate(self, **overrides: Any) -> dict[str, dict[str, float]]:
        """`ssl-xcit eval` of its weights with these settings: numbers by row and metric."""
        written = command("eval", ckpt=self.folder, **overrides)
        return dict(json.loads(Path(written).read_text())["results"])

    @property
    def report(self) -> Path:
        """Its page, `report.html`; made where there is none."""
        page = self.folder / "report.html"
        if not page.is_file():
            command("report", run=self.folder)
        return page

    def _repr_html_(self) -> str:
        """For notebooks: final numbers, and what the backbone attends to."""
        name = f"<code>{html.escape(str(self.folder))}</code>"
        if not self.finished:
            return f"<p>{name} is not finished: the same call goes on with it.</p>"
        rows = self.results
        head = "".join(f"<th>{html.escape(row)}</th>" for row in rows)
        lines = [
            [title_of(metric), *(cell_text(metric, row) for row in rows.values())]
            for metric in metrics_of(rows)
        ]
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>"
            for line in lines
        )
        pictures = sorted((self.folder / "pictures").glob("attention-*.jpg"))
        last = [p for p in pictures if p.stem.split("-")[1] == pictures[-1].stem.split("-")[1]]
        shown = "".join(
            '<img style="display:inline" height="120" alt="class attention" '
            f'src="data:image/jpeg;base64,{base64.b64encode(p.read_bytes()).decode()}">'
            for p in last
        )
        return f"<p>{name}</p><table><tr><th>%</th>{head}</tr>{body}</table>{shown}"


def pretrain(
    root: str | Path | list[str] | None = None, *, data: str | None = None, **overrides: Any
) -> Run:
    """Pretrain a backbone, as `ssl-xcit pretrain` does: the same call goes on with a run that was
    stopped, and returns at once when it is finished.

    Args:
        root: folder of images, or several; None: the built-in photographs.
        data: an option of `conf/data/`, such as `shards`; None: `folder` where there is a root.
        overrides: any setting: `model="xcit_nano_12_p16"`, `epochs=50`, `optim={"lr": 1e-3}`, or
            `**{"optim.lr": 1e-3}`. `ssl-xcit pretrain --help` lists them.

    Raises:
        UserError: a setting that there is not, or a wrong value; the message names the fix.
        RunFailed: training cannot go on.
        KeyboardInterrupt: Ctrl-C; what was learnt is saved.
    """
    given = {"data": data, "data.root": root}
    settings = {key: value for key, value in given.items() if value is not None}
    return Run(command("pretrain", **settings, **overrides))


def finetune(
    root: str | Path | None = None, *, ckpt: str | Path | Run | None = None, **overrides: Any
) -> Run:
    """Fine-tune on labelled images, as `ssl-xcit finetune` does.

    Args:
        root: labelled images; None: the built-in ones.
        ckpt: a run, a checkpoint, or the name of released weights; None: from scratch.
        overrides: any setting, see `pretrain`; `transfer="segmentation"` chooses the task.

    Raises:
        UserError: see `pretrain`, as of the others.
        RunFailed: likewise.
        KeyboardInterrupt: likewise.
    """
    start = ckpt.folder if isinstance(ckpt, Run) else ckpt
    given = {"data.root": root, "ckpt": start}
    settings = {key: value for key, value in given.items() if value is not None}
    return Run(command("finetune", **settings, **overrides))


def command(name: str, /, **overrides: Any) -> Any:
    """Run a command in this process with these settings, and return what its `main` returns.

    Raises:
        UserError: see `pretrain`, as of the others.
        RunFailed: likewise.
        KeyboardInterrupt: likewise.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        return cli.execute(name, [f"{key}={written(value)}" for key, value in flat(overrides)])
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise
    finally:  # a run that was stopped keeps its handlers until its process ends
        for number, handler in before.items():
            signal.signal(number, handler)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return str(value)
