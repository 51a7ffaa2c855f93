"""How sure a number is: 95 % intervals, and paired tests between two backbones.

The test images (queries, objects) are the random sample, so a number keeps what each of them
contributed. Shares of right answers have Wilson's interval (1927), means Student's. What is not a
mean (mIoU, NMI, R^2) has its standard error from random halves of the images (McCarthy 1969), which
repeat no image: the bootstrap does, and repeated images make clusters look better than they are.
Two backbones measured on the same images are compared image by image: shares by McNemar's exact
test, the rest by the standard error of their difference.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy  # parts are imported when they are used first
from jaxtyping import Bool, Float, Shaped

from ssl_xcit.utils.intervals import wilson

ALPHA = 0.05
HALVES = 400
Items = Shaped[np.ndarray, "Q *rest"]
Weights = Float[np.ndarray, " Q"]
Statistic = Callable[[Any, Any], float]  # (items, weights of the items) -> value


def mean(items: Items, weights: Weights) -> float:
    """Weighted mean of the items, and of their columns."""
    return float(np.mean(weights @ items.astype(np.float64) / weights.sum()))


def percent(items: Items, weights: Weights) -> float:
    """100 times the mean."""
    return 100.0 * mean(items, weights)


class Estimate(float):
    """A float that keeps what each image contributed to it.

    Args:
        items: (Q, ...), one entry an image; bool where right or wrong is all there is; of a mean
            also (Q, S) with what S random draws made of each image.
        statistic: (items, weights (Q,)) -> value; the number itself has all weights at 1.
        noise: the standard error from what else was drawn at random, such as k-means' starts.
    """

    items: np.ndarray
    statistic: Statistic
    noise: float

    def __new__(
        cls, items: Items, statistic: Statistic = percent, noise: float = 0.0
    ) -> "Estimate":
        """The statistic of all items."""
        self = super().__new__(cls, statistic(items, np.ones(len(items))))
        self.items = items
        self.statistic = statistic
        self.noise = noise
        return self

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None of a single image."""
        if len(self.items) < 2:
            return None
        if is_share(self):
            return wilson(int(self.items.sum()), len(self.items))
        error = math.hypot(standard_error(self.items, self.statistic), self.noise)
        half = quantile(len(self.items)) * error
        low, high = float(self) - half, float(self) + half
        return (max(0.0, low), min(100.0, high)) if self.statistic is percent else (low, high)


def ratio(items: Items, weights: Weights) -> float:
    """100 times the sum of the first column over that of the second."""
    total, count = weights @ items
    return 100.0 * float(total / count)


def grouped(values: Items, groups: Iterable[Any]) -> Estimate:
    """The mean in percent of values that were drawn in groups, as objects of one video are: the
    groups are the random sample.
    """
    _, group = np.unique(np.array(list(groups)), return_inverse=True)
    return Estimate(np.stack((np.bincount(group, values), np.bincount(group)), axis=1), ratio)


def is_share(estimate: Estimate) -> bool:
    """Whether it is a share of right answers."""
    return estimate.statistic is percent and estimate.items.dtype == bool


def quantile(count: int) -> float:
    """Student's 97.5 % quantile for the mean of so many images."""
    return float(scipy.special.stdtrit(count - 1, 0.975))


def standard_error(items: Items, statistic: Statistic) -> float:
    """Of a statistic of the items; a mean's in closed form, over images and draws."""
    if statistic in (mean, percent):
        scale = 100.0 if statistic is percent else 1.0
        values = items.astype(np.float64).reshape(len(items), -1)
        variance = values.mean(axis=1).var(ddof=1) / len(values)
        if values.shape[1] > 1:
            variance += values.mean(axis=0).var(ddof=1) / values.shape[1]
        return scale * math.sqrt(variance)
    return deviation(len(items), items.size, lambda drawn: statistic(items, drawn))


def deviation(Q: int, size: int, value_of: Callable[[Weights], float]) -> float:
    """The standard error by random halves of Q images; fewer halves where `size` is large."""
    count = int(np.clip(1e8 / max(1, size), 100, HALVES))
    generator = np.random.Generator(np.random.Philox(0))
    values = np.empty(count)
    for r in range(count):
        weights = np.zeros(Q)
        weights[generator.permutation(Q)[: Q // 2]] = 1.0
        values[r] = value_of(weights)
    return float(values.std(ddof=1)) * math.sqrt((Q // 2) / (Q - Q // 2))


@dataclass(frozen=True)
class Difference:
    """Second number minus the first, on the same images, with its 95 % interval and p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(one: Estimate, two: Estimate) -> Difference:
    """The paired difference, image by image; raises ValueError where they were not measured on
    equally many images, or there is but one.
    """
    Q = len(one.items)
    if len(two.items) != Q or Q < 2:
        raise ValueError(f"{Q} and {len(two.items)} images cannot be paired")
    value = float(two) - float(one)
    if one.statistic is two.statistic and one.statistic in (mean, percent):
        change = two.items.astype(np.float64) - one.items.astype(np.float64)
        error = standard_error(change, one.statistic)
    else:
        error = deviation(
            Q,
            one.items.size + two.items.size,
            lambda drawn: two.statistic(two.items, drawn) - one.statistic(one.items, drawn),
        )
    error = math.hypot(error, one.noise, two.noise)
    half = quantile(Q) * error
    if is_share(one) and is_share(two):
        p = mcnemar(one.items, two.items)
    else:
        score = abs(value) / error if error > 0 else math.inf
        p = 2 * float(scipy.special.stdtr(Q - 1, -score)) if value else 1.0
        p = max(p, 2 * 0.5 ** min(Q, 1000))  # no test of Q signs can give a lower one
    return Difference(value, value - half, value + half, min(1.0, p))


def mcnemar(one: Bool[np.ndarray, " Q"], two: Bool[np.ndarray, " Q"]) -> float:
    """p of the exact two-sided McNemar test on the images that only one of both gets right."""
    gained, lost = int((two & ~one).sum()), int((one & ~two).sum())
    return min(1.0, 2 * float(scipy.special.bdtr(min(gained, lost), gained + lost, 0.5)))


def holm(ps: Iterable[float]) -> list[bool]:
    """Which of several tests are significant together at 5 % (Holm 1979)."""
    values = list(ps)
    significant = [False] * len(values)
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[i] > ALPHA / (len(values) - rank):
            break
        significant[i] = True
    return significant
