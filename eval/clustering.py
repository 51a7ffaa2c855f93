"""Clusters of frozen features against classes: k-means on the unit sphere by faiss, as many
clusters as classes; no label is used to make them.
"""

from collections.abc import Iterator

import faiss
import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment

from ssl_xcit.errors import UserError

from .estimates import Estimate
from .features import FeatureSet
from .search import unit

Pairs = Int64[np.ndarray, "Q 2"]  # class and cluster of each image
Weights = Float64[np.ndarray, " Q"]


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


class Clustering:
    """k-means of the test images' features, in percent: `nmi`, `ari`, and `cluster_accuracy`, where
    each cluster stands for the class that the best one-to-one assignment gives it.

    Args:
        redo: k-means from so many starts, the tightest is taken.
        iterations: of each.
        seed: of the starts.
    """

    def __init__(self, redo: int = 5, iterations: int = 50, seed: int = 0):
        if redo < 1 or iterations < 1:
            raise UserError(f"redo={redo}, iterations={iterations}: both start at 1")
        self.redo = redo
        self.iterations = iterations
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent)."""
        rows = unit(features.test)
        names, classes = np.unique(features.test_labels, return_inverse=True)
        if len(rows) < len(names) or len(names) < 2:
            return
        faiss.omp_set_num_threads(torch.get_num_threads())
        kmeans = faiss.Kmeans(
            rows.shape[1],
            len(names),
            niter=self.iterations,
            nredo=self.redo,
            seed=self.seed + 1,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=1000,
        )
        kmeans.train(rows)
        clusters = kmeans.index.search(rows, 1)[1][:, 0]
        items = np.stack((classes, clusters), axis=1).astype(np.int64)
        yield "nmi", Estimate(items, nmi)
        yield "ari", Estimate(items, ari)
        table = contingency(items, np.ones(len(items)))
        of_class, of_cluster = linear_sum_assignment(table, maximize=True)
        stands_for = np.full(table.shape[1], -1)
        stands_for[of_cluster] = of_class
        yield "cluster_accuracy", Estimate(stands_for[clusters] == classes)
