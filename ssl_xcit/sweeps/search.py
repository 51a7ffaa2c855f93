"""The search of a sweep: an Optuna study, which says what to try next and takes the results.

Trials do not import Optuna. The values that are drawn are a function of the seed, of how many were
drawn before and of their results, so a sweep that was stopped draws nothing twice.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.space import Space, overrides_of, rounded
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, Trial, state_of
from ssl_xcit.training.run_name import folder_name
from ssl_xcit.training.settings import SearchSettings
from ssl_xcit.utils.locks import exclusive, lock_holder

WHOLE = 100  # steps of a whole run, for pruners
QUEUED = "queued"  # attribute of Optuna's trials whose values were not drawn
ENDED = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


class Search:
    """The study of one space; see the module docstring.

    Several processes may use it at once. Other values are another study in the same storage, for
    Optuna fixes the choices of a parameter; results that both have come from the run folders.

    Args:
        settings: of the sweep.
        space: of the trials.
        folder: of the sweep.

    Raises:
        UserError: this space cannot be searched, or the study not be opened.
    """

    def __init__(self, settings: SearchSettings, space: Space, folder: Path):
        if settings.sampler and not space.swept:
            raise UserError(
                "there is nothing to search: name values, such as optim.lr=1e-4,5e-4 or "
                "'optim.lr=tag(log,interval(1e-4,1e-2))'"
            )
        self.settings, self.space, self.folder = settings, space, folder
        self.storage = str(settings.storage or folder / "study.log")
        self.taken: dict[int, optuna.Trial] = {}  # by this process
        self.turn = Lock()
        grid = [] if settings.sampler else list(space.grid())
        self.total = len(grid) or settings.num_trials
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", ".*(experimental feature|reported value is ignored)")
        try:
            self.sampler(0)
            pruner = instantiate(settings.pruner) or optuna.pruners.NopPruner()
        except InstantiationException as error:
            raise UserError(f"sweep: {str(error.__cause__ or error).splitlines()[0]}") from error
        direction: Literal["maximize", "minimize"]
        direction = "maximize" if settings.maximize else "minimize"
        with self.storage_alone():
            self.study = optuna.create_study(
                storage=opened(self.storage),
                study_name=folder_name([direction, settings.metric, *space.words], folder.name),
                direction=direction,
                load_if_exists=True,
                pruner=pruner,
            )
            known = self.by_overrides()
            for values in grid:  # Optuna's skip_if_exists takes 0.99999 for 0.999995
                if self.overrides(values) not in known:
                    self.study.enqueue_trial(values, {QUEUED: True})
            self.ended_before = list(self.queue_again())

    def sampler(self, number: int) -> Any:
        """Optuna's sampler of the draw with this number, which rounds; a grid draws nothing."""
        settings = self.settings.sampler or {"_target_": "optuna.samplers.RandomSampler"}
        seed = (self.settings.seed * 1_000_003 + number) % 2**32  # NumPy takes no higher one
        sampler = instantiate(settings, seed=seed)
        jointly, singly = sampler.sample_relative, sampler.sample_independent
        sampler.sample_relative = lambda study, trial, space: {
            key: rounded(value, space[key]) for key, value in jointly(study, trial, space).items()
        }
        sampler.sample_independent = lambda study, trial, key, values: rounded(
            singly(study, trial, key, values), values
        )
        return sampler

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other sweep takes or notes a trial meanwhile."""
        with self.turn, exclusive(self.folder / ".study.lock", str(self.folder), wait=True):
            yield

    @contextmanager
    def storage_alone(self) -> Iterator[None]:
        """The same for the study, whose errors become one line.

        Raises:
            UserError: it cannot be used.
        """
        with self.alone():
            try:
                yield
            except Exception as error:  # of json, sqlite, SQLAlchemy and a dozen drivers
                cause = error.__cause__ or error
                reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
                raise UserError(
                    f"{self.storage} cannot be used as a study of Optuna's ({reason}): name "
                    "another with sweep.storage=..."
                ) from error

    def queue_again(self) -> Iterator[tuple[Trial, str]]:
        """Yield trials that ended, with their states; queue those again that failed, or whose
        folder is gone.
        """
        for trial in self.by_overrides().values():
            if trial.state.is_finished():
                ours = self.described(trial)
                if state := self.outcome(ours):
                    yield ours, state
                else:
                    self.study.enqueue_trial(trial.params, {QUEUED: True})

    def by_overrides(self) -> dict[tuple[str, ...], Any]:
        """Return the last of Optuna's trials of each combination of values."""
        last = {}
        for trial in self.study.get_trials(deepcopy=False):
            values = trial.system_attrs.get("fixed_params", trial.params)
            if values.keys() == self.space.swept.keys():
                last[self.overrides(values)] = trial
        return last

    def overrides(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return values as they are typed; older studies have numbers that were not rounded."""
        swept = self.space.swept.items()
        return tuple(overrides_of({key: rounded(values[key], kind) for key, kind in swept}))

    def described(self, trial: Any) -> Trial:
        """A trial of Optuna's as one of ours."""
        overrides = self.overrides(trial.params)
        return Trial(trial.number, overrides, self.folder / (folder_name(overrides) or "0"))

    def outcome(self, trial: Trial) -> str:
        """How a trial has ended, by its folder; empty where it is to be run."""
        state = state_of(trial.folder)
        kept = state in (FINISHED, PRUNED) or (state == FAILED and not self.settings.retry_failed)
        return state if kept else ""

    def next_trial(self) -> Trial | None:
        """The next trial: those that a killed sweep has left, then those that are queued or drawn,
        then those that another sweep runs. None: all have ended.
        """
        with self.storage_alone():
            trials = self.study.get_trials(deepcopy=False)
            drawn = [trial.number for trial in trials if QUEUED not in trial.user_attrs]
            others = [
                trial
                for trial in trials
                if trial.state == TrialState.RUNNING and trial.number not in self.taken
            ]
            left = [
                trial
                for trial in others
                if trial.params.keys() != self.space.swept.keys()
                or not lock_holder(self.described(trial).folder)
            ]
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not left and (waiting or len(drawn) < self.settings.num_trials):
                self.study.sampler = self.sampler(len(drawn))
                trial = self.study.ask(self.space.swept)
            elif others:
                trial = optuna.Trial(self.study, (left or others)[0]._trial_id)
                self.study.sampler = self.sampler(sum(n < trial.number for n in drawn))
                for key, values in self.space.swept.items():
                    trial._suggest(key, values)  # it may have been killed before it had them all
            else:
                return None
            self.taken[trial.number] = trial
            return self.described(trial)

    def wants_stop(self, trial: Trial, share: float, value: float) -> bool:
        """Whether a trial may end here, by the metric at this share of the run."""
        with self.storage_alone():
            if self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                return False  # another sweep was faster
            self.taken[trial.number].report(value, int(share * WHOLE))
            return self.taken[trial.number].should_prune()

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """Store the end of a trial; one that was stopped, and is told nothing of, is resumed."""
        if state == FINISHED and value is None:
            state = FAILED  # for Optuna, which ranks by values
        value = value if state == FINISHED else None
        with self.storage_alone():
            self.study.tell(trial.number, value, ENDED[state], skip_if_finished=True)


def opened(address: str) -> str | BaseStorage:
    """A database by its address, or Optuna's journal in a file, which needs no database."""
    if "://" in address:
        return address
    path = str(Path(address).expanduser().resolve())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(path, grace_period=3)  # a killed sweep leaves it
    backend = JournalFileBackend(path, lock)
    lock.acquire()
    try:
        content = Path(path).read_bytes()
        if content.startswith(b'{"op_code"') and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)  # Optuna refuses what follows half a line
    finally:
        lock.release()
    return JournalStorage(backend)
