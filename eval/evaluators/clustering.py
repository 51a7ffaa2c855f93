"""Clusters of frozen features against classes: k-means on the unit sphere by faiss, as many
clusters as classes; no label is used to make them.
"""

from collections.abc import Callable, Iterator

import faiss
import numpy as np
import scipy  # parts are imported when they are used first
import torch
from jaxtyping import Float32, Float64, Int64

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count

from ..features.extract import FeatureSet
from ..features.neighbors import unit
from ..statistics import Estimate, Statistic, Weights
from .protocol import Evaluator, Seed

Pairs = Int64[np.ndarray, "Q 2"]  # class and cluster of each image


def contingency(items: Pairs, weights: Weights) -> Float64[np.ndarray, "K L"]:
    """How many images of each class are in each cluster."""
    K, L = items.max(axis=0) + 1
    cells = np.bincount(items[:, 0] * L + items[:, 1], weights, minlength=K * L)
    return cells.reshape(K, L)


def nmi(items: Pairs, weights: Weights) -> float:
    """Normalised mutual information in percent, by the mean of the two entropies."""
    joint = contingency(items, weights) / weights.sum()
    a, b = joint.sum(axis=1), joint.sum(axis=0)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    both = entropy(a) + entropy(b)
    return 100.0 * (2.0 * (both - entropy(joint)) / both if both > 0 else 1.0)


def ari(items: Pairs, weights: Weights) -> float:
    """Adjusted Rand index in percent (Hubert and Arabie 1985)."""
    table = contingency(items, weights)

    def couples(counts: np.ndarray) -> float:
        return float((counts * (counts - 1.0)).sum() / 2.0)

    together, a, b = couples(table), couples(table.sum(axis=1)), couples(table.sum(axis=0))
    chance = a * b / max(couples(table.sum(keepdims=True)), 1.0)
    most = 0.5 * (a + b)
    return 100.0 * ((together - chance) / (most - chance) if most > chance else 1.0)


def mean_of_runs(statistic: Callable[[Pairs, Weights], float]) -> Statistic:
    """The mean over R runs, of (Q, 1 + R) items: the class, and the cluster in each run."""

    def value(items: Int64[np.ndarray, "Q columns"], weights: Weights) -> float:
        runs = range(1, items.shape[1])
        return float(np.mean([statistic(items[:, [0, r]], weights) for r in runs]))

    return value


NMI, ARI = mean_of_runs(nmi), mean_of_runs(ari)


class Clustering(Evaluator):
    """k-means of the test images' features, in percent: `nmi`, `ari`, and `cluster_accuracy`, where
    each cluster stands for the class that the best one-to-one assignment gives it. Each is the mean
    of several runs, because k-means ends differently from other starts by many points.

    Args:
        runs: of k-means, each from a start of its own, by the seed.
        iterations: of each.
    """

    def __init__(self, runs: Count = 10, iterations: Count = 50, seed: Seed = 0):
        self.runs = runs
        self.iterations = iterations
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent)."""
        rows = unit(features.test)
        names, classes = np.unique(features.test_labels, return_inverse=True)
        if len(names) < 2:
            raise UserError("the test images have one class only; clusters are compared with two")
        runs = [self.clustered(rows, len(names), run) for run in range(self.runs)]
        items = np.stack((classes, *runs), axis=1).astype(np.int64)
        ones = np.ones(len(items))
        for name, statistic, mean in (("nmi", nmi, NMI), ("ari", ari, ARI)):
            values = [statistic(items[:, [0, r]], ones) for r in range(1, self.runs + 1)]
            noise = float(np.std(values, ddof=1)) / self.runs**0.5 if self.runs > 1 else 0.0
            yield name, Estimate(items, mean, noise)
        right = np.empty((len(items), self.runs))
        for run, clusters in enumerate(runs):
            table = contingency(items[:, [0, run + 1]], ones)
            of_class, of_cluster = scipy.optimize.linear_sum_assignment(table, maximize=True)
            stands_for = np.full(table.shape[1], -1)
            stands_for[of_cluster] = of_class
            right[:, run] = stands_for[clusters] == classes
        yield "cluster_accuracy", Estimate(right)

    def clustered(
        self, rows: Float32[np.ndarray, "Q C"], count: int, run: int
    ) -> Int64[np.ndarray, " Q"]:
        """The cluster of each row."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        kmeans = faiss.Kmeans(
            rows.shape[1],
            count,
            niter=self.iterations,
            seed=1 + self.seed + run,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=1000,
        )
        kmeans.train(rows)
        return kmeans.index.search(rows, 1)[1][:, 0]
