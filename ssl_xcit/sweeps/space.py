"""The space of a sweep: values of varied settings in Hydra's grammar (`a=1,2`, `choice`, `range`,
`interval`, `tag(log, ...)`, `glob`) as Optuna's distributions, and what all trials share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, log10
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ssl_xcit.errors import UserError


@dataclass(frozen=True)
class Space:
    """Settings of the trials of a sweep.

    Args:
        fixed: overrides that all trials share.
        swept: distribution by the key that is varied; of words, as they are typed.
        words: overrides that vary.
    """

    fixed: tuple[str, ...]
    swept: dict[str, Any]
    words: tuple[str, ...] = ()

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield all combinations of values; the last key changes fastest."""
        for values in product(*map(values_in, self.swept.values())):
            yield dict(zip(self.swept, values, strict=True))

    def one_by_one(self) -> Iterator[list[str]]:
        """Yield overrides in which each value, or end of an interval, occurs beside the first of
        the other keys.
        """
        samples = {
            key: v.choices if isinstance(v, CategoricalDistribution) else (v.low, v.high)
            for key, v in self.swept.items()
        }
        first = {key: values[0] for key, values in samples.items()}
        yield overrides_of(first)
        for key, values in samples.items():
            for value in values[1:]:
                yield overrides_of({**first, key: value})


def values_in(distribution: Any) -> Sequence[Any]:
    """All values of a distribution.

    Raises:
        UserError: it has infinitely many.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        raise UserError(
            f"interval({low:g},{high:g}) has infinitely many values: name some, or "
            "sample it with sweep=random or sweep=optuna"
        )
    count = round((high - low) / step) + 1
    return [rounded(low + i * step, distribution) for i in range(count)]


def rounded(value: Any, distribution: Any) -> Any:
    """Round a number of an interval to four significant digits of x, of 1 - x (a momentum of
    0.99997 is not 1) and of the interval's width; one of a range loses what binary adds.
    """
    if not isinstance(value, float):
        return value
    low, high = distribution.low, distribution.high
    if distribution.step is None:
        finest = min(size for size in (abs(value), abs(1 - value), high - low) if size)
        value = round(value, 3 - floor(log10(finest)))
    else:
        value = float(f"{value:.15g}")  # 0.30000000000000004
    return float(min(max(value, low), high))


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Values as they are typed; the text of a number is exact."""
    return [
        f"{k}={str(v).removesuffix('.0') if isinstance(v, float) else v}" for k, v in values.items()
    ]


def read_space(words: Sequence[str], loader: ConfigLoader) -> Space:
    """Parse the overrides of a sweep.

    Args:
        words: overrides in Hydra's grammar.
        loader: lists the options of a group, for `glob`.

    Raises:
        UserError: one is for Hydra's own sweepers, or has an empty interval.
    """
    fixed, swept, varied = [], {}, []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        key = override.get_key_element()
        if key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")):
            raise UserError(
                f"{override.input_line}: choose sweep=grid, random or optuna instead, and "
                "launcher=local, submitit or ray"
            )
        if override.is_sweep_override():
            swept[key] = distribution_of(override)
            varied.append(str(override.input_line))
        else:
            fixed.append(str(override.input_line))
    return Space(tuple(fixed), swept, tuple(varied))


def distribution_of(override: Override) -> BaseDistribution:
    """The values of one override.

    Raises:
        UserError: there is none, or the interval is empty.
    """
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if not low < high or (log and low <= 0):
            raise UserError(
                f"{override.input_line} must go from a lower to a higher number" + ", above 0" * log
            )
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log)
        return FloatDistribution(low, high, log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        first, *others = value.range()
        if others and first < others[0]:
            last, step = others[-1], value.step
            if isinstance(first, int) and isinstance(step, int):
                return IntDistribution(first, int(last), step=step)
            return FloatDistribution(first, float(f"{last:.15g}"), step=step)
    values = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not values:
        raise UserError(f"{override.input_line}: there is no such value")
    return CategoricalDistribution(values)
