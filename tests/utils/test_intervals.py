"""Intervals against scipy's."""

import pytest
from scipy.stats import binomtest

from ssl_xcit.utils.intervals import wilson


@pytest.mark.parametrize(("hits", "count"), [(7, 10), (0, 10), (10, 10), (1, 1), (3_000, 50_000)])
def test_intervals_of_shares_are_wilsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((100 * expected.low, 100 * expected.high))
    low, high = wilson(hits, count)
    assert 0.0 <= low <= 100.0 * hits / count <= high <= 100.0
