"""Schedules as pure functions of the optimizer step (DINO, arXiv:2104.14294, section 4.1). Nothing
is remembered. `build.py` gives them to the learning rate, weight decay, EMA and the teacher's
temperature, with the numbers of `plan.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from ssl_xcit.utils.validation import NonNegative, Positive, Share


@dataclass(frozen=True)
class Cosine:
    """Linear from `warmup_start` to `start` over the warm-up, then half a cosine to `end` at the
    last step.
    """

    start: float  # value after the warm-up
    end: float  # value that the cosine reaches at `total_steps`
    total_steps: int  # steps of the whole run
    warmup_steps: int = 0  # steps of the linear part
    warmup_start: float = 0.0  # value at step 0 when there is a warm-up

    def __call__(self, step: float) -> float:
        """Value at `step`, counted from 0; past the end it stays."""
        if step < self.warmup_steps:
            # as numpy.linspace(warmup_start, start, warmup_steps): the last step has `start`
            share = step / max(1, self.warmup_steps - 1)
            return self.warmup_start + share * (self.start - self.warmup_start)
        length = self.total_steps - self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / max(1, length))
        return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Steps:
    """Linear from `warmup_start` to `start` over the warm-up; times `factor` at each of `at`."""

    start: float  # value after the warm-up
    at: Sequence[Share]  # shares of the run, such as 0.75 and 0.92
    total_steps: int  # steps of the whole run
    warmup_steps: int = 0  # steps of the linear part
    warmup_start: float = 0.0  # value at step 0 when there is a warm-up
    factor: Annotated[float, Gt(0), Le(1)] = 0.1

    def __call__(self, step: float) -> float:
        """Value at `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_start + step / self.warmup_steps * (self.start - self.warmup_start)
        return self.start * self.factor ** sum(step >= at * self.total_steps for at in self.at)


@dataclass(frozen=True)
class Polynomial:
    """Linear from `warmup_start` to what the decay has there, over the warm-up; the decay is
    `(1 - step / total_steps) ** power`, from `start` to `end`.
    """

    start: float  # value that the decay begins with
    total_steps: int  # steps of the whole run
    warmup_steps: int = 0  # steps of the linear part
    warmup_start: float = 0.0  # value at step 0 when there is a warm-up
    power: Positive = 1.0
    end: NonNegative = 0.0

    def __call__(self, step: float) -> float:
        """Value at `step`, counted from 0; past the end it stays."""
        left = max(0.0, 1.0 - step / self.total_steps) ** self.power
        value = self.end + (self.start - self.end) * left
        if step < self.warmup_steps:
            return self.warmup_start + step / self.warmup_steps * (value - self.warmup_start)
        return value


@dataclass(frozen=True)
class BackboneUnfreezeSchedule:
    """0 for the first steps, then linearly to 1, then 1: how much of its learning rate a backbone
    gets that starts from weights, beside a head that does not.
    """

    freeze_steps: int  # of 0
    warmup_steps: int  # from there to 1; the first of them is above 0

    def __call__(self, step: float) -> float:
        """Value at `step`, counted from 0."""
        return min(1.0, max(0, step - self.freeze_steps + 1) / max(1, self.warmup_steps))
