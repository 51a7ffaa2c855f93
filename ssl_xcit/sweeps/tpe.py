"""Optuna's tree-structured Parzen estimator as a search, its study in SQLite.

One process asks and tells; trials do not import Optuna. The values of trial n are a function of the
seed, n and the results so far, so a sweep that was stopped draws nothing twice.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.searches import Halving, Search, Seed, numbered_trial, require_variation
from ssl_xcit.sweeps.space import Choice, Space, written
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, Trial
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.validation import Count

log = logging.getLogger(__name__)
BUSY = 2.0  # seconds to wait for another program's write
RESOURCE = 1000  # units of a whole run, for pruners
OVERRIDES = "overrides"  # attribute of an Optuna trial


class Optuna(Search):
    """TPE search; see the module docstring.

    Args:
        num_trials: number of trials, including those that end early or fail.
        seed: of the draws.
        startup_trials: random ones at the start.
        maximize: whether a higher value is better.
        pruning: ends trials early; None: never.
        storage: an SQLite file, or an address of a database; None: in the sweep's folder.

    Raises:
        UserError: optuna is missing.
    """

    def __init__(
        self,
        num_trials: Count = 20,
        seed: Seed = 0,
        startup_trials: Count = 8,
        maximize: bool = True,
        pruning: Halving | None = None,
        storage: str | None = None,
    ):
        try:
            import optuna
        except ImportError as error:
            raise UserError("sweep=optuna needs optuna: pip install 'ssl-xcit[optuna]'") from error
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.total, self.seed, self.startup_trials = num_trials, seed, startup_trials
        self.maximize, self.pruning, self.storage = maximize, pruning, storage
        self.study: Any = None
        self.space = Space((), {})
        self.folder = Path()
        self.unfinished: list[Any] = []  # Optuna's trials of an earlier start
        self.running: dict[int, Any] = {}  # Optuna's trials by number
        self.lock: Any = None

    def start(self, space: Space, folder: Path) -> None:
        """Open the study; trials that an earlier start has not finished come first.

        Raises:
            UserError: it is in use, not Optuna's, or of another space.
        """
        require_variation(space)
        for key, values in space.swept.items():
            if isinstance(values, Choice) and len(values.values) < 2:
                raise UserError(f"{key}={values.values[0]} is one value: name several to search")
        self.space, self.folder = space, folder
        address = self.storage or str(folder / "optuna.db")
        if "://" not in address:
            path = Path(address).expanduser()
            self.lock = exclusive(path.with_name(f".{path.name}.lock"), str(path))
            self.lock.__enter__()
            check_free(path)
            address = f"sqlite:///{path.resolve()}"
        with self.storage_errors(address):
            self.study = self.optuna.create_study(
                storage=address,
                study_name=folder.name,
                direction="maximize" if self.maximize else "minimize",
                load_if_exists=True,
                pruner=self.pruner(),
            )
            self.check_same()
            states = (self.optuna.trial.TrialState.RUNNING,)
            running = self.study.get_trials(states=states, deepcopy=False)
            self.unfinished = [self.optuna.trial.Trial(self.study, t._trial_id) for t in running]

    def check_same(self) -> None:
        """Raise UserError for a study of another space."""
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
        """The pruner of the study."""
        if self.pruning is None:
            return self.optuna.pruners.NopPruner()
        return self.optuna.pruners.SuccessiveHalvingPruner(
            min_resource=round(self.pruning.first * RESOURCE),
            reduction_factor=self.pruning.factor,
        )

    def ask(self) -> Trial | None:
        """The next trial: stopped ones first, and no values whose result is known."""
        keys = self.space.swept
        with self.storage_errors(str(self.folder)):
            while (offered := self.next_offer()) is not None:
                overrides = offered.user_attrs.get(OVERRIDES)
                if overrides is None:
                    overrides = [f"{key}={self.suggested(offered, key)}" for key in keys]
                    if (same := self.tried(overrides)) is not None:
                        complete = same.state == self.optuna.trial.TrialState.COMPLETE
                        self.study.tell(offered, same.value if complete else None, same.state)
                        continue
                    offered.set_user_attr(OVERRIDES, overrides)
                self.running[offered.number] = offered
                return numbered_trial(self.folder, offered.number, overrides)
        return None

    def next_offer(self) -> Any:
        """A trial of Optuna's: one that an earlier start has not finished, or a new one."""
        if self.unfinished:
            return self.unfinished.pop(0)
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
        """Optuna's trial that ended with the same values, if there is one."""
        ended = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.PRUNED)
        before = self.study.get_trials(states=ended, deepcopy=False)
        return next((t for t in before if t.user_attrs.get(OVERRIDES) == overrides), None)

    def suggested(self, offered: Any, key: str) -> str:
        """A value as it is typed."""
        values = self.space.swept[key]
        if isinstance(values, Choice):
            return offered.suggest_categorical(key, values.values)
        low, high = sorted((values.low, values.high))
        step = None if values.step is None else abs(values.step)
        if values.whole:
            return written(offered.suggest_int(key, low, high, step=step or 1, log=values.log))
        return written(offered.suggest_float(key, low, high, step=step, log=values.log))

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """See `Search`; the same share is reported once."""
        running = self.running[trial.number]
        with self.storage_errors(str(self.folder)):
            step = round(share * RESOURCE)
            known = self.study._storage.get_trial(running._trial_id).intermediate_values
            if step not in known:
                running.report(value, step)
            return running.should_prune()

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """Store the end of a trial; a stopped one is resumed another time."""
        states = self.optuna.trial.TrialState
        ended = self.running.pop(trial.number)
        with self.storage_errors(str(self.folder)):
            if state == FINISHED and value is not None:
                self.study.tell(ended, value)
            elif state == PRUNED:
                self.study.tell(ended, state=states.PRUNED)
            elif state in (FAILED, FINISHED):
                self.study.tell(ended, state=states.FAIL)

    def close(self) -> None:
        """Release the study for others."""
        with suppress(Exception):
            self.study._storage.remove_session()
        if self.lock is not None:
            self.lock.__exit__(None, None, None)

    @contextmanager
    def storage_errors(self, address: str) -> Iterator[None]:
        """Errors of the database become one line for the user.

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
    """Raise UserError for a file that is not SQLite's, or that another program writes to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=BUSY, isolation_level=None)) as base:
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
            f"{path} cannot be used as a study of Optuna's ({error}): name another file with "
            "sweep.search.storage=..."
        ) from error
