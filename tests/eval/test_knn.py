"""k-NN against brute force in float64, written out."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from ssl_xcit.eval.features import FeatureSet
from ssl_xcit.eval.knn import KNN, knn_predict


def brute_force(bank, labels, queries, k, temperature):
    bank, queries = bank.astype(np.float64), queries.astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    predicted = []
    for query in queries:
        similarity = bank @ query
        votes = {}
        for i in np.argsort(-similarity, kind="stable")[:k]:
            votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp(similarity[i] / temperature)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return np.array(predicted)


def clusters(seed=0, n=400, q=150, dim=16, classes=(3, 7, 100)):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(classes), dim))
    which, which_q = rng.integers(len(classes), size=n), rng.integers(len(classes), size=q)
    bank = (centres[which] + 1.5 * rng.normal(size=(n, dim))).astype(np.float32)
    queries = (centres[which_q] + 1.5 * rng.normal(size=(q, dim))).astype(np.float32)
    ids = np.array(classes)
    return bank, ids[which], queries, ids[which_q]


@pytest.mark.parametrize("k", [1, 10, 200, 1000])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_agrees_with_brute_force(k, temperature):
    """Class ids have gaps, and k may exceed the bank."""
    bank, labels, queries, _ = clusters()
    ours = knn_predict(bank, labels, queries, k, temperature)
    assert np.array_equal(ours, brute_force(bank, labels, queries, k, temperature))


def test_agrees_with_scikit_learn():
    bank, labels, queries, _ = clusters(1)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    reference = KNeighborsClassifier(
        20, algorithm="brute", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
    ).fit(unit(bank), labels)
    assert np.array_equal(
        knn_predict(bank, labels, queries, 20, 0.07), reference.predict(unit(queries))
    )


def test_a_tie_goes_to_the_lowest_class():
    bank = np.array([[1, 0], [0, 1]], np.float32)
    query = np.array([[1, 1]], np.float32)
    assert knn_predict(bank, np.array([9, 4]), query, 2).tolist() == [4]


def test_tiny_temperature_does_not_overflow():
    bank, labels, queries, _ = clusters()
    nearest = knn_predict(bank, labels, queries, 1)
    assert np.array_equal(knn_predict(bank, labels, queries, 50, 1e-4), nearest)


def test_evaluator_yields_percent_for_each_k():
    bank, labels, queries, truth = clusters()
    values = dict(KNN([10, 1])(FeatureSet(bank, labels, queries, truth)))
    assert list(values) == ["knn_k1", "knn_k10"]
    for k in (1, 10):
        expected = 100 * (brute_force(bank, labels, queries, k, 0.07) == truth).mean()
        assert values[f"knn_k{k}"] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"k": []}, {"k": [0]}, {"temperature": 0.0}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match="k from 1"):
        KNN(**options)
