"""Evaluation while training: at intervals, at a bounded cost, without an effect on the run."""

import json
import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from ssl_xcit.training.checkpoint import failure_of
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.utils.files import write_json

log = logging.getLogger(__name__)
BEST = "best.ckpt"


class PeriodicEvaluation(lightning.Callback):
    """Numbers every `every_steps` steps, to every logger and to the progress bar.

    No random number is drawn and BatchNorm statistics stay, so a run with it equals one without. It
    is off when the run has no labelled images. Beside the numbers it logs `online_seconds`, what an
    evaluation took, and `online_share`, the part of the training time that all have taken.

    Args:
        every_steps: steps between two evaluations.
        eval_budget: share of the training time that evaluation may take: after the first, one that
            would exceed it is skipped; None: none is.
        best: the number by whose highest value `checkpoints/best.ckpt` is kept, of the steps that
            were evaluated; None: none is.
    """

    def __init__(self, every_steps: int, eval_budget: float | None, best: str | None):
        self.every_steps = every_steps
        self.eval_budget = eval_budget
        self.best = best
        self.best_value = -np.inf
        self.wanted = False
        self.started = self.spent = self.last = 0.0
        self.done = self.left_out = 0
        self.warned = False

    @abstractmethod
    def choose_images(self, eval_data: Any) -> bool:
        """Choose those to evaluate on; whether there are any."""

    @abstractmethod
    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, float]:
        """Numbers by name, on rank 0."""

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Choose the images, and look up what was best before."""
        self.wanted = self.choose_images(data_of(trainer).eval_data)
        self.started = time.monotonic()
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.best_file(trainer).read_text())
            self.last = float(content["seconds"])
            # a run that goes on from before its best finds it again
            if content["metric"] == self.best and content["step"] <= trainer.global_step:
                self.best_value = float(content["value"])

    def best_file(self, trainer: lightning.Trainer) -> Path:
        """The file that says why `best.ckpt` is the best."""
        return Path(trainer.default_root_dir) / "checkpoints" / "best.json"

    def affordable(self, trainer: lightning.Trainer) -> bool:
        """Whether another evaluation stays within the budget; all ranks get rank 0's answer."""
        training = time.monotonic() - self.started - self.spent
        fits = (
            self.eval_budget is None
            or not self.last
            or self.spent + self.last <= self.eval_budget * (training + self.spent)
        )
        return bool(trainer.strategy.broadcast(fits))

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Evaluate every `every_steps` steps; the end of the run has an evaluation of its own."""
        step = trainer.global_step
        if not self.wanted or step % self.every_steps or step == trainer.max_steps:
            return
        if not self.affordable(trainer):
            self.left_out += 1
            return
        began = time.monotonic()
        values = self.measured(trainer, module)
        self.last = time.monotonic() - began
        self.spent += self.last
        self.done += 1
        if trainer.is_global_zero:
            share = self.spent / (time.monotonic() - self.started)
            cost = {"online_seconds": self.last, "online_share": share}
            for logger in trainer.loggers:
                logger.log_metrics({**values, **cost}, step)
            shown = {k: v for k, v in values.items() if k == self.best} or values
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in shown.items()})
        if self.best is not None and not module.guard.in_a_row:
            self.keep_best(trainer, values)

    def keep_best(self, trainer: lightning.Trainer, values: Mapping[str, float]) -> None:
        """Save `best.ckpt` when its number is the highest so far; all ranks write it together."""
        if trainer.is_global_zero and self.best not in values and not self.warned:
            self.warned = True
            log.warning(
                "callbacks.online.best=%s is not measured, so no best.ckpt is kept: set it to "
                "null or one of %s", self.best, ", ".join(values),
            )  # fmt: skip
        value = float(trainer.strategy.broadcast(values.get(self.best or "", -np.inf)))
        if value <= self.best_value:
            return
        trainer.save_checkpoint(self.best_file(trainer).with_name(BEST))
        files: Any = trainer.strategy.checkpoint_io
        error = failure_of(files.last)
        if trainer.is_global_zero and error is None:
            content = {"step": trainer.global_step, "metric": self.best, "value": value}
            try:
                write_json({**content, "seconds": self.last}, self.best_file(trainer))
            except OSError as problem:
                error = problem
        if trainer.strategy.broadcast(error is None):
            self.best_value = value
        if trainer.is_global_zero and error is not None:
            log.error("%s could not be written (%s); training goes on", BEST, error)

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Warn of evaluations that the budget did not allow."""
        if self.left_out and trainer.is_global_zero:
            log.warning(
                "online evaluation ran %d times and was left out %d times: one takes %.1f s, and "
                "callbacks.online.eval_budget=%g of the training time is its limit; fewer "
                "callbacks.online.max_images cost less, eval_budget=null sets no limit",
                self.done, self.left_out, self.last, self.eval_budget,
            )  # fmt: skip
