"""Searches, which decide the next combination of values: a grid and random search; `tpe.py` has one
that learns from results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.space import Space, combinations, sampled
from ssl_xcit.sweeps.trial import Trial
from ssl_xcit.training.run_name import folder_name
from ssl_xcit.utils.validation import Count

Seed = Annotated[int, Ge(0)]


class Search:
    """Gives trials one after another, in an order that a second start repeats. By itself these are
    known from the start, and none ends early.

    Attributes:
        total: number of trials.
    """

    total = 0

    def __init__(self) -> None:
        self.trials: Iterator[Trial] = iter(())

    def start(self, space: Space, folder: Path) -> None:
        """Prepare for the first trial; `folder` is the sweep's.

        Raises:
            UserError: this space cannot be searched.
        """
        raise NotImplementedError

    def ask(self) -> Trial | None:
        """The next trial; None after the last."""
        return next(self.trials, None)

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """Whether a trial may end here, by the metric at this share of the run."""
        return False

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """Take in the result of a trial."""

    def close(self) -> None:
        """Release resources after the last trial."""


class Grid(Search):
    """Every combination; values added later are new trials beside the old ones."""

    def start(self, space: Space, folder: Path) -> None:
        """See `Search`."""
        grid = list(combinations(space))
        self.total = len(grid)
        self.trials = (Trial(n, o, folder / folder_name(o)) for n, o in enumerate(grid))


class Random(Search):
    """Random values; combination n is a function of the seed and n, so a larger number of trials
    continues a smaller one.

    Args:
        num_trials: number of trials.
        seed: of the draws.
    """

    def __init__(self, num_trials: Count = 20, seed: Seed = 0):
        super().__init__()
        self.total, self.seed = num_trials, seed

    def start(self, space: Space, folder: Path) -> None:
        """See `Search`."""
        require_variation(space)
        self.trials = (
            numbered_trial(folder, n, sampled(space, self.seed, n)) for n in range(self.total)
        )


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (arXiv:1810.05934): of the trials that reach a rung only the
    best 1 / `factor` continue.

    Args:
        first: the first rung, as a share of the run; the others are `factor` times further each.
        factor: between rungs, and of the trials at each.
    """

    first: Annotated[float, Ge(0.001), Lt(1)] = 0.25
    factor: Annotated[int, Ge(2)] = 2


def numbered_trial(folder: Path, number: int, overrides: Sequence[str]) -> Trial:
    """A trial with its number in the folder's name, for drawn values may repeat."""
    return Trial(number, tuple(overrides), folder / folder_name(overrides, f"{number:03d}"))


def require_variation(space: Space) -> None:
    """Raise UserError where nothing varies."""
    if not space.swept:
        raise UserError(
            "there is nothing to search: name values, such as optim.lr=1e-4,5e-4 or "
            "'optim.lr=tag(log,interval(1e-4,1e-2))'"
        )
