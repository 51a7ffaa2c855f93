"""k-NN against brute force in float64, written out."""

from unittest.mock import Mock

import numpy as np
import pytest
from brute_force import check_nearest, cosines, exact_neighbours
from sklearn.neighbors import KNeighborsClassifier

from ssl_xcit.eval.evaluators.knn import (
    KNN,
    FewShot,
    accuracy_by_class,
    knn_predict,
    place_in_class,
)
from ssl_xcit.eval.features import neighbors as search
from ssl_xcit.eval.features.extract import FeatureSet


def election(bank, labels, query, neighbours, temperature=0.07):
    similarity, votes = cosines(bank, query), {}
    for i in neighbours:
        weight = np.exp((similarity[i] - similarity[neighbours[0]]) / temperature)
        votes[labels[i]] = votes.get(labels[i], 0.0) + weight
    return min(votes, key=lambda label: (-votes[label], label))


def brute_force(bank, labels, queries, k, temperature):
    return np.array(
        [election(bank, labels, q, exact_neighbours(bank, q, k), temperature) for q in queries]
    )


def clusters(seed=0, n=400, q=150, dim=16, classes=(3, 7, 100)):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(classes), dim))
    which = rng.integers(len(classes), size=n + q)
    rows = (centres[which] + 1.5 * rng.normal(size=(n + q, dim))).astype(np.float32)
    ids = np.array(classes)[which]
    return rows[:n], ids[:n], rows[n:], ids[n:]


@pytest.mark.parametrize("k", [1, 10, 200, 1000])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_agrees_with_brute_force(k, temperature):
    """Class ids have gaps, and k may exceed the bank."""
    bank, labels, queries, _ = clusters()
    ours = knn_predict(bank, labels, queries, k, temperature)
    assert np.array_equal(ours, brute_force(bank, labels, queries, k, temperature))


def test_agrees_with_scikit_learn():
    bank, labels, queries, _ = clusters(1)
    reference = KNeighborsClassifier(
        20, algorithm="brute", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
    ).fit(search.unit(bank), labels)
    ours = knn_predict(bank, labels, queries, 20, 0.07)
    assert np.array_equal(ours, reference.predict(search.unit(queries)))


def test_a_tie_goes_to_the_lowest_class():
    bank = np.array([[1, 0], [0, 1]], np.float32)
    query = np.array([[1, 1]], np.float32)
    assert knn_predict(bank, np.array([9, 4]), query, 2).tolist() == [4]


@pytest.mark.parametrize("k", [1, 20, 700])
@pytest.mark.parametrize("block", [1 << 29, 4 * 16 * 70])
@pytest.mark.parametrize("one_set", [False, True])
def test_the_nearest_are_those_of_brute_force(k, block, one_set, monkeypatch):
    """Rows that stand five times in the bank, whole numbers with many equal cosines, and features
    that are all but equal, as an untrained network's; in one block of the bank and in several.
    """
    monkeypatch.setattr(search, "BLOCK", block)
    rng = np.random.default_rng(0)
    repeated = np.repeat(rng.normal(size=(100, 16)), 5, axis=0), rng.normal(size=(60, 16))
    whole = rng.integers(-1, 2, size=(500, 4)), rng.integers(-1, 2, size=(60, 4))
    alike = 1 + 1e-4 * rng.normal(size=(600, 32)), 1 + 1e-4 * rng.normal(size=(60, 32))
    for bank, queries in (repeated, whole, alike):
        itself = np.arange(0, 60) if one_set else None
        queries = bank[:60] if one_set else queries
        rows = bank.astype(np.float32), queries.astype(np.float32)
        check_nearest(*rows, k, *search.nearest(*rows, k, itself), itself)


def test_one_set_leaves_each_image_out_of_its_own_neighbours():
    bank, labels, _, _ = clusters()
    bank[7], labels[7] = bank[3], labels[3]  # an equal row is a neighbour like any other
    values = dict(KNN([1, 10])(FeatureSet(bank, labels, bank, labels)))
    for k in (1, 10):
        right = []
        for i, query in enumerate(bank):
            others = np.delete(np.arange(len(bank)), i)
            near = others[exact_neighbours(bank[others], query, k)]
            right.append(election(bank, labels, query, near) == labels[i])
        assert values[f"knn_k{k}"] == pytest.approx(100 * np.mean(right))


def test_several_temperatures_from_one_search(monkeypatch):
    bank, labels, queries, truth = clusters()
    knn = Mock(side_effect=search.faiss.knn)
    monkeypatch.setattr(search.faiss, "knn", knn)
    values = dict(KNN([20, 5], [0.07, 0.02])(FeatureSet(bank, labels, queries, truth)))
    knn.assert_called_once()
    assert list(values) == ["knn_k5", "knn_k20", "knn_k5_t0.02", "knn_k20_t0.02"]
    for k, t, name in ((5, 0.07, "knn_k5"), (20, 0.02, "knn_k20_t0.02")):
        expected = brute_force(bank, labels, queries, k, t) == truth
        assert values[name] == pytest.approx(100 * expected.mean())
        assert values[name].items.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("one_set", [False, True])
def test_large_banks_are_searched_by_an_index_whose_recall_is_said(kind, one_set, capsys):
    bank, labels, queries, truth = clusters(n=3000, q=200)
    data = FeatureSet(bank, labels, *((bank, labels) if one_set else (queries, truth)))
    found = dict(KNN([10], index=kind, exact_up_to=1000, recall=0.9)(data))
    assert 90 <= found["knn_recall"] <= 100
    assert f"k-NN by {kind.upper()} in 3,000 rows" in capsys.readouterr().out
    exact = dict(KNN([10], index=None)(data))
    assert found["knn_k10"] == pytest.approx(exact["knn_k10"], abs=3)


def test_few_shot_is_k_nn_on_the_images_drawn():
    bank, labels, queries, truth = clusters()
    values = dict(FewShot(shots=[1, 5, 1000], draws=3)(FeatureSet(bank, labels, queries, truth)))
    right = []
    generator = np.random.Generator(np.random.Philox(0))
    classes = np.unique(labels, return_inverse=True)[1]
    for _ in range(3):
        rows = np.flatnonzero(place_in_class(classes, generator) < 5)
        assert np.bincount(classes[rows]).tolist() == [5, 5, 5]
        predicted = brute_force(bank[rows], labels[rows], queries, 5, 0.07)
        right.append(100 * (predicted == truth).mean())
    assert values["fewshot_5"] == pytest.approx(np.mean(right))
    assert values["fewshot_5_std"] == pytest.approx(np.std(right, ddof=1))
    whole = dict(KNN([1000])(FeatureSet(bank, labels, queries, truth)))["knn_k1000"]
    assert values["fewshot_1000"] == pytest.approx(whole)
    assert values["fewshot_1000_std"] == 0


def test_a_bank_in_half_precision_on_the_disk(tmp_path):
    bank, labels, queries, _ = clusters()
    np.save(tmp_path / "bank.npy", bank.astype(np.float16))
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected = brute_force(bank.astype(np.float16), labels, queries, 20, 0.07)
    assert np.array_equal(knn_predict(mapped, labels, queries, 20), expected)


def test_accuracy_by_class():
    found = accuracy_by_class(np.array([True, False, True, True]), np.array([7, 7, 9, 9]))
    assert found == {7: (50.0, 2), 9: (100.0, 2)}


def test_tiny_temperature_does_not_overflow():
    bank, labels, queries, _ = clusters()
    nearest = knn_predict(bank, labels, queries, 1)
    assert np.array_equal(knn_predict(bank, labels, queries, 50, 1e-4), nearest)


def test_the_kind_is_taken_that_classifies_training_images_best():
    """By all other training images; the test images are then measured with it alone."""
    train, labels, test, truth = clusters()
    noise = np.random.default_rng(1)
    weak, weak_test = (noise.normal(size=x.shape).astype(np.float32) for x in (train, test))
    features = FeatureSet(weak, labels, weak_test, truth, more={"patch": (train, test)})
    knn = KNN(k=20, kinds=["cls", "patch"])
    measured = dict(knn(features))["knn_k20"]
    assert knn.chosen == {"kind": "patch"}
    expected = knn_predict(train, labels, test, 20) == truth
    assert float(measured) == pytest.approx(100 * expected.mean())
    alone = KNN(k=20, kinds="cls")
    assert float(dict(alone(features))["knn_k20"]) < float(measured)
    assert alone.chosen == {"kind": "cls"}
