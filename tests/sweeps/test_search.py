"""Optuna's study as the search, with toys for trials: samplers, pruning, storage."""

import sqlite3

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeping import INTEGERS, TPE, WHOLE, folders, states, steps, swept

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps import trial as trials

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
