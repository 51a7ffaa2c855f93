"""The space of a sweep: values of varied settings in Hydra's grammar (`a=1,2`, `choice`, `range`,
`interval`, `tag(log, ...)`, `glob`), and the settings that all trials share.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from ssl_xcit.errors import UserError


@dataclass(frozen=True)
class Choice:
    """One of several values, as they are typed."""

    values: tuple[str, ...]

    def sampled(self, rng: random.Random) -> str:
        """Draw a value uniformly."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high: whole ones if both ends are, at steps if there is a step."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it has whole numbers only."""
        return all(isinstance(x, int) for x in (self.low, self.high, self.step) if x is not None)

    @property
    def values(self) -> tuple[str, ...]:
        """All values of an interval with a step.

        Raises:
            UserError: it has none.
        """
        if self.step is None:
            raise UserError(
                f"interval({self.low:g},{self.high:g}) has infinitely many values: name some, or "
                "sample it with sweep=random or sweep=optuna"
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(written(self.low + i * self.step) for i in range(count))

    def sampled(self, rng: random.Random) -> str:
        """Draw a value, uniform or uniform in the logarithm."""
        if self.step is not None:
            return rng.choice(self.values)
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        if self.whole:
            value = min(max(round(value), self.low), self.high)
        return written(value)


Values = Choice | Interval


@dataclass(frozen=True)
class Space:
    """Settings of the trials of a sweep.

    Args:
        fixed: overrides that all trials share.
        swept: values by the key that is varied.
    """

    fixed: tuple[str, ...]
    swept: dict[str, Values]

    def one_by_one(self) -> Iterator[list[str]]:
        """Yield overrides in which each value, or end of an interval, occurs beside the first of
        the other keys.
        """
        samples = {
            key: list(values.values)
            if isinstance(values, Choice)
            else [f"{values.low:g}", f"{values.high:g}"]
            for key, values in self.swept.items()
        }
        first = {key: values[0] for key, values in samples.items()}
        yield [f"{key}={value}" for key, value in first.items()]
        for key, values in samples.items():
            for value in values[1:]:
                yield [f"{k}={v}" for k, v in {**first, key: value}.items()]


def written(value: float) -> str:
    """A number as it is typed, with four significant digits."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}"


def read_space(words: Sequence[str], loader: ConfigLoader) -> Space:
    """Parse the overrides of a sweep.

    Args:
        words: overrides in Hydra's grammar.
        loader: lists the options of a group, for `glob`.

    Raises:
        UserError: one is for Hydra's own sweepers, or has an empty interval.
    """
    fixed, swept = [], {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        key = override.get_key_element()
        if key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")):
            raise UserError(
                f"{override.input_line}: choose sweep=grid, random or optuna instead, and "
                "launcher=basic, joblib, submitit or ray"
            )
        if override.is_sweep_override():
            swept[key] = values_of(override)
        else:
            fixed.append(str(override.input_line))
    return Space(tuple(fixed), swept)


def values_of(override: Override) -> Values:
    """The values of one override.

    Raises:
        UserError: there is none, or the interval is empty.
    """
    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        if not low < high or (log and low <= 0):
            raise UserError(
                f"{override.input_line} must go from a lower to a higher number" + ", above 0" * log
            )
        return Interval(low, high, log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = list(value.range())
        if len(numbers) > 1:
            return Interval(numbers[0], numbers[-1], False, numbers[1] - numbers[0])
    values = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not values:
        raise UserError(f"{override.input_line}: there is no such value")
    return Choice(values)


def combinations(space: Space) -> Iterator[tuple[str, ...]]:
    """Yield all combinations of values as overrides; the last key changes fastest."""
    keys = list(space.swept)
    for values in product(*(space.swept[key].values for key in keys)):
        yield tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))


def sampled(space: Space, seed: int, number: int) -> tuple[str, ...]:
    """The combination with this number, a function of (space, seed, number)."""
    rng = random.Random(f"{seed} {number}")
    return tuple(f"{key}={values.sampled(rng)}" for key, values in space.swept.items())
