"""Optuna as a search, with toys for trials: pruning, resuming, a study that is in use."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from sweeping import swept
from test_driver import folders, states, steps, wait_for

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps import tpe
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.searches import Halving, Random
from ssl_xcit.sweeps.space import Choice, Interval, Space
from ssl_xcit.sweeps.tpe import Optuna

SPACE = Space((), {"lr": Interval(1, 16, step=1)})
SEARCH = """
import sys
from pathlib import Path
from sweeping import swept
from test_tpe import SPACE, Optuna
sys.exit(swept(Path(sys.argv[1]), more=["sleep=0.03"], search=Optuna(6), space=SPACE)[0])
"""


def count(folder):
    return sum(len(s) for s in steps(folder))


def best(folder):
    return max(trials.final_value(p, "knn_k20") or 0 for p in folders(folder))


def process(folder):
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


@pytest.mark.slow
def test_half_the_steps_of_the_grid_find_its_best(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.sweeps.driver.READ_EVERY", 0.05)
    more = ["sleep=0.12", "steps=16"]
    search = Optuna(20, pruning=Halving(0.125, 2), startup_trials=6)
    assert swept(tmp_path / "search", more=more, search=search, space=SPACE)[0] == 0
    assert "pruned" in states(tmp_path / "search")
    assert best(tmp_path / "search") == 100  # of the grid: lr 3
    assert count(tmp_path / "search") <= 16 * 16 / 2
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/search/optuna.db")
    assert study.best_value == 100
    assert {t.state.name for t in study.trials} == {"COMPLETE", "PRUNED"}


@pytest.mark.slow
def test_killed_and_started_again_it_searches_as_if_it_had_not_been(tmp_path):
    assert process(tmp_path / "whole").wait(60) == 0
    for wanted in (1, 3):
        sweep = process(tmp_path / "killed")
        wait_for(
            lambda n=wanted: (
                len(list((tmp_path / "killed").glob("*/summary.json"))) >= n
                and "running" in states(tmp_path / "killed")
            )
        )
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    assert process(tmp_path / "killed").wait(60) == 0
    names = [[p.name for p in folders(tmp_path / run)] for run in ("whole", "killed")]
    assert names[0] == names[1]
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
    assert process(tmp_path / "killed").wait(60) == 0  # nothing is left to do
    assert [p.name for p in folders(tmp_path / "killed")] == names[0]


def test_values_that_were_tried_are_not_tried_again(tmp_path):
    space = Space((), {"lr": Choice(("2", "3"))})
    code, _ = swept(tmp_path, search=Optuna(8, startup_trials=8), space=space)
    assert code == 0
    assert len(folders(tmp_path)) == 2
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/optuna.db")
    assert len(study.trials) == 8
    assert {t.value for t in study.trials} == {90.0, 100.0}


def test_a_failed_trial_is_tried_again_by_the_next_start_unless_told_otherwise(tmp_path):
    for retry, expected in ((True, 1), (True, 1), (False, 1)):
        code, _ = swept(tmp_path, more=["fail=1"], search=Optuna(2), space=SPACE, retry=retry)
        assert code == expected
        assert states(tmp_path) == ["failed"] * 2
    assert all(len(trials.read(p)["starts"]) == 2 for p in folders(tmp_path))


def test_random_search_goes_on_with_more_trials(tmp_path):
    for number in (2, 4):
        assert swept(tmp_path, more=["steps=1"], search=Random(number), space=SPACE)[0] == 0
        assert len(folders(tmp_path)) == number
    assert all(len(trials.read(p)["starts"]) == 1 for p in folders(tmp_path))


def opened(folder, space=SPACE, **settings):
    search = Optuna(3, **settings)
    try:
        search.start(space, folder)
    finally:
        search.close()


def test_a_study_in_use(tmp_path, monkeypatch):
    sweep = process(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*/steps.txt")))
    with pytest.raises(UserError, match=rf"optuna.db is in use by process {sweep.pid} on"):
        opened(tmp_path)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    time.sleep(0.1)
    opened(tmp_path)
    monkeypatch.setattr(tpe, "BUSY", 0.1)
    with sqlite3.connect(tmp_path / "optuna.db", isolation_level=None) as base:
        base.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"in use by another program.*sweep\.search\.storage"):
            opened(tmp_path)


def test_a_file_that_is_no_study_and_one_of_other_values(tmp_path):
    (tmp_path / "optuna.db").write_text("something else\n" * 100)
    with pytest.raises(UserError, match="cannot be used as a study"):
        opened(tmp_path)
    opened(tmp_path, storage=str(tmp_path / "mine.db"))
    with pytest.raises(UserError, match="searched with other values of lr"):
        opened(tmp_path, Space((), {"lr": Interval(1, 9, step=1)}), storage=f"{tmp_path}/mine.db")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Space((), {}), "nothing to search"),
        (Space((), {"lr": Choice(("1",))}), "lr=1 is one value"),
    ],
)
def test_nothing_to_search(space, message, tmp_path):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, space)
