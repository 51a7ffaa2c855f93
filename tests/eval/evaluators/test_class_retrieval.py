"""Retrieval by class beside scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ssl_xcit.errors import UserError
from ssl_xcit.eval.evaluators.class_retrieval import ClassRetrieval
from ssl_xcit.eval.features.extract import FeatureSet


def features(num_train=200, num_test=40, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes + 1, 8))
    train_labels = generator.integers(classes, size=num_train)
    test_labels = generator.integers(classes + 1, size=num_test)  # of one none is to be found
    train, test = (
        (centres[y] + 2 * generator.normal(size=(len(y), 8))).astype(np.float32)
        for y in (train_labels, test_labels)
    )
    return FeatureSet(train, train_labels, test, test_labels)


def by_sklearn(data, own=False):
    values, first = [], []
    for i, (row, label) in enumerate(zip(data.test, data.test_labels, strict=True)):
        others = np.arange(len(data.train)) != (i if own else -1)
        bank, right = data.train[others].astype(np.float64), data.train_labels[others] == label
        cosine = bank @ row / np.linalg.norm(bank, axis=1)
        values.append(average_precision_score(right, cosine) if right.any() else 0.0)
        first.append(right[cosine.argmax()])
    return 100 * np.mean(values), 100 * np.mean(first), values


@pytest.mark.parametrize("block", [2**26, 700])
@pytest.mark.parametrize("own", [False, True])
def test_it_agrees_with_sklearn(monkeypatch, block, own):
    """In one set no image finds itself, and one that is alone in its class finds nothing."""
    monkeypatch.setattr("ssl_xcit.eval.evaluators.class_retrieval.SIMILARITIES", block)
    data = features()
    if own:
        labels = np.where(np.arange(200) == 7, 99, data.train_labels)
        data = FeatureSet(data.train, labels, data.train, labels)
    found = dict(ClassRetrieval()(data))
    value, first, each = by_sklearn(data, own)
    assert list(found.values()) == pytest.approx([value, first], abs=1e-4)
    assert found["map"].items == pytest.approx(each, abs=1e-6)
    assert 0.0 in each
    assert not own or each[7] == found["map"].items[7] == 0.0


def test_a_large_bank_is_thinned_evenly():
    data = features()
    found = dict(ClassRetrieval(max_bank=50)(data))
    few = FeatureSet(data.train[::4], data.train_labels[::4], data.test, data.test_labels)
    value, first, _ = by_sklearn(few)
    assert list(found.values()) == pytest.approx([value, first], abs=1e-4)
    assert dict(ClassRetrieval(max_bank=None)(data)) == dict(ClassRetrieval()(data))


def test_ties_are_sklearns_and_equal_features_are_worth_chance():
    labels, train = np.repeat([0, 1], [30, 10]), np.ones((40, 4), np.float32)
    found = dict(ClassRetrieval()(FeatureSet(train, labels, train[:1].copy(), np.array([1]))))
    assert found["map"] == pytest.approx(25.0)


def test_by_class_refuses_other_labels():
    rows = np.ones((4, 2), np.float32)
    for labels in (np.eye(4, dtype=np.int64), np.arange(4.0)):
        with pytest.raises(UserError, match="one class an image"):
            list(ClassRetrieval()(FeatureSet(rows, labels, rows, labels)))
