"""Which combination comes next: every one, or random ones; what earlier results make likely is in
`tpe.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ssl_xcit.errors import UserError
from ssl_xcit.run_name import folder_name
from ssl_xcit.sweeps.space import Space, combinations, sampled
from ssl_xcit.sweeps.trial import Trial


@runtime_checkable
class Search(Protocol):
    """Trials one after another, in an order that a second start repeats.

    Attributes:
        total: how many there will be.
    """

    total: int

    def start(self, space: Space, folder: Path) -> None:
        """Before the first trial; `folder` is the sweep's.

        Raises:
            UserError: nothing can be searched in this space.
        """
        ...

    def ask(self) -> Trial | None:
        """The next one; None when there are no more."""
        ...

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """Told an intermediate value at a share of the run, whether the trial may end here."""
        ...

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """What became of a trial."""
        ...

    def close(self) -> None:
        """After the last one."""


class Listed:
    """Trials that are known from the start, none ended early."""

    total = 0

    def __init__(self) -> None:
        self.trials: Iterator[Trial] = iter(())

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """Never."""
        return False

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """Changes nothing."""

    def ask(self) -> Trial | None:
        """In their order."""
        return next(self.trials, None)

    def close(self) -> None:
        """Nothing is held."""


class Grid(Listed):
    """Every combination; values added later are new trials beside the old ones."""

    def start(self, space: Space, folder: Path) -> None:
        """See `Search`."""
        found = list(combinations(space))
        self.total = len(found)
        self.trials = (Trial(n, o, folder / folder_name(o, "")) for n, o in enumerate(found))


class Random(Listed):
    """Values drawn at random; combination n is a function of the seed and n, so a larger number of
    trials goes on where a smaller one ended.

    Args:
        num_trials: how many.
        seed: of the draws.
    """

    def __init__(self, num_trials: int = 20, seed: int = 0):
        super().__init__()
        check_count("sweep.search.num_trials", num_trials, 1)
        check_count("sweep.search.seed", seed, 0)
        self.num_trials, self.seed = num_trials, seed

    def start(self, space: Space, folder: Path) -> None:
        """See `Search`."""
        need_something(space)
        found = [sampled(space, self.seed, number) for number in range(self.num_trials)]
        self.total = len(found)
        self.trials = (numbered(folder, n, o) for n, o in enumerate(found))


@dataclass(frozen=True)
class Halving:
    """When a trial may end early: asynchronous successive halving (arXiv:1810.05934). At each rung
    only the best 1 / `factor` of the trials that have come so far go on.

    Args:
        first: the first rung, as a share of the run; the others are `factor` times further each.
        factor: above 1.
    """

    first: float = 0.25
    factor: int = 2

    def __post_init__(self) -> None:
        """Raises UserError for a number out of its range."""
        if not isinstance(self.first, float | int) or not 0.001 <= self.first < 1:
            raise UserError(f"sweep.search.pruning.first={self.first}: a share from 0.001 to 1")
        check_count("sweep.search.pruning.factor", self.factor, 2)


def numbered(folder: Path, number: int, overrides: Sequence[str]) -> Trial:
    """Drawn values may repeat; their number tells them apart."""
    return Trial(number, tuple(overrides), folder / folder_name(overrides, f"{number:03d}"))


def need_something(space: Space) -> None:
    """Raises UserError where nothing varies."""
    if not space.swept:
        raise UserError(
            "there is nothing to search: name values, such as optim.lr=1e-4,5e-4 or "
            "'optim.lr=tag(log,interval(1e-4,1e-2))'"
        )


def check_count(name: str, value: Any, low: int) -> None:
    """Raises UserError for anything but a whole number from `low`."""
    if type(value) is not int or value < low:
        raise UserError(f"{name}={value}: a whole number from {low}")
