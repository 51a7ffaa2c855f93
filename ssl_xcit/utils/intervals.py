"""95 % intervals of shares."""

import math
from statistics import NormalDist

Interval = tuple[float, float]
NORMAL = NormalDist().inv_cdf(0.975)  # half of an interval, in standard errors


def wilson(hits: int, count: int) -> Interval:
    """Wilson's score interval (1927) of hits / count, in percent."""
    share, square = hits / count, NORMAL**2 / count
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    low, high = ((share + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    return max(0.0, 100.0 * low), min(100.0, 100.0 * high)
