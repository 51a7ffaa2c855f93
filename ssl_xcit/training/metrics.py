"""Metrics every few steps, written to `metrics.csv` and to whatever logger is on."""

import csv
import io
import logging
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ssl_xcit.training.datamodule import TrainingData, data_of
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.hardware import default_workers
from ssl_xcit.utils.validation import Count, Share

log = logging.getLogger(__name__)
JUDGED_STEPS = 50  # after so many the share of waiting is judged


class CSVMetrics(Logger):
    """`RUN/metrics.csv`, one row a report; a resumed run goes on in the same file, without a step
    twice.

    Columns appear as their first value does. Rows at or after the first step of a resumed run are
    dropped, for they are made again.
    """

    name = "csv"
    version = ""

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, str]] = []
        self.failed = False
        self.begun = False

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder has `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; numbers are written so that they read back the same."""
        step = step or 0
        rewrite = False
        if not self.begun:  # not before, for until the run folder is locked others may write
            self.begun = True
            rewrite = self.read_until(step)
        new = [name for name in metrics if name not in self.columns]
        self.columns += new
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self.rows.append(row)
        try:
            if rewrite or new or self.failed or not self.path.exists():
                with replacing(self.path) as part:
                    part.write_text(self._lines(self.rows, header=True))
            else:
                with self.path.open("a") as file:
                    file.write(self._lines([row]))
            self.failed = False
        except OSError as error:  # all rows are written with the next one
            if not self.failed:
                log.error("%s could not be written (%s); training goes on", self.path, error)
            self.failed = True

    def read_until(self, step: int) -> bool:
        """Take over the rows before a step; whether the file holds anything else."""
        if not self.path.is_file():
            return False
        text = self.path.read_text()
        reader = csv.DictReader(io.StringIO(text))
        rows = list(reader)
        self.columns = list(reader.fieldnames or self.columns)
        whole = text.endswith("\n")
        if not whole:  # a killed process, or a full disk, has cut the last line
            rows = rows[:-1]
        self.rows = [row for row in rows if int(row["step"]) < step]
        return not whole or len(self.rows) < len(rows)

    def _lines(self, rows: list[dict[str, str]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class LogMetrics(lightning.Callback):
    """Loss, schedules, health, speed and waiting for data to every logger, every so many steps and
    at the last one.

    Time counts from a batch's arrival to the step's end, and while a batch is waited for; what
    other callbacks take, such as online evaluation, does not.

    Args:
        every_steps: steps between two reports.
        max_data_wait: share of the time spent waiting for data above which it is said, once, what
            to change.
    """

    def __init__(self, every_steps: Count = 10, max_data_wait: Share = 0.1):
        self.every_steps = every_steps
        self.max_data_wait = max_data_wait
        self.report = Clock()
        self.whole = Clock()
        self.advised = False
        self.began = 0.0

    def on_train_start(self, *_: object) -> None:
        """No step is counted yet."""
        self.report, self.whole = Clock(), Clock()

    def on_train_batch_start(self, *_: object) -> None:
        """The batch has arrived."""
        self.began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: Any,
        *_: object,
    ) -> None:
        """Report after the step's end; `step` counts the steps done."""
        data = data_of(trainer)
        step = trainer.global_step
        reporting = step % self.every_steps == 0 or step == trainer.max_steps
        if reporting:
            module.output.loss.item()  # whatever the device has not done yet belongs to this time
        busy, images = time.perf_counter() - self.began, data.batch_size * trainer.world_size
        for clock in (self.report, self.whole):
            clock.add(busy, data.running_loader.waited, images)
        if not reporting:
            return
        of_module = module.report(step)  # of all ranks
        if not trainer.is_global_zero:
            return
        metrics = {
            "epoch": data.passes(step),
            "loss": module.output.loss.item(),
            "grad_norm": module.output.grad_norm.item(),
            **of_module,
            "images_per_second": self.report.images_per_second(),
            "data_wait": self.report.wait_share(),
            "bad_images": len(data.bad),
            "skipped_steps": module.guard.skipped,
        }
        self.report = self.report.next()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        self.advise(trainer, data)

    def advise(self, trainer: lightning.Trainer, data: TrainingData[Any]) -> None:
        """Say once that training starves, when enough steps have shown it."""
        share = self.whole.wait_share()
        if self.whole.steps < JUDGED_STEPS:
            return
        self.whole = self.whole.next()
        if share > self.max_data_wait and not self.advised and trainer.is_global_zero:
            self.advised = True
            log.warning(
                "%.0f %% of the time is spent waiting for data: %s",
                100.0 * share, more_data(data.num_workers, trainer.num_devices),
            )  # fmt: skip


class Clock:
    """Seconds of work and of waiting over some steps.

    Args:
        waited_before: the loader's count of seconds when these steps began; None: its count at the
            first of them, for the start of the loader is no fault of its.
    """

    def __init__(self, waited_before: float | None = None):
        self.waited_before = waited_before
        self.waited = 0.0
        self.busy = 0.0
        self.images = 0
        self.steps = 0

    def add(self, busy: float, waited: float, images: int) -> None:
        """One step; `waited` is the loader's count so far."""
        if self.waited_before is None:
            self.waited_before = waited
        self.waited = waited - self.waited_before
        self.busy += busy
        self.images += images
        self.steps += 1

    def next(self) -> "Clock":
        """Of the steps that follow."""
        return Clock((self.waited_before or 0.0) + self.waited)

    def wait_share(self) -> float:
        """Of the time, 0..1."""
        return self.waited / max(self.busy + self.waited, 1e-9)

    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.images / max(self.busy + self.waited, 1e-9)


def more_data(num_workers: int, devices: int) -> str:
    """What to change when data come too slowly."""
    spare = default_workers(devices)
    if num_workers < spare:
        return f"num_workers={spare} (now {num_workers}) uses the cores that are there"
    return (
        f"the {num_workers} loader processes use the cores that are there; smaller images on disk, "
        "data=shards for a slow disk (ssl-xcit shard), augment=fused and fewer augment.num_local "
        "take less"
    )
