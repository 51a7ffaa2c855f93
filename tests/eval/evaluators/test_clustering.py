"""Agreement of clusters with classes, against scikit-learn."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from test_linear import problem

from ssl_xcit.eval import statistics
from ssl_xcit.eval.evaluators.clustering import Clustering, ari, nmi
from ssl_xcit.eval.features.extract import FeatureSet
from ssl_xcit.eval.features.neighbors import unit


@pytest.mark.parametrize("seed", range(4))
def test_nmi_and_ari_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(5, size=200)
    clusters = np.where(rng.random(200) < 0.3 * seed, rng.integers(7, size=200), classes)
    items = np.stack((classes, clusters), axis=1)
    ones = np.ones(200)
    assert nmi(items, ones) == pytest.approx(100 * normalized_mutual_info_score(classes, clusters))
    assert ari(items, ones) == pytest.approx(100 * adjusted_rand_score(classes, clusters))


def test_clusters_are_as_good_as_scikit_learns(monkeypatch):
    monkeypatch.setattr(statistics, "HALVES", 40)
    data = problem(n=300, noise=1.0)
    values = dict(Clustering(runs=4)(data))
    rows = unit(data.test)
    expected = np.mean([
        100 * normalized_mutual_info_score(
            data.test_labels, KMeans(5, n_init=1, init="random", random_state=i).fit_predict(rows)
        )
        for i in range(10)
    ])  # fmt: skip
    assert values["nmi"] == pytest.approx(expected, abs=8)
    assert values["cluster_accuracy"] > 70
    assert dict(Clustering(runs=4)(data)) == values
    for value in values.values():
        low, high = value.interval
        assert low <= value <= high


def test_nothing_to_tell_apart_is_an_error():
    data = problem()
    one = FeatureSet(data.train, data.train_labels, data.test, 0 * data.test_labels)
    with pytest.raises(ValueError, match="one class only"):
        dict(Clustering()(one))
