"""Optuna's study as the search, with toys for trials: samplers, pruning, storage."""

import sqlite3
from dataclasses import replace

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeping import GRID, INTEGERS, TPE, WHOLE, folders, states, steps, swept

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.search import Search
from ssl_xcit.sweeps.space import Space

RANDOM = {"_target_": "optuna.samplers.RandomSampler"}
HALVING = {
    "_target_": "optuna.pruners.SuccessiveHalvingPruner",
    "min_resource": 12,
    "reduction_factor": 2,
}


def study_of(path):
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))


@pytest.mark.slow
def test_half_the_steps_of_the_grid_find_its_best(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.sweeps.driver.READ_EVERY", 0.05)
    search = {"sampler": TPE, "num_trials": 20, "pruner": HALVING, "space": INTEGERS}
    assert swept(tmp_path, more=["sleep=0.12", "steps=16"], **search) == 0
    assert "pruned" in states(tmp_path)
    assert max(trials.final_value(p, "knn_k20") for p in folders(tmp_path)) == 100
    assert sum(map(len, steps(tmp_path))) <= 16 * 16 / 2
    study = study_of(tmp_path / "study.log")
    assert study.best_value == 100
    assert {t.state.name for t in study.trials} == {"COMPLETE", "PRUNED"}


def test_values_that_were_tried_are_not_tried_again(tmp_path):
    assert swept(tmp_path, ("2", "3"), sampler=RANDOM, num_trials=8) == 0
    assert steps(tmp_path) == [WHOLE] * 2
    study = study_of(tmp_path / "study.log")
    assert len(study.trials) == 8
    assert {t.value for t in study.trials} == {90.0, 100.0}


@pytest.mark.parametrize("sampler", [RANDOM, TPE | {"n_startup_trials": 1}, None])
def test_what_is_stored_is_what_is_trained(sampler, tmp_path):
    """Close values have folders of their own, also after the sweep is started again."""
    step = None if sampler else 1e-6
    space = Space((), {"ema": FloatDistribution(0.99999, 0.999995, step=step)}, ("ema",))
    settings = replace(GRID, sampler=sampler, num_trials=6 if sampler else 0)
    taken = []
    for _ in range(2):
        search = Search(settings, space, tmp_path)
        while trial := search.next_trial():
            trial.folder.mkdir(exist_ok=True)
            trials.note(trial, "finished")
            search.tell(trial, "finished", 1.0)
            taken.append(trial)
    stored = [trial.params["ema"] for trial in search.study.get_trials()]
    assert [float(trial.overrides[0].removeprefix("ema=")) for trial in taken] == stored
    assert len(set(stored)) == len({trial.folder for trial in taken}) == 6


def test_a_study_with_longer_numbers_goes_on_in_its_folders(tmp_path):
    space = Space((), {"lr": FloatDistribution(1e-4, 1e-2, log=True)}, ("lr",))
    search = Search(replace(GRID, sampler=RANDOM, num_trials=1), space, tmp_path)
    search.study.add_trial(
        optuna.create_trial(params={"lr": 0.00123456789}, distributions=space.swept, value=1.0)
    )
    (tmp_path / "lr-0.001235").mkdir()
    (tmp_path / "lr-0.001235/summary.json").write_text("{}")
    search = Search(search.settings, space, tmp_path)
    assert [trial.folder.name for trial, _ in search.ended_before] == ["lr-0.001235"]


def test_any_seed_draws_and_lower_ones_draw_what_they_did(tmp_path):
    def draws(seed):
        search = Search(replace(GRID, sampler=RANDOM, seed=seed), INTEGERS, tmp_path)
        return search.sampler(1).sample_independent(None, None, "lr", INTEGERS.swept["lr"])

    for seed in (0, 4294):
        sampler = optuna.samplers.RandomSampler(seed * 1_000_003 + 1)
        expected = sampler.sample_independent(None, None, "lr", INTEGERS.swept["lr"])
        assert draws(seed) == expected
    assert len({draws(seed) for seed in (*range(4295, 4305), 10**12)}) > 1


def test_more_trials_go_on_and_half_a_line_of_the_journal_is_cut_off(tmp_path):
    journal = tmp_path / "mine.log"
    for number in (2, 4):
        search = {"sampler": RANDOM, "num_trials": number, "storage": str(journal)}
        assert swept(tmp_path, more=["steps=1"], space=INTEGERS, **search) == 0
        assert len(study_of(journal).trials) == number
        with journal.open("a") as file:
            file.write('{"op_code":4,"wor')
    assert all(taken == ["1"] for taken in steps(tmp_path))


def test_a_study_that_cannot_be_opened(tmp_path):
    (tmp_path / "notes").write_text("something else\n" * 100)
    address = f"sqlite:///{tmp_path}/optuna.db"
    assert swept(tmp_path, ("1",), storage=address) == 0
    with sqlite3.connect(tmp_path / "optuna.db", isolation_level=None) as base:
        base.execute("BEGIN EXCLUSIVE")
        for storage, reason in (
            (address, "database is locked"),
            (f"{tmp_path}/notes", "Expecting value"),
            ("moon:///x", "moon"),
            ("/proc/x/study.log", "No such file"),
        ):
            with pytest.raises(UserError, match=rf"{reason}.*: name another with sweep.storage="):
                swept(tmp_path, ("1",), storage=storage)
    assert (tmp_path / "notes").read_text() == "something else\n" * 100
