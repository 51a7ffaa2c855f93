"""How sure a number is: 95 % intervals, and paired tests between two backbones.

What was drawn at random are the test images (queries, sequences), so a number keeps what each of
them contributed. Shares of right answers get Wilson's interval (Wilson 1927), everything else a
percentile bootstrap over the images (Efron 1979). Two backbones measured on the same images are
compared image by image: shares by McNemar's exact test, the rest by the paired bootstrap.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import binom

Z = 1.959964  # of a normal distribution 95 % lie within so many deviations
ALPHA = 0.05
RESAMPLES = 1000
Items = Shaped[np.ndarray, "Q *rest"]
Weights = Float[np.ndarray, " Q"]
Statistic = Callable[[Any, Any], float]  # (items, weights of the items) -> value


def percent(items: Items, weights: Weights) -> float:
    """100 times the weighted mean of the items."""
    return 100.0 * float(weights @ items.astype(np.float64) / weights.sum())


class Estimate(float):
    """A number with what each image contributed to it; else a float like any other.

    Args:
        items: (Q, ...), one entry an image; bool where right or wrong is all there is.
        statistic: (items, weights (Q,)) -> value; the number itself has all weights at 1.
    """

    items: np.ndarray
    statistic: Statistic

    def __new__(cls, items: Items, statistic: Statistic = percent) -> "Estimate":
        """The statistic of all items."""
        self = super().__new__(cls, statistic(items, np.ones(len(items))))
        self.items = items
        self.statistic = statistic
        return self

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's for a share of right answers, else a bootstrap."""
        if is_share(self):
            return wilson(int(self.items.sum()), len(self.items))
        values = resampled([self])[0]
        low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
        return float(low), float(high)


def is_share(estimate: Estimate) -> bool:
    """A share of right answers."""
    return estimate.statistic is percent and estimate.items.dtype == bool


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of hits / count, in percent."""
    share = hits / count
    centre = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 100.0 / (1 + Z * Z / count)
    return max(0.0, scale * (centre - half)), min(100.0, scale * (centre + half))


def resampled(estimates: Sequence[Estimate], seed: int = 0) -> Float[np.ndarray, "E R"]:
    """Values of the estimates on the same random draws of their images, with replacement.

    As many as `RESAMPLES`, fewer where an image contributes many numbers.
    """
    first = estimates[0].items
    count = int(np.clip(4e9 / max(1, first.size), 200, RESAMPLES))
    generator = np.random.Generator(np.random.Philox(seed))
    Q = len(first)
    values = np.empty((len(estimates), count))
    for r in range(count):
        weights = np.bincount(generator.integers(Q, size=Q), minlength=Q).astype(np.float64)
        values[:, r] = [e.statistic(e.items, weights) for e in estimates]
    return values


@dataclass(frozen=True)
class Difference:
    """Of two numbers on the same images: second less first, its 95 % interval, and how likely a
    difference as large is by chance.
    """

    value: float
    low: float
    high: float
    p: float


def compare(one: Estimate, two: Estimate) -> Difference:
    """Paired, image by image.

    Raises:
        ValueError: they were not measured on equally many images.
    """
    if len(one.items) != len(two.items):
        raise ValueError(f"{len(one.items)} and {len(two.items)} images cannot be paired")
    values = resampled([one, two])
    low, high = np.quantile(values[1] - values[0], [ALPHA / 2, 1 - ALPHA / 2])
    if is_share(one) and is_share(two):
        p = mcnemar(one.items, two.items)
    else:
        difference = values[1] - values[0]
        below, above = (difference <= 0).sum(), (difference >= 0).sum()
        p = min(1.0, 2 * (1 + int(min(below, above))) / (1 + len(difference)))
    return Difference(float(two) - float(one), float(low), float(high), p)


def mcnemar(one: Bool[np.ndarray, " Q"], two: Bool[np.ndarray, " Q"]) -> float:
    """Exact two-sided McNemar test: of the images that one alone gets right, half by chance."""
    gained, lost = int((two & ~one).sum()), int((one & ~two).sum())
    if gained + lost == 0:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5)))


def holm(ps: Iterable[float]) -> list[bool]:
    """Which of several tests hold together at 5 % (Holm 1979)."""
    values = list(ps)
    holds = [False] * len(values)
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[i] > ALPHA / (len(values) - rank):
            break
        holds[i] = True
    return holds
