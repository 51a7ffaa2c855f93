"""Retrieval of images of the same class: mean average precision and recall."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float32

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count

from ..features.extract import FeatureSet
from ..features.neighbors import SIMILARITIES, unit
from ..statistics import Estimate
from .protocol import Evaluator


class ClassRetrieval(Evaluator):
    """Mean average precision, `map`, and `recall_at_1` in percent: the training images are ranked
    by cosine similarity to each test image (where there is one set only, all others to each), and
    those of its class are right.

    Average precision is 1 / P sum over the right images of the share of right ones among all that
    are at least as similar; without training images of the class it is 0.

    Args:
        max_bank: of more training images so many are searched, evenly spaced in their order; None:
            all (ImageNet: every query sorts 1.28 million similarities).
    """

    def __init__(self, max_bank: Count | None = 100_000):
        self.max_bank = max_bank

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent); raises UserError for labels that are not one class an image."""
        classes = features.train_labels
        if classes.ndim != 1 or classes.dtype.kind not in "iu":
            raise UserError(
                "retrieval by class needs one class an image, and these images have other labels: "
                "set evaluation.evaluators.retrieval=null"
            )
        count = len(classes)
        N = min(count, self.max_bank or count)
        kept = np.arange(N) * count // N
        kept = kept[np.argsort(classes[kept], kind="stable")]  # a class is a slice
        bank, labels = torch.from_numpy(unit(features.train[kept])), classes[kept]
        starts = np.searchsorted(labels, features.test_labels, side="left").tolist()
        stops = np.searchsorted(labels, features.test_labels, side="right").tolist()
        precisions: list[float] = []
        nearest = []
        rows_at_once = max(1, SIMILARITIES // N)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # sorting releases the GIL
            for first in range(0, len(features.test), rows_at_once):
                rows = slice(first, first + rows_at_once)
                similarity = (torch.from_numpy(unit(features.test[rows])) @ bank.T).numpy()
                if features.one_set:  # no image finds itself
                    own = np.flatnonzero((kept >= first) & (kept < first + rows_at_once))
                    similarity[kept[own] - first, own] = -np.inf
                nearest.append(labels[similarity.argmax(axis=1)])
                precisions += pool.map(slice_precision, similarity, starts[rows], stops[rows])
        yield "map", Estimate(np.array(precisions))
        yield "recall_at_1", Estimate(np.concatenate(nearest) == features.test_labels)


def slice_precision(similarity: Float32[np.ndarray, " N"], start: int, stop: int) -> float:
    """Average precision where start..stop are right, other than one of -inf; sorts in place."""
    right = np.sort(similarity[start:stop])
    right = right[right > -np.inf]
    if not len(right):
        return 0.0
    similarity.sort()
    hits = len(right) - np.searchsorted(right, right, side="left")
    as_similar = len(similarity) - np.searchsorted(similarity, right, side="left")
    return float(np.mean(hits / as_similar))
