"""Evaluation while training: at intervals, at a bounded cost, without an effect on the run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import lightning
import numpy as np
from annotated_types import Ge, Gt, Le, MinLen

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import UserError
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.periodic import PeriodicEvaluation
from ssl_xcit.utils.validation import Count, Network, Words

from .evaluators.protocol import Evaluator, kinds_of
from .features.cache import extract_pair
from .features.extractor import FeatureExtractor


class OnlineEvaluation(PeriodicEvaluation):
    """Cheap evaluators on features extracted once; ranks share the extraction.

    Args:
        every_steps: see `PeriodicEvaluation`, as of `eval_budget` and `best`.
        max_images: of the training and of the test part each; evenly spaced ones are taken.
        networks: teacher, student or both; the student's numbers are called `student_...`.
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
        super().__init__(every_steps, eval_budget, best)
        self.evaluators = {k: e for k, e in evaluators.items() if e is not None}
        if not self.evaluators:
            raise UserError(
                "callbacks.online.evaluators has none; ~callbacks.online switches it off"
            )
        self.max_images = max_images
        self.batch_size = batch_size
        self.networks = networks
        self.pair: LabelledPair | None = None

    def choose_images(self, eval_data: LabelledPair | None) -> bool:
        """Thin both parts; labels must be classes."""
        if eval_data is None or label_kind(eval_data.train.labels) != "classes":
            return False
        train = thinned(eval_data.train, self.max_images)
        same = eval_data.test is eval_data.train
        test = train if same else thinned(eval_data.test, self.max_images)
        self.pair = replace(eval_data, train=train, test=test)
        return True

    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, float]:
        """All networks' numbers, on rank 0."""
        values: dict[str, float] = {}
        for network in self.networks:
            values |= self.measured_network(trainer, module, network)
        return values

    def measured_network(
        self, trainer: lightning.Trainer, module: Pretraining, network: str
    ) -> dict[str, float]:
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
        features = replace(features, ranks=False)  # too few images for more than one rank
        prefix = "" if network == "teacher" else f"{network}_"
        values = (pair for e in self.evaluators.values() for pair in e(features))
        return {f"{prefix}{name}": float(value) for name, value in values}


def thinned(source: Source, count: int) -> Source:
    """At most `count` images, evenly spaced."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(np.int64))
