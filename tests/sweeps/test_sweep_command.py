"""`pretrain -m` as a person types it, with toys for trials."""

import json
import re
import sys
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
from commands import run
from sweeping import TOY, swept
from test_driver import folders, states

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.launchers import Ray, Submitit
from ssl_xcit.sweeps.tpe import Optuna
from ssl_xcit.utils.validation import Checker


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_xcit.commands.multirun.PROGRAM", (sys.executable, str(TOY)))


def test_a_grid_and_one_value_more(capsys):
    assert run("pretrain", "-m", "optim.lr=1,3", "epochs=2", "num_workers=0") == 0
    out = capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    assert folder.name == "photos_epochs-2_sweep_optim.lr"
    assert [p.name for p in folders(folder)] == ["optim.lr-1", "optim.lr-3"]
    assert "[2/2] optim.lr=3: finished; k-NN 20 100.0" in out
    assert f"next: ssl-xcit sweep {folder}" in out
    assert run("pretrain", "-m", "optim.lr=1,3,5", "epochs=2", "num_workers=1") == 0
    out = capsys.readouterr().out
    assert "[1/3] optim.lr=1: finished before; k-NN 20 80.0" in out
    assert "[3/3] optim.lr=5: started" in out
    assert list(Path("runs").iterdir()) == [folder]
    about = json.loads((folder / "sweep.json").read_text())
    assert (
        about["command"]
        == "ssl-xcit pretrain -m optim.lr=1,3,5 epochs=2 num_workers=1 experiment=photos"
    )
    assert about["fixed"] == ["epochs=2", "experiment=photos"]


def test_what_all_trials_get(monkeypatch):
    commands = []
    monkeypatch.setattr(
        "ssl_xcit.sweeps.launchers.Basic.submit",
        lambda self, job: commands.append(job.words) or Future(),
    )
    monkeypatch.setattr("ssl_xcit.sweeps.driver.Sweep.poll", lambda self: self.active.clear())
    Path("mine").mkdir()
    words = ["seed=0,1", "name=s", "logger=wandb", "sweep.metric=linear", "--config-dir", "mine"]
    assert run("pretrain", "-m", *words) == 0
    for number, job in enumerate(commands):
        assert job[2:] == (
            "pretrain", "--config-dir", "mine", "logger=wandb", "experiment=photos",
            f"seed={number}", "++logger.wandb.group='s'", "report=null", "out='runs/s'",
            f"name='seed-{number}'",
        )  # fmt: skip


def test_failures_end_with_1_and_are_told(capsys):
    words = ["pretrain", "-m", "optim.lr=1,2", "name=f", "+trainer.fail=1"]
    assert run(*words) == 1
    out = capsys.readouterr().out
    assert "optim.lr=1: failed; optim.lr=huge: a number below 10; see runs/f/optim.lr-1" in out
    assert "runs/f: 2 failed" in out
    assert "the same command starts them again" in out
    assert (
        run(
            "pretrain",
            "-m",
            "optim.lr=1,2",
            "name=f",
            "+trainer.fail=1",
            "sweep.retry_failed=false",
        )
        == 1
    )
    assert "leaves them as they are" in capsys.readouterr().out
    assert states(Path("runs/f")) == ["failed"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1,nothing"], "optim.lr=nothing must be a number above 0"),
        (["optim.lt=1,2"], "optim.lt: no such setting; did you mean optim.lr?"),
        (["model=xcit_small_12_p16,xcit_smal"], "no such option"),
        (["optim.lr=1,2", "launcher=dask"], "launcher=dask: no such option; there are basic"),
        (["sweep=optuna", "seed=1,2", "sweep.search.pruning.first=2"], "pruning.first=2"),
    ],
)
def test_errors_come_before_anything_starts(words, message, capsys):
    assert run("pretrain", "-m", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path(".").rglob("trial.json"))


def test_another_sweep_under_the_same_name(capsys):
    assert run("pretrain", "-m", "optim.lr=1,2", "name=s", "epochs=2") == 0
    assert run("pretrain", "-m", "optim.lr=1,2", "name=s", "epochs=3") == 2
    assert "(epochs=2; now epochs=3): take another name=..." in capsys.readouterr().err
    (Path("runs/r")).mkdir()
    (Path("runs/r/config.yaml")).write_text("")
    assert run("pretrain", "-m", "optim.lr=1,2", "name=r") == 2
    assert "runs/r is a run, not a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("searches.Halving", {"first": 0}, "first=0 must be a number of at least 0.001 and below"),
        ("searches.Halving", {"first": 1.5}, "first=1.5 must be a number"),
        ("searches.Halving", {"factor": 1}, "factor=1 must be a whole number of at least 2"),
        ("searches.Random", {"num_trials": 0}, "num_trials=0 must be a whole number"),
        ("searches.Random", {"seed": -1}, "seed=-1 must be a whole number"),
        ("tpe.Optuna", {"startup_trials": 0}, "startup_trials=0 must be a whole number"),
        ("launchers.Joblib", {"n_jobs": 0}, "n_jobs=0 must be a whole number of at least 1 or nu"),
        ("launchers.Joblib", {"gpus": "some"}, "gpus=some must be a list of whole numbers or auto"),
        ("launchers.Submitit", {"cluster": "moon"}, "cluster=moon must be slurm or local or null"),
        ("launchers.Ray", {"num_cpus": 0}, "num_cpus=0 must be a number above 0"),
    ],
)
def test_settings_out_of_range(target, settings, message):
    with pytest.raises(UserError, match=re.escape(f"sweep.{message}")):
        Checker({}).target({"_target_": f"ssl_xcit.sweeps.{target}", **settings}, "sweep")


@pytest.mark.parametrize("extra", ["ray", "submitit", "optuna"])
def test_a_library_that_is_not_installed(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(UserError, match=rf"pip install 'ssl-xcit\[{extra}\]'"):
        {"ray": Ray, "submitit": Submitit, "optuna": Optuna}[extra]()


def test_ray_gets_resources_and_jobs(tmp_path, monkeypatch):
    """Ray itself is not installed for the tests; a stand-in records its arguments."""
    arguments = {}

    def remote(**resources):
        arguments.update(resources)

        def make(function):
            def call(job):
                future = Future()
                future.set_result(function(job))
                return types.SimpleNamespace(future=lambda: future)

            return types.SimpleNamespace(remote=call)

        return make

    fake = types.SimpleNamespace(
        init=lambda **k: arguments.update(k),
        remote=remote,
        shutdown=lambda: arguments.update(down=True),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert swept(tmp_path, ("1", "2"), ["steps=1"], Ray(num_cpus=3, num_gpus=0.5))[0] == 0
    assert arguments == {
        "address": None, "log_to_driver": False, "ignore_reinit_error": True,
        "num_cpus": 3, "num_gpus": 0.5, "down": True,
    }  # fmt: skip
    assert states(tmp_path) == ["finished"] * 2
