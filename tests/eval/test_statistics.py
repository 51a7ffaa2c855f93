"""Intervals and paired tests against scipy, statistics written out, and their promise."""

import numpy as np
import pytest
from scipy.stats import binomtest, sem, t

from ssl_xcit.eval.evaluators.clustering import ari, nmi
from ssl_xcit.eval.statistics import Estimate, holm, mcnemar, paired_difference
from ssl_xcit.utils.intervals import wilson


def test_a_share_is_a_float_with_its_interval():
    estimate = Estimate(np.arange(200) % 4 > 0)
    assert estimate == 75.0
    assert estimate.interval == wilson(150, 200)


def test_a_mean_has_students_interval_and_halves_come_to_the_same():
    items = np.random.default_rng(0).normal(0.4, 0.1, size=301)
    expected = t.interval(0.95, 300, 100 * items.mean(), 100 * sem(items))
    assert Estimate(items).interval == pytest.approx(expected)
    by_halves = Estimate(items, lambda x, w: 100 * float(w @ x / w.sum())).interval
    assert by_halves == pytest.approx(expected, abs=0.2)


def test_clusters_without_signal_lie_within_their_interval():
    """A bootstrap's lies above: images drawn twice are together by necessity."""
    rng = np.random.default_rng(0)
    for signal in (0.0, 0.5):
        classes = rng.integers(17, size=700)
        clusters = np.where(rng.random(700) < signal, classes, rng.integers(17, size=700))
        for statistic in (nmi, ari):
            estimate = Estimate(np.stack((classes, clusters), axis=1), statistic)
            low, high = estimate.interval
            assert low < estimate < high
            assert high - low < 12


def test_draws_add_to_the_uncertainty():
    """Of 300 images and 10 draws which shift all images together."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(150):
        shift = rng.normal(0, 0.05, 10)
        items = (rng.random((300, 1)) < 0.6) * 0.5 + 0.2 + shift + rng.normal(0, 0.05, (300, 10))
        low, high = Estimate(items).interval
        inside.append(low <= 50 <= high)
    assert np.mean(inside) > 0.88


def test_other_noise_adds_to_the_error():
    items = np.random.default_rng(0).normal(0.4, 0.1, size=301)
    plain, noisy = Estimate(items), Estimate(items, noise=2.0)
    with_noise, without = ((e.interval[1] - e.interval[0]) / 2 for e in (noisy, plain))
    assert with_noise**2 == pytest.approx(without**2 + (2.0 * t.ppf(0.975, 300)) ** 2)
    assert paired_difference(noisy, Estimate(items + 0.03, noise=2.0)).p > 0.2
    assert paired_difference(plain, Estimate(items + 0.03)).p < 1e-9


def test_a_single_image_has_no_interval_and_what_cannot_vary_is_certain():
    assert Estimate(np.array([True])).interval is None
    assert Estimate(np.array([0.5])).interval is None
    same = Estimate(np.full(20, 0.25))
    assert same.interval == (25.0, 25.0)
    assert paired_difference(same, same).p == 1.0
    assert paired_difference(same, Estimate(np.full(20, 0.5))).p == 2 * 0.5**20


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(200):
        low, high = Estimate(rng.random(80) ** 2).interval
        inside.append(low <= 100 / 3 <= high)
    assert 0.89 <= np.mean(inside) <= 0.99


def test_mcnemar_counts_the_images_that_differ():
    right = [[True, False, True], [False, True, True]]
    one, two = (np.repeat(each, [9, 2, 50]) for each in right)
    assert mcnemar(one, two) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert mcnemar(one, one) == 1.0
    for gained, lost in ((5, 5), (1, 9), (40, 52), (0, 3)):
        one, two = np.repeat([[True, False], [False, True]], [lost, gained], axis=1)
        assert mcnemar(one, two) == pytest.approx(binomtest(gained, gained + lost).pvalue)


@pytest.mark.parametrize("real", [True, False])
def test_a_paired_difference(real):
    rng = np.random.default_rng(3)
    one = rng.random(400) if real else rng.random(400) < 0.5
    shift = rng.normal(0.05, 0.02, 400) if real else rng.random(400) < 0.1
    two = one + shift if real else one | shift
    found = paired_difference(Estimate(one), Estimate(two))
    assert found.value == pytest.approx(100 * (two.mean() - one.mean()))
    assert 0 < found.low < found.value < found.high
    assert found.p < 0.01
    same = paired_difference(Estimate(one), Estimate(rng.permutation(one)))
    assert same.low < 0 < same.high
    assert same.p > 0.05


def test_pairs_need_the_same_images():
    with pytest.raises(ValueError, match="3 and 4 images"):
        paired_difference(Estimate(np.ones(3, bool)), Estimate(np.ones(4, bool)))


def test_holm_by_its_steps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([]) == []
