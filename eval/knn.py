"""Weighted k-nearest-neighbour classification (DINO's protocol, arXiv:2104.14294, section 4.1; Wu
et al. 2018).

Exact cosine search by faiss. A neighbour votes for its class with exp(similarity / temperature).
"""

from collections.abc import Iterator, Sequence

import faiss
import numpy as np
import torch
from jaxtyping import Float32, Int64

from ssl_xcit.errors import UserError

from .features import FeatureSet

Rows = Float32[np.ndarray, "N C"]
Queries = Float32[np.ndarray, "Q C"]
Neighbours = tuple[Float32[np.ndarray, "Q k"], Int64[np.ndarray, "Q k"]]


def unit(rows: Rows) -> Rows:
    """Rows of L2 norm 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(norms, np.float32(1e-12))).astype(np.float32)


def nearest(bank: Rows, queries: Queries, k: int) -> Neighbours:
    """Cosine similarities and bank indices of the k nearest, most similar first (k at most the
    bank's size).
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(unit(bank))
    similarity, indices = index.search(unit(queries), min(k, len(bank)))
    return similarity, indices


def vote(
    similarity: Float32[np.ndarray, "Q k"],
    classes: Int64[np.ndarray, "Q k"],
    num_classes: int,
    temperature: float,
) -> Int64[np.ndarray, " Q"]:
    """The class with the largest sum of exp(similarity / temperature); of equals the lowest."""
    # relative to the nearest neighbour, so that small temperatures do not overflow
    weight = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
    predicted = np.empty(len(classes), dtype=np.int64)
    rows_at_once = max(1, 16_000_000 // num_classes)
    for start in range(0, len(classes), rows_at_once):
        rows = slice(start, start + rows_at_once)
        count = len(classes[rows])
        flat = classes[rows] + num_classes * np.arange(count)[:, None]
        votes = np.bincount(flat.ravel(), weight[rows].ravel(), minlength=count * num_classes)
        predicted[rows] = votes.reshape(count, num_classes).argmax(axis=1)
    return predicted


def knn_predict(
    bank: Rows,
    labels: Int64[np.ndarray, " N"],
    queries: Queries,
    k: int,
    temperature: float = 0.07,
) -> Int64[np.ndarray, " Q"]:
    """Class ids of the queries by their k nearest rows of the bank.

    Args:
        bank: (N, C) features.
        labels: (N,) class ids; any integers.
        queries: (Q, C) features.
        k: neighbours that vote; more than N means all.
        temperature: above 0.
    """
    names, classes = np.unique(labels, return_inverse=True)
    similarity, indices = nearest(bank, queries, k)
    return names[vote(similarity, classes[indices], len(names), temperature)]


class KNN:
    """Top-1 accuracy in percent for several k, from one search: `knn_k10`, `knn_k20`, ...

    Args:
        k: how many neighbours vote; values above the number of training images are taken down to
            it.
        temperature: of the votes; the paper has 0.07.
    """

    def __init__(self, k: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07):
        if not k or min(k) < 1 or temperature <= 0.0:
            raise UserError(
                f"k={list(k)}, temperature={temperature}: k from 1, temperature above 0"
            )
        self.k = sorted(k)
        self.temperature = temperature

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent) for each k."""
        names, classes = np.unique(features.train_labels, return_inverse=True)
        similarity, indices = nearest(features.train, features.test, self.k[-1])
        near = classes[indices]
        for k in self.k:
            predicted = vote(similarity[:, :k], near[:, :k], len(names), self.temperature)
            correct = names[predicted] == features.test_labels
            yield f"knn_k{k}", 100.0 * float(correct.mean())
