"""Evaluation while training: the teacher's frozen features every so often, the run itself
untouched.
"""

from collections.abc import Mapping

import lightning
import numpy as np
import torch

from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import UserError
from ssl_xcit.training.module import DINO

from .features import Evaluator, extract_pair


class OnlineEvaluation(lightning.Callback):
    """Cheap evaluators on the teacher every `every_steps` steps, to every logger and to the
    progress bar.

    No random number is drawn and BatchNorm statistics stay, so a run with it equals one without. It
    is off when the run has no labelled images.

    Args:
        evaluators: by name.
        every_steps: steps between two evaluations.
        max_images: of the training and of the test part each; evenly spaced ones are taken.
        batch_size: images at once.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator],
        every_steps: int = 500,
        max_images: int = 10_000,
        batch_size: int = 64,
    ):
        if every_steps < 1 or max_images < 2:
            raise UserError(
                f"every_steps={every_steps}, max_images={max_images}: at least 1 and 2; to "
                "do without "
                "online evaluation: ~callbacks.online"
            )
        self.evaluators = evaluators
        self.every_steps = every_steps
        self.max_images = max_images
        self.batch_size = batch_size
        self.pair: LabelledPair | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Choose the images."""
        pair: LabelledPair | None = trainer.datamodule.eval_data  # type: ignore[attr-defined]
        if pair is not None:
            parts = (thinned(pair.train, self.max_images), thinned(pair.test, self.max_images))
            self.pair = LabelledPair(*parts, pair.name, pair.resize, pair.size)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        """Evaluate on the grid; the end of the run has an evaluation of its own."""
        step = trainer.global_step
        if self.pair is None or step % self.every_steps or step == trainer.max_steps:
            return
        if trainer.is_global_zero:
            assert isinstance(module, DINO)
            features = extract_pair(
                module.teacher.backbone,
                self.pair,
                trainer.datamodule.dataset.how,  # type: ignore[attr-defined]
                self.batch_size,
                trainer.datamodule.num_workers,  # type: ignore[attr-defined]
                module.device,
            )
            values = {k: v for e in self.evaluators.values() for k, v in e(features)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        trainer.strategy.barrier("online evaluation")


def thinned(source: Source, count: int) -> Source:
    """At most `count` images, evenly spaced."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(np.int64))
