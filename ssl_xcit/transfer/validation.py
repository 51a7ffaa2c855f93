"""Measure a task on test images while it is trained."""

import logging
from typing import Annotated, Any

import lightning
import numpy as np
from annotated_types import Ge, Gt, Le

from ssl_xcit.errors import UserError
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.training.periodic import PeriodicEvaluation
from ssl_xcit.transfer.dataset import AnnotatedSubset
from ssl_xcit.transfer.evaluate import evaluate
from ssl_xcit.transfer.task import AnnotatedSource
from ssl_xcit.utils.validation import Count

log = logging.getLogger(__name__)


class Validation(PeriodicEvaluation):
    """The task's own measure, on rank 0; of the averaged weights where the run keeps an average.

    Args:
        every_steps: see `PeriodicEvaluation`, as of `eval_budget` and `best`.
        max_images: evenly spaced ones of more are taken.
        batch_size: images at once; None: see `evaluate.predictions`.
    """

    def __init__(
        self,
        every_steps: Count = 500,
        max_images: Annotated[int, Ge(1)] = 2_000,
        batch_size: Count | None = None,
        eval_budget: Annotated[float, Gt(0), Le(1)] | None = 0.05,
        best: str | None = None,
    ):
        super().__init__(every_steps, eval_budget, best)
        self.max_images = max_images
        self.batch_size = batch_size
        self.images: AnnotatedSource | None = None

    def choose_images(self, eval_data: AnnotatedSource) -> bool:
        """Thin the test images."""
        count = len(eval_data.images)
        self.images = eval_data
        if count > self.max_images:
            chosen = np.linspace(0, count - 1, self.max_images).round().astype(np.int64)
            self.images = AnnotatedSubset(eval_data, chosen)
        return count > 0

    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, float]:
        """Results, on rank 0."""
        if not trainer.is_global_zero:
            return {}
        assert self.images is not None
        data = data_of(trainer)
        try:
            measured = evaluate(
                module.evaluated(),
                self.images,
                self.batch_size,
                data.num_workers,
                module.device,
                data.dataset.preprocess.max_pixels,
            )
        except UserError as error:  # of few images, perhaps none has an object
            log.warning("not measured while training: %s", error)
            return {}
        return measured.results
