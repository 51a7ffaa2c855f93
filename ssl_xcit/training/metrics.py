"""Metrics by step: computed every few steps, written to `metrics.csv` and to whatever logger is
on.
"""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ssl_xcit.errors import UserError
from ssl_xcit.training.module import DINO


class CSVMetrics(Logger):
    """`RUN/metrics.csv`, one row a report; a resumed run goes on in the same file, without a step
    twice.

    Columns appear as their first value does. Rows at or after the first step of a resumed run are
    dropped, for they are made again.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, str]] = []
        self.resumed = self.path.is_file()
        if self.resumed:
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                self.rows = list(reader)

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder has `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; numbers are written so that they read back the same."""
        step = step or 0
        rewrite = False
        if self.resumed:
            kept = [row for row in self.rows if int(row["step"]) < step]
            rewrite, self.rows, self.resumed = len(kept) < len(self.rows), kept, False
        new = [name for name in metrics if name not in self.columns]
        self.columns += new
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self.rows.append(row)
        if rewrite or new or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(".metrics.csv.part")
            part.write_text(self._lines(self.rows, header=True))
            part.replace(self.path)
        else:
            with self.path.open("a") as file:
                file.write(self._lines([row]))

    def _lines(self, rows: list[dict[str, str]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class LogMetrics(lightning.Callback):
    """Loss, schedules, teacher entropy and speed to every logger, every so many steps and at the
    last one.

    Args:
        every_steps: steps between two reports.
    """

    def __init__(self, every_steps: int = 10):
        if every_steps < 1:
            raise UserError(f"callbacks.metrics.every_steps={every_steps}: starts at 1")
        self.every_steps = every_steps
        self.since = time.perf_counter()
        self.images = 0

    def on_train_start(self, *_: object) -> None:
        """Start the clock."""
        self.since, self.images = time.perf_counter(), 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: list[torch.Tensor],
        batch_idx: int,
    ) -> None:
        """Report after the step's end; `step` counts the steps done."""
        assert isinstance(module, DINO)
        self.images += batch[0].shape[1] * trainer.world_size
        step = trainer.global_step
        if step % self.every_steps and step != trainer.max_steps:
            return
        now = time.perf_counter()
        metrics = {
            "epoch": trainer.datamodule.passes(step),  # type: ignore[attr-defined]
            "loss": outputs["loss"].item(),
            "grad_norm": outputs["grad_norm"].item(),
            **teacher_entropy(outputs["targets"]),
            "lr": module.schedules.lr(step - 1),
            "weight_decay": module.schedules.weight_decay(step - 1),
            "ema": module.schedules.ema(step - 1),
            "teacher_temp": module.schedules.teacher_temp(step - 1),
            "images_per_second": self.images / (now - self.since),
        }
        self.since, self.images = now, 0
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def teacher_entropy(targets: torch.Tensor) -> dict[str, float]:
    """Mean entropy of the teacher's rows in nats, and as a share of ln K: 1 is uniform, 0 is
    one-hot.
    """
    entropy = -(targets * targets.clamp_min(1e-12).log()).sum(-1).mean().item()
    return {
        "teacher_entropy": entropy,
        "teacher_entropy_share": entropy / math.log(targets.shape[-1]),
    }
