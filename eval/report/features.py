"""A run's newest weights and the images that it is measured on, loaded and looked at when a part of
the report first asks for them.

Features are those that the run's own evaluation has kept (`feature_cache.py`) where the images are
few enough to be taken all; of large sets evenly spaced images are looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hydra.errors import InstantiationException

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import MAX_PIXELS, of_weights
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import checkpoint_path, load_backbone

from ..estimates import Difference
from ..features import FeatureSet
from ..frozen import Frozen, placed
from ..knn import KNN
from ..online import thinned
from ..output import Evaluation, differences
from ..run import cache_folder, data_of_run
from ..views.data_set import DataSet, Shelf, shelf, training_images
from .run import FINISHED, Run
from .settings import composing

T = TypeVar("T")
WHOLE = 20_000  # images of a part up to which all are taken, when their features are kept already
BANK = 4_000  # else as many, evenly spaced, are searched for neighbours
KNN_K = 20


@dataclass(frozen=True)
class Options:
    """How the report looks at images.

    Args:
        which: teacher or student.
        device: auto, cpu, cuda:0.
        num_workers: loader processes; None: one a core, less one.
        max_images: of the evaluation images in the atlas.
        show: progress bars.
    """

    which: str = "teacher"
    device: str = "auto"
    num_workers: int | None = None
    max_images: int = 1000
    show: bool = False


class Seen:
    """What a run's newest weights make of its evaluation images; of each, and of each error, there
    is one.

    Args:
        run: the run.
        options: how it is looked at.
    """

    def __init__(self, run: Run, options: Options):
        self.run = run
        self.options = options
        self.made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Make it, or give what was made, or raise what was raised."""
        if name not in self.made:
            try:
                self.made[name] = make()
            except Exception as error:
                self.made[name] = error
        if isinstance(found := self.made[name], Exception):
            raise found
        return found

    @property
    def checkpoint(self) -> Path:
        """The newest; raises MissingPath where there is none."""
        return self.once("checkpoint", lambda: checkpoint_path(self.run.path))

    @property
    def frozen(self) -> Frozen:
        """The backbone, ready to look."""
        return self.once("frozen", self.load)

    def load(self) -> Frozen:
        """From the newest checkpoint.

        Raises:
            UserError: it cannot be read.
        """
        options = self.options
        backbone = load_backbone(self.checkpoint, options.which)  # type: ignore[arg-type]
        settings = self.run.config.get("preprocess")
        most = settings.get("max_pixels") if isinstance(settings, dict) else None
        evaluation = self.run.config.get("evaluation")
        cache = evaluation.get("cache") if isinstance(evaluation, dict) else False
        return Frozen(
            backbone,
            of_weights(backbone.preprocess, most if isinstance(most, int) else MAX_PIXELS),
            placed(backbone, options.device)[0],
            num_workers=options.num_workers,
            show=options.show,
            cache=cache_folder(cache if isinstance(cache, bool | str) else False),
        )

    @property
    def data(self) -> DataSet:
        """The run's evaluation images; without labelled ones those that it was trained on."""
        return self.once("data", self.find_data)

    def find_data(self) -> DataSet:
        """By the choices in `run.json`.

        Raises:
            UserError: that file is damaged, or the images are gone.
        """
        for key in ("overrides", "choices"):
            if key not in self.run.about:
                raise UserError("run.json does not say which images the run was measured on")
        try:
            with composing():
                pair = data_of_run(str(self.checkpoint))
                if pair is None:
                    return training_images(str(self.checkpoint))
        except InstantiationException as error:  # what made it says more
            raise error.__cause__ or error from None
        others = None if pair.test is pair.train else pair.test
        return DataSet(pair.train, others, pair.name, pair.resize, pair.size)

    @property
    def bank(self) -> Shelf:
        """Images that neighbours are found in."""
        return self.once("bank", lambda: self.shelve(self.data.images, BANK, "train features"))

    @property
    def queries(self) -> Shelf:
        """Images that are asked with and that the atlas shows; the bank where there is one set."""
        if self.data.others is None:
            return self.bank
        others = self.data.others
        most = self.options.max_images
        return self.once("queries", lambda: self.shelve(others, most, "test features"))

    def shelve(self, source: Source, most: int, title: str) -> Shelf:
        """Class tokens of all images where they are few or kept, else of evenly spaced ones."""
        kept = self.run.state == FINISHED and self.frozen.cache is not None
        if len(source) > (WHOLE if kept else most):
            source = thinned(source, most)
        return shelf(self.frozen, source, self.data, f"{self.run.name}: {title}")

    def num_online(self) -> int | None:
        """Test images of online evaluation; None where that is not known."""
        callbacks = self.run.config.get("callbacks")
        online = callbacks.get("online") if isinstance(callbacks, dict) else None
        most = online.get("max_images") if isinstance(online, dict) else None
        if not isinstance(most, int):
            return None
        found = self.run.results
        count = found.content.get("test_images") if found is not None else None
        if isinstance(count, int):
            return min(most, count)
        try:
            part = self.data.images if self.data.others is None else self.data.others
        except Exception:  # the parts that show images say why
            return None
        return min(most, len(part)) if part.labels is not None else None


def has_classes(found: Shelf) -> bool:
    """Whether its images have one class each."""
    labels = found.source.labels
    return labels is not None and label_kind(labels) == "classes"


def paired_knn(one: Seen, two: Seen) -> dict[str, Difference]:
    """k-NN of two runs on the same images, compared image by image.

    Raises:
        UserError: the runs were measured on different images, or on images without classes.
    """
    shelves = [(seen.bank, seen.queries) for seen in (one, two)]
    for first, second in zip(*shelves, strict=True):
        if not has_classes(first) or not has_classes(second):
            raise UserError("the runs have no labelled images in common")
        same = len(first) == len(second) and np.array_equal(first.rows, second.rows)
        if not same or one.data.name != two.data.name:
            raise UserError(f"the runs were measured on different images ({one.data.name}, "
                            f"{two.data.name})")  # fmt: skip
        if first.name(0) != second.name(0) or first.name(len(first) - 1) != second.name(
            len(second) - 1
        ):
            raise UserError("the runs were measured on different images")
    measured = Evaluation()
    for name, (bank, queries) in zip("ab", shelves, strict=True):
        assert bank.source.labels is not None
        assert queries.source.labels is not None
        train, labels = bank.features, bank.source.labels[bank.rows]
        features = FeatureSet(
            train,
            labels,
            train if queries is bank else queries.features,
            labels if queries is bank else queries.source.labels[queries.rows],
        )
        measured.results[name] = dict(KNN(k=[KNN_K])(features))
    return differences(measured, "a", "b")
