"""What a sweep varies: values of Hydra's grammar (`a=1,2`, `choice`, `range`, `interval`, `tag(log,
...)`, `glob`), and what all its trials have in common.
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
    """One of some values, as they are written behind the `=`."""

    values: tuple[str, ...]

    def sampled(self, rng: random.Random) -> str:
        """Each as likely."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high; whole ones where both ends are, by steps where there is a step."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether there are whole numbers only."""
        return all(isinstance(x, int) for x in (self.low, self.high, self.step) if x is not None)

    @property
    def values(self) -> tuple[str, ...]:
        """All of them, where there is a step.

        Raises:
            UserError: there is none.
        """
        if self.step is None:
            raise UserError(
                f"interval({self.low:g},{self.high:g}) has no end of values: name some, or "
                "sample it with sweep=random or sweep=optuna"
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(written(self.low + i * self.step) for i in range(count))

    def sampled(self, rng: random.Random) -> str:
        """Uniform, or uniform in the logarithm."""
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
    """What all trials have in common, and what varies.

    Args:
        fixed: overrides.
        swept: what is varied, by its key.
    """

    fixed: tuple[str, ...]
    swept: dict[str, Values]


def written(value: float) -> str:
    """A number as a person writes it; four digits tell a sampled one well enough."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}"


def read_space(words: Sequence[str], loader: ConfigLoader) -> Space:
    """Overrides as they were typed.

    Args:
        words: each in Hydra's grammar.
        loader: tells the options of a group, for `glob`.

    Raises:
        UserError: one that belongs to Hydra's own sweepers, or an interval that is none.
    """
    fixed, swept = [], {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        key = override.get_key_element()
        if key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")):
            raise UserError(
                f"{override.input_line}: here it is sweep=grid, random or optuna, and "
                "launcher=basic, joblib, submitit or ray"
            )
        if override.is_sweep_override():
            swept[key] = values_of(override)
        else:
            fixed.append(str(override.input_line))
    return Space(tuple(fixed), swept)


def values_of(override: Override) -> Values:
    """What is varied by one override.

    Raises:
        UserError: no value, or an interval from a higher to a lower number.
    """
    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        if not low < high or (log and low <= 0):
            raise UserError(f"{override.input_line}: from a lower to a higher number" + ", above 0")
        return Interval(low, high, log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = list(value.range())
        if len(numbers) > 1:
            return Interval(numbers[0], numbers[-1], False, numbers[1] - numbers[0])
    found = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not found:
        raise UserError(f"{override.input_line}: there is no such value")
    return Choice(found)


def combinations(space: Space) -> Iterator[tuple[str, ...]]:
    """Every combination of values, as overrides; the last key changes fastest."""
    keys = list(space.swept)
    for values in product(*(space.swept[key].values for key in keys)):
        yield tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))


def sampled(space: Space, seed: int, number: int) -> tuple[str, ...]:
    """The combination with this number, a function of (space, seed, number)."""
    rng = random.Random(f"{seed} {number}")
    return tuple(f"{key}={values.sampled(rng)}" for key, values in space.swept.items())
