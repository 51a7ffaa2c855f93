"""Nearest neighbours one query at a time, in float64; of equals the first in the bank."""

import numpy as np

TOLERANCE = 2e-6  # of a cosine in float32


def cosines(bank, query):
    bank, query = bank.astype(np.float64), query.astype(np.float64)
    bank = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    return (bank * (query / max(np.linalg.norm(query), 1e-12))).sum(axis=1)


def exact_neighbours(bank, query, k):
    return np.lexsort((np.arange(len(bank)), -cosines(bank, query).round(12)))[:k]


def check_nearest(bank, queries, k, similarity, indices, itself=None):
    """That these are the nearest: each once, with their cosines, and none left out is nearer."""
    for row, (values, places) in enumerate(zip(similarity, indices, strict=True)):
        exact = cosines(bank, queries[row])
        left = (
            np.arange(len(bank))
            if itself is None
            else np.flatnonzero(itself[row] != np.arange(len(bank)))
        )
        assert len(places) == len(set(places)) == min(k, len(left))
        assert set(places) <= set(left)
        assert np.allclose(values, exact[places], atol=TOLERANCE)
        assert (np.diff(values) <= 0).all()
        assert np.allclose(values, np.sort(exact[left])[::-1][: len(places)], atol=TOLERANCE)
