"""Load a run's newest weights and the images that it is measured on, when a part of the report
first needs them.

Features are those that the run's own evaluation has kept (`features/cache.py`) where the images are
few enough to be taken all; of large sets evenly spaced images are embedded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hydra.errors import InstantiationException

from ssl_xcit.data.preprocess import MAX_PIXELS, Preprocess, of_weights
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.transfer.load import load_task
from ssl_xcit.transfer.task import Task, TransferData
from ssl_xcit.utils.validation import Network

from ..checkpoints import data_of_run, transfer_data_of_run
from ..evaluators.knn import KNN
from ..features.extract import FeatureSet
from ..features.extractor import FeatureExtractor
from ..online import thinned
from ..results import Evaluation, differences
from ..runner import cache_folder
from ..statistics import Difference
from ..viz.dataset import (
    DataSet,
    ImageFeatures,
    has_classes,
    image_features,
    of_pair,
    training_images,
)
from .run_reader import FINISHED, Run, message_of
from .settings_diff import hydra_ready

T = TypeVar("T")
WHOLE = 20_000  # images of a part up to which all are taken, when their features are kept already
BANK = 4_000  # else as many, evenly spaced, are searched for neighbours
KNN_K = 20


@dataclass(frozen=True)
class ReportOptions:
    """How the report embeds images."""

    which: Network = "teacher"  # teacher or student
    device: str = "auto"  # auto, cpu, cuda:0
    num_workers: int | None = None  # loader processes; None: one a core, less one
    max_images: int = 1000  # of the evaluation images in the atlas
    show: bool = False  # progress bars


def made_once(make: Callable[["RunFeatures"], T]) -> T:
    """A property of a run that is made when it is first read; an error is raised at every read."""
    return property(lambda self: self.once(make.__name__, lambda: make(self)))  # type: ignore[return-value]


class RunFeatures:
    """Weights, evaluation images and features of a run, each made once."""

    def __init__(self, run: Run, options: ReportOptions):
        self.run = run
        self.options = options
        self.made: dict[str, Any] = {}
        self.task_device = torch.device("cpu")

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Make it, or return what was made, or raise what was raised."""
        if name not in self.made:
            try:
                self.made[name] = make()
            except Exception as error:
                self.made[name] = error
        if isinstance(result := self.made[name], Exception):
            raise result
        return result

    @made_once
    def checkpoint(self) -> Path:
        """The newest; raises MissingPath where there is none."""
        return checkpoint_path(self.run.path)

    @made_once
    def extractor(self) -> FeatureExtractor:
        """The backbone of the newest checkpoint; raises UserError where it cannot be read."""
        options = self.options
        backbone = load_backbone(self.checkpoint, options.which)
        cache = self.run.setting("evaluation", "cache")
        return FeatureExtractor(
            backbone,
            of_weights(backbone.preprocess, self.max_pixels),
            placed(backbone, options.device)[0],
            num_workers=options.num_workers,
            show=options.show,
            cache=cache_folder(cache if isinstance(cache, bool | str) else False),
        )

    @property
    def max_pixels(self) -> int:
        """The largest image that the run reads."""
        most = self.run.setting("preprocess", "max_pixels")
        return most if isinstance(most, int) else MAX_PIXELS

    @made_once
    def task(self) -> Task:
        """The task of the newest checkpoint, on `task_device`; raises UserError where there is
        none.
        """
        task: Any = load_task(self.checkpoint, self.options.which)
        self.task_device = placed(task, self.options.device)[0]
        return task

    @property
    def test_preprocess(self) -> Preprocess:
        """How the task's test images are read."""
        return of_weights(self.task.backbone.preprocess, self.max_pixels)

    @made_once
    def transfer_data(self) -> TransferData:
        """The task's images with targets, by the choices in `run.json`. Raises UserError where that
        file is damaged, or the images are gone.
        """
        if not {"overrides", "choices"} <= self.run.about.keys():
            raise UserError("run.json does not say which images the run was measured on")
        try:
            with hydra_ready():
                return transfer_data_of_run(str(self.checkpoint))
        except InstantiationException as error:  # its cause says more
            raise error.__cause__ or error from None

    @made_once
    def data(self) -> DataSet:
        """The run's evaluation images, by the choices in `run.json`; without labelled ones those
        that it was trained on. Raises UserError where that file is damaged, or the images are gone.
        """
        if not {"overrides", "choices"} <= self.run.about.keys():
            raise UserError("run.json does not say which images the run was measured on")
        try:
            with hydra_ready():
                pair = data_of_run(str(self.checkpoint))
                return training_images(str(self.checkpoint)) if pair is None else of_pair(pair)
        except InstantiationException as error:  # its cause says more
            raise error.__cause__ or error from None

    @made_once
    def bank(self) -> ImageFeatures:
        """Images that are searched for neighbours."""
        return self.embedded(self.data.images, BANK, "train features")

    @made_once
    def queries(self) -> ImageFeatures:
        """Queries, which the atlas shows as well; the bank where there is one set."""
        if self.data.others is None:
            return self.bank
        return self.embedded(self.data.others, self.options.max_images, "test features")

    def embedded(self, source: Source, most: int, title: str) -> ImageFeatures:
        """Class tokens of all images where they are few or kept, else of evenly spaced ones."""
        kept = self.run.state == FINISHED and self.extractor.cache is not None
        if len(source) > (WHOLE if kept else most):
            source = thinned(source, most)
        return image_features(self.extractor, source, self.data, f"{self.run.name}: {title}")

    def num_online(self) -> int | None:
        """Number of test images of online k-NN; None where it is not known."""
        if self.run.transfer:
            return None
        online = self.run.setting("callbacks", "online")
        most = online.get("max_images") if isinstance(online, dict) else None
        if not isinstance(most, int):
            return None
        results = self.run.results
        count = results.content.get("test_images") if results is not None else None
        if isinstance(count, int):
            return min(most, count)
        try:
            part = self.data.images if self.data.others is None else self.data.others
        except Exception:  # the parts that show images say why
            return None
        return min(most, len(part)) if part.labels is not None else None


def named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Runs with the name that stands over what is theirs; one alone needs none."""
    return [(run.name if len(runs) > 1 else "", run) for run in runs]


def for_each_run(
    runs: Sequence[RunFeatures], make: Callable[[RunFeatures], T]
) -> tuple[list[tuple[RunFeatures, T]], list[str]]:
    """What is made of each run, and why others have nothing; raises UserError where no run has
    anything, of one run its own error.
    """
    if len(runs) == 1:
        return [(runs[0], make(runs[0]))], []
    made, errors = [], []
    for features in runs:
        try:
            made.append((features, make(features)))
        except Exception as error:
            errors.append(f"{features.run.name}: {message_of(error)}")
    if not made:
        raise UserError("; ".join(errors))
    return made, errors


def paired_knn(one: RunFeatures, two: RunFeatures) -> dict[str, Difference]:
    """k-NN of two runs, compared image by image; raises UserError where the runs were measured on
    different images, or on images without classes.
    """
    pairs = [(features.bank, features.queries) for features in (one, two)]
    for first, second in zip(*pairs, strict=True):
        if not has_classes(first.source) or not has_classes(second.source):
            raise UserError("the runs have no labelled images in common")
        same = one.data.name == two.data.name and np.array_equal(first.rows, second.rows)
        if not same or any(first.name(i) != second.name(i) for i in (0, len(first) - 1)):
            raise UserError(
                f"the runs were measured on different images ({one.data.name}, {two.data.name})"
            )
    evaluation = Evaluation()
    for name, (bank, queries) in zip("ab", pairs, strict=True):
        assert bank.source.labels is not None
        assert queries.source.labels is not None
        train, labels = bank.features, bank.source.labels[bank.rows]
        test = train, labels
        if queries is not bank:
            test = queries.features, queries.source.labels[queries.rows]
        evaluation.results[name] = dict(KNN(k=[KNN_K])(FeatureSet(train, labels, *test)))
    return differences(evaluation, "a", "b")
