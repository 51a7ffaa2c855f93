"""Optuna's tree-structured Parzen estimator as a search, its record in SQLite.

One process asks and tells; trials know nothing of it. What trial n is offered is a function of the
seed, n and the results so far, so that a sweep that was stopped draws nothing twice.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.locks import exclusive
from ssl_xcit.sweeps.searches import Halving, check_count, need_something, numbered
from ssl_xcit.sweeps.space import Choice, Space, written
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, Trial

log = logging.getLogger(__name__)
RESOURCE = 1000  # of a whole run, as pruners count
OVERRIDES = "overrides"


class Optuna:
    """See the module.

    Args:
        num_trials: how many, those that end early and those that fail included.
        seed: of the draws.
        startup_trials: drawn at random before results are looked at.
        maximize: whether a higher value is the better one.
        pruning: when trials end early; None: never.
        storage: an SQLite file, or an address of a database; None: in the sweep's folder.

    Raises:
        UserError: optuna is missing, or a number is out of its range.
    """

    def __init__(
        self,
        num_trials: int = 20,
        seed: int = 0,
        startup_trials: int = 8,
        maximize: bool = True,
        pruning: Halving | None = None,
        storage: str | None = None,
    ):
        try:
            import optuna
        except ImportError as error:
            raise UserError("sweep=optuna needs optuna: pip install 'ssl-xcit[optuna]'") from error
        check_count("sweep.search.num_trials", num_trials, 1)
        check_count("sweep.search.seed", seed, 0)
        check_count("sweep.search.startup_trials", startup_trials, 1)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.total, self.seed, self.startup_trials = num_trials, seed, startup_trials
        self.maximize, self.pruning, self.storage = maximize, pruning, storage
        self.study: Any = None
        self.space = Space((), {})
        self.folder = Path()
        self.waiting: list[Any] = []  # begun by an earlier start, not ended
        self.running: dict[int, Any] = {}
        self.lock: Any = None

    def start(self, space: Space, folder: Path) -> None:
        """Open the record; trials that an earlier start has not ended come first.

        Raises:
            UserError: it is in use, is no record of Optuna's, or of another search.
        """
        need_something(space)
        for key, values in space.swept.items():
            if isinstance(values, Choice) and len(values.values) < 2:
                raise UserError(f"{key}={values.values[0]}: one value is nothing to search")
        self.space, self.folder = space, folder
        address = self.storage or str(folder / "optuna.db")
        if "://" not in address:
            path = Path(address).expanduser()
            self.lock = exclusive(path.with_name(f".{path.name}.lock"), str(path))
            self.lock.__enter__()
            check_free(path)
            address = f"sqlite:///{path.resolve()}"
        with self.trouble(address):
            self.study = self.optuna.create_study(
                storage=address,
                study_name=folder.name,
                direction="maximize" if self.maximize else "minimize",
                load_if_exists=True,
                pruner=self.pruner(),
            )
            self.check_same()
            begun = self.study.get_trials(
                states=(self.optuna.trial.TrialState.RUNNING,), deepcopy=False
            )
            self.waiting = [self.optuna.trial.Trial(self.study, t._trial_id) for t in begun]

    def check_same(self) -> None:
        """A record belongs to one space.

        Raises:
            UserError: it was made with other values.
        """
        described = {key: str(values) for key, values in self.space.swept.items()}
        before = self.study.user_attrs.get("space")
        if before is not None and before != described:
            changed = sorted(
                k for k in before.keys() | described if before.get(k) != described.get(k)
            )
            raise UserError(
                f"{self.folder} was searched with other values of {', '.join(changed)}: take "
                "another name=..., for its results would mislead this search"
            )
        self.study.set_user_attr("space", described)

    def pruner(self) -> Any:
        """Successive halving, or none."""
        if self.pruning is None:
            return self.optuna.pruners.NopPruner()
        return self.optuna.pruners.SuccessiveHalvingPruner(
            min_resource=round(self.pruning.first * RESOURCE),
            reduction_factor=self.pruning.factor,
        )

    def ask(self) -> Trial | None:
        """The next; those that were stopped go on first. Values that were tried to their end before
        are not tried again: they have the same result.
        """
        with self.trouble(str(self.folder)):
            while (asked := self.begun()) is not None:
                overrides = asked.user_attrs.get(OVERRIDES)
                if overrides is None:
                    overrides = [f"{key}={self.suggested(asked, key)}" for key in self.space.swept]
                    if (same := self.tried(overrides)) is not None:
                        complete = same.state == self.optuna.trial.TrialState.COMPLETE
                        self.study.tell(asked, same.value if complete else None, same.state)
                        continue
                    asked.set_user_attr(OVERRIDES, overrides)
                self.running[asked.number] = asked
                return numbered(self.folder, asked.number, overrides)
        return None

    def begun(self) -> Any:
        """A trial of Optuna's: one that an earlier start has not ended, or a new one."""
        if self.waiting:
            return self.waiting.pop(0)
        number = len(self.study.get_trials(deepcopy=False))
        if number >= self.total:
            return None
        self.study.sampler = self.optuna.samplers.TPESampler(
            seed=self.seed * 1_000_003 + number,
            n_startup_trials=self.startup_trials,
            constant_liar=True,
            multivariate=True,
        )
        return self.study.ask()

    def tried(self, overrides: list[str]) -> Any:
        """The trial that ended with the same values, if there is one."""
        ended = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.PRUNED)
        before = self.study.get_trials(states=ended, deepcopy=False)
        return next((t for t in before if t.user_attrs.get(OVERRIDES) == overrides), None)

    def suggested(self, asked: Any, key: str) -> str:
        """A value as it is written behind the `=`."""
        values = self.space.swept[key]
        if isinstance(values, Choice):
            return asked.suggest_categorical(key, values.values)
        low, high = sorted((values.low, values.high))
        step = None if values.step is None else abs(values.step)
        if values.whole:
            return written(asked.suggest_int(key, low, high, step=step or 1, log=values.log))
        return written(asked.suggest_float(key, low, high, step=step, log=values.log))

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """See `Search`; the same share twice is heard once."""
        asked = self.running[trial.number]
        with self.trouble(str(self.folder)):
            place = round(share * RESOURCE)
            if place not in self.reported(asked):
                asked.report(value, place)
            return asked.should_prune()

    def reported(self, asked: Any) -> dict[int, float]:
        """Places of the run and values there."""
        return self.study._storage.get_trial(asked._trial_id).intermediate_values

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """What ends a trial is entered; one that was stopped goes on another time."""
        states = self.optuna.trial.TrialState
        asked = self.running.pop(trial.number)
        with self.trouble(str(self.folder)):
            if state == FINISHED and value is not None:
                self.study.tell(asked, value)
            elif state == PRUNED:
                self.study.tell(asked, state=states.PRUNED)
            elif state in (FAILED, FINISHED):
                self.study.tell(asked, state=states.FAIL)

    def close(self) -> None:
        """Others may search on."""
        with suppress(Exception):
            self.study._storage.remove_session()
        if self.lock is not None:
            self.lock.__exit__(None, None, None)

    @contextmanager
    def trouble(self, address: str) -> Iterator[None]:
        """Of the database, in a line.

        Raises:
            UserError: it cannot be used.
        """
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, self.optuna.exceptions.StorageInternalError) as error:
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
            raise UserError(f"sweep.search.storage={address}: {reason}") from error


def check_free(path: Path) -> None:
    """That an SQLite file is one, and can be written now.

    Raises:
        UserError: it is not, or another program is writing to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as base:
            base.execute("BEGIN IMMEDIATE")
            base.execute("SELECT count(*) FROM sqlite_master")
            base.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise UserError(
                f"{path} is in use by another program: close what writes to it, or name another "
                "file with sweep.search.storage=..."
            ) from error
        raise UserError(f"{path}: {error}; name another file with sweep.search.storage") from error
    except (OSError, sqlite3.DatabaseError) as error:
        raise UserError(
            f"{path} cannot be used as a record of Optuna's ({error}): name another file with "
            "sweep.search.storage=..."
        ) from error
