"""Weighted k-nearest-neighbour classification (DINO's protocol, arXiv:2104.14294, section 4.1; Wu
et al. 2018): cosine similarity, and a neighbour votes for its class with exp(similarity /
temperature).
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Le
from jaxtyping import Bool, Float, Float64, Int64

from ssl_xcit.data.labels import Labels
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.utils.ranks import from_rank, rank
from ssl_xcit.utils.validation import Count, Positive

from ..features.extract import FeatureSet
from ..features.neighbors import Approximate, Bank, Indices, Queries, Similarity, nearest
from ..statistics import Estimate
from .protocol import Evaluator, Kinds, OneOrMore, Seed, as_list

VAL_IMAGES, VAL_NEIGHBOURS = 5000, 20  # by which kinds of features are compared


def votes(
    similarity: Similarity, classes: Int64[np.ndarray, "Q k"], num_classes: int, temperature: float
) -> Float64[np.ndarray, "Q K"]:
    """Sums of exp(similarity / temperature) by class, relative to the nearest neighbour's.

    Class -1 is no neighbour.
    """
    # relative, so that small temperatures do not overflow
    near = (similarity - similarity[:, :1]).astype(np.float64)
    weight = np.where(classes < 0, 0.0, np.exp(near / temperature))
    Q = len(classes)
    flat = classes.clip(0) + num_classes * np.arange(Q)[:, None]
    sums = np.bincount(flat.ravel(), weight.ravel(), minlength=Q * num_classes)
    return sums.reshape(Q, num_classes)


def elected(
    classes: Labels, near: tuple[Similarity, Indices], num_classes: int, temperature: float
) -> Int64[np.ndarray, " Q"]:
    """The class with the most votes, of equals the lowest, by the similarities and indices (Q, k)
    of those that vote; `classes` (N,) are the bank's, from 0.
    """
    similarity, indices = near
    winner = np.empty(len(indices), np.int64)
    at_once = max(1, 16_000_000 // num_classes)
    for start in range(0, len(indices), at_once):
        here = slice(start, start + at_once)
        voters = np.where(indices[here] < 0, -1, classes[indices[here]])
        winner[here] = votes(similarity[here], voters, num_classes, temperature).argmax(axis=1)
    return winner


def knn_predict(
    bank: Bank, labels: Labels, queries: Queries, k: int, temperature: float = 0.07
) -> Int64[np.ndarray, " Q"]:
    """Class ids of the queries by their k nearest rows of the bank, of which more than N means all;
    of classes with equal votes the lowest wins. `labels` are any integers.
    """
    names, classes = np.unique(labels, return_inverse=True)
    near = nearest(bank, queries, k)
    return names[elected(classes, near, len(names), temperature)]


class KNN(Evaluator):
    """Top-1 accuracy for several k and temperatures from one search: `knn_k10`, `knn_k20`, ..., and
    `knn_k20_t0.02` for temperatures after the first.

    Where there is one set only, each image is classified by all others. Of several kinds of
    features the one is taken with which training images are classified best by all others (20
    neighbours, the first temperature; `VAL_IMAGES` of them at most).

    Args:
        k: how many neighbours vote; values above the number of training images are taken down to
            it.
        temperature: of the votes, one or several; the paper has 0.07.
        index: `ivf` or `hnsw`, for banks of more than `exact_up_to` rows; None: always exact.
        recall: share of the exact neighbours that an index must find.
        kinds: of features to choose from.
    """

    on_ranks = True

    def __init__(
        self,
        k: OneOrMore[Count] = (10, 20, 100, 200),
        temperature: OneOrMore[Positive] = 0.07,
        index: Literal["ivf", "hnsw"] | None = "ivf",
        exact_up_to: Count = 2_000_000,
        recall: Annotated[float, Gt(0), Le(1)] = 0.95,
        kinds: Kinds = ("cls",),
    ):
        self.kinds = as_list(kinds)
        self.k = sorted(as_list(k))
        self.temperatures = as_list(temperature)
        self.index = None if index is None else Approximate(index, recall)
        self.exact_up_to = exact_up_to

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent) for each k and temperature."""
        names, classes = np.unique(features.train_labels, return_inverse=True)
        kind = self.best_kind(features, classes, len(names))
        bank, queries = features.of(kind).train, features.of(kind).test
        itself = np.arange(len(bank)) if features.one_set else None
        if self.index is not None and len(bank) > self.exact_up_to:
            if features.ranks and rank():
                return  # an index is not shared
            similarity, indices, recall = self.index.nearest(bank, queries, self.k[-1], itself)
            yield "knn_recall", recall
        else:
            similarity, indices = nearest(bank, queries, self.k[-1], itself, features.ranks)
        for place, temperature in enumerate(self.temperatures):
            for k in self.k:
                few = similarity[:, :k], indices[:, :k]
                winner = elected(classes, few, len(names), temperature)
                suffix = f"_t{temperature:g}" if place else ""
                yield f"knn_k{k}{suffix}", Estimate(names[winner] == features.test_labels)

    def best_kind(self, features: FeatureSet, classes: Labels, num_classes: int) -> str:
        """The kind that classifies training images best, of one that one; kept in `chosen`."""
        kinds = features.usable(self.kinds)
        self.chosen = {"kind": kinds[0]}
        if len(kinds) == 1:
            return kinds[0]
        rows = np.array(evenly_spaced(len(classes), VAL_IMAGES))
        accuracy = {}
        for kind in kinds:
            bank = features.of(kind).train
            near = nearest(bank, bank[rows], VAL_NEIGHBOURS, rows, features.ranks)
            predicted = elected(classes, near, num_classes, self.temperatures[0])
            accuracy[kind] = float((predicted == classes[rows]).mean())
        best = max(kinds, key=lambda kind: accuracy[kind])
        if features.ranks:  # processors may round the votes of equals otherwise
            best = from_rank(0, best)
        self.chosen = {"kind": best}
        return best


class FewShot(Evaluator):
    """k-NN with a few training images of each class, as many neighbours voting: `fewshot_1`, ... is
    the mean accuracy over random draws of them, `fewshot_1_std` the deviation between draws.

    Args:
        shots: images of each class; where a class has fewer, all of them.
        draws: how many times they are drawn.
    """

    def __init__(
        self,
        shots: OneOrMore[Count] = (1, 2, 5, 10),
        draws: Count = 10,
        temperature: Positive = 0.07,
        seed: Seed = 0,
    ):
        self.shots = sorted(as_list(shots))
        self.draws = draws
        self.temperature = temperature
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent) for each number of shots."""
        names, classes = np.unique(features.train_labels, return_inverse=True)
        if features.one_set:
            return  # what is drawn would be tested on itself
        generator = np.random.Generator(np.random.Philox(self.seed))
        right = {n: np.zeros((len(features.test), self.draws), bool) for n in self.shots}
        for draw in range(self.draws):
            place = place_in_class(classes, generator)
            for n in self.shots:
                rows = np.flatnonzero(place < n)
                bank = np.asarray(features.train[rows], np.float32)
                near = nearest(bank, features.test, n)
                winner = elected(classes[rows], near, len(names), self.temperature)
                right[n][:, draw] = names[winner] == features.test_labels
        for n in self.shots:
            yield f"fewshot_{n}", Estimate(right[n].astype(np.float64))
            spread = 100.0 * right[n].mean(axis=0)
            yield f"fewshot_{n}_std", float(spread.std(ddof=1)) if self.draws > 1 else 0.0


def place_in_class(classes: Labels, generator: np.random.Generator) -> Int64[np.ndarray, " N"]:
    """Each image's place in a random order of its class; smaller draws lie within larger ones."""
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
    place = np.empty(len(classes), np.int64)
    place[order] = np.arange(len(classes)) - np.repeat(starts, counts)
    return place


def accuracy_by_class(
    items: Float[np.ndarray, " Q"] | Bool[np.ndarray, " Q"], labels: Labels
) -> dict[int, tuple[float, int]]:
    """Percent and number of test images of each class id; items may be the mean of draws."""
    ids, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.bincount(classes, items.astype(np.float64))
    return {
        int(i): (100.0 * float(s) / int(n), int(n))
        for i, s, n in zip(ids, sums, counts, strict=True)
    }
