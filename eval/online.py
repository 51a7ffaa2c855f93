"""Evaluation while training: at intervals, at a bounded cost, without an effect on the run."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import lightning
import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import UserError
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.training.module import DINO
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.validation import Count, Network, Words

from .evaluators.protocol import Evaluator, kinds_of
from .features.cache import extract_pair
from .features.extractor import FeatureExtractor

log = logging.getLogger(__name__)
BEST = "best.ckpt"


class OnlineEvaluation(lightning.Callback):
    """Cheap evaluators every `every_steps` steps, all on features extracted once, to every logger
    and to the progress bar; ranks share the extraction.

    No random number is drawn and BatchNorm statistics stay, so a run with it equals one without. It
    is off when the run has no labelled images. Beside the numbers it logs `online_seconds`, what an
    evaluation took, and `online_share`, the part of the training time that all have taken.

    Args:
        every_steps: steps between two evaluations.
        max_images: of the training and of the test part each; evenly spaced ones are taken.
        eval_budget: share of the training time that evaluation may take: after the first, one that
            would exceed it is skipped; None: none is.
        networks: teacher, student or both; the student's numbers are called `student_...`.
        best: the number by whose highest value `checkpoints/best.ckpt` is kept, of the steps that
            were evaluated; None: none is.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator | None],
        every_steps: Count = 500,
        max_images: Annotated[int, Ge(2)] = 10_000,
        batch_size: Count = 64,
        eval_budget: Annotated[float, Gt(0), Le(1)] | None = 0.05,
        networks: Annotated[
            Sequence[Network], MinLen(1), Words("[teacher], [student] or [teacher,student]")
        ] = ("teacher",),
        best: str | None = "knn_k20",
    ):
        self.evaluators = {k: e for k, e in evaluators.items() if e is not None}
        if not self.evaluators:
            raise UserError(
                "callbacks.online.evaluators has none; ~callbacks.online switches it off"
            )
        self.every_steps = every_steps
        self.max_images = max_images
        self.batch_size = batch_size
        self.eval_budget = eval_budget
        self.networks = networks
        self.best = best
        self.best_value = -np.inf
        self.pair: LabelledPair | None = None
        self.started = self.spent = self.last = 0.0
        self.done = self.left_out = 0
        self.warned = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Choose the images, and look up what was best before."""
        pair: LabelledPair | None = data_of(trainer).eval_data
        if pair is not None and label_kind(pair.train.labels) == "classes":
            train = thinned(pair.train, self.max_images)
            test = train if pair.test is pair.train else thinned(pair.test, self.max_images)
            self.pair = LabelledPair(train, test, pair.name, pair.resize, pair.size)
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

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        """Evaluate every `every_steps` steps; the end of the run has an evaluation of its own."""
        step = trainer.global_step
        if self.pair is None or step % self.every_steps or step == trainer.max_steps:
            return
        if not self.affordable(trainer):
            self.left_out += 1
            return
        assert isinstance(module, DINO)
        began = time.monotonic()
        values: dict[str, float] = {}
        for network in self.networks:
            values |= self.measured(trainer, module, network)
        self.last = time.monotonic() - began
        self.spent += self.last
        self.done += 1
        if trainer.is_global_zero:
            share = self.spent / (time.monotonic() - self.started)
            cost = {"online_seconds": self.last, "online_share": share}
            for logger in trainer.loggers:
                logger.log_metrics({**values, **cost}, step)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        if self.best is not None and not module.skipped_in_a_row:
            self.keep_best(trainer, values)

    def measured(self, trainer: lightning.Trainer, module: DINO, network: str) -> dict[str, float]:
        """A network's numbers, on rank 0."""
        data = data_of(trainer)
        extractor = FeatureExtractor(
            (module.teacher if network == "teacher" else module.student).backbone,
            data.dataset.preprocess,
            module.device,
            self.batch_size,
            data.num_workers,
            self.pair,
            ranks=trainer.world_size > 1,
        )
        features = extract_pair(extractor, kinds_of(self.evaluators))
        if not trainer.is_global_zero:
            return {}
        prefix = "" if network == "teacher" else f"{network}_"
        values = (pair for e in self.evaluators.values() for pair in e(features))
        return {f"{prefix}{name}": float(value) for name, value in values}

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
        error: OSError | None = files.error
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


def thinned(source: Source, count: int) -> Source:
    """At most `count` images, evenly spaced."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(np.int64))
