"""Places against scikit-learn: clusters, neighbours, principal components."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from ssl_xcit.eval.viz import embedding
from ssl_xcit.eval.viz.embedding import components, tsne


def clustered(count, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 6, count)
    rows = 1.5 * rng.normal(size=(6, 32))[classes] + rng.normal(size=(count, 32))
    return rows.astype(np.float32), classes


def purity(rows, classes, k=5):
    near = NearestNeighbors(n_neighbors=k + 1).fit(rows).kneighbors(rows)[1][:, 1:]
    return (classes[near] == classes[:, None]).mean()


@pytest.fixture(scope="module")
def made():
    rows, classes = clustered(300)
    return rows, classes, tsne(rows)


def test_clusters_and_neighbours_are_kept(made):
    rows, classes, places = made
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert places.shape == (300, 2)
    assert purity(places, classes) > purity(unit, classes) - 0.02
    kept = trustworthiness(unit, places, n_neighbors=10)
    assert kept > 0.85
    # what is not t-SNE keeps less
    assert trustworthiness(unit, PCA(2).fit_transform(unit), n_neighbors=10) < kept
    x, y = places.T
    assert x.var() > y.var()  # the longest axis lies across
    assert abs(np.corrcoef(x, y)[0, 1]) < 1e-6


def test_the_same_seed_gives_the_same_places_with_any_number_of_threads(made, monkeypatch):
    rows, _, places = made
    assert np.array_equal(tsne(rows), places)
    monkeypatch.setattr(embedding, "ONE_THREAD", 0)
    monkeypatch.setattr(embedding.os, "cpu_count", lambda: 3)
    assert np.array_equal(tsne(rows), places)
    assert not np.array_equal(tsne(rows, seed=1), places)


def test_lengths_of_features_mean_nothing(made):
    rows, _, places = made
    scaled = rows * np.random.default_rng(0).choice([0.25, 1.0, 4.0], size=(300, 1)).astype("f4")
    assert np.allclose(tsne(scaled), places, atol=1e-3 * np.ptp(places))


def test_components_are_those_of_pca():
    rows = clustered(80)[0].astype(np.float64)
    found = components(rows, 7)
    expected = PCA(7, svd_solver="full").fit_transform(rows)
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 11])
def test_few_images(count):
    rows = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    places = tsne(rows)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    if count > 1:
        assert len(np.unique(places, axis=0)) == count


def test_equal_images():
    assert np.array_equal(tsne(np.ones((40, 8), np.float32)), np.zeros((40, 2)))
    assert np.isfinite(tsne(np.zeros((40, 8), np.float32))).all()
    rows = np.repeat(np.random.default_rng(0).normal(size=(8, 16)), 40, axis=0)
    places = tsne(rows)
    assert np.isfinite(places).all()
    assert purity(places, np.repeat(np.arange(8), 40)) > 0.95


def test_half_precision_and_memory_maps(tmp_path, made):
    rows, classes, _ = made
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    places = tsne(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert purity(places, classes) > 0.9
