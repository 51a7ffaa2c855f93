"""`pretrain -m` as a person types it, with toys for trials."""

import json
import sys
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
from commands import run
from sweeping import TOY
from test_driver import folders, states


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_xcit.sweeps.command.PROGRAM", (sys.executable, str(TOY)))


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
    assert about["command"] == "ssl-xcit pretrain -m optim.lr=1,3,5 epochs=2 num_workers=1"
    assert about["fixed"] == ["epochs=2"]


def test_what_all_trials_get(monkeypatch):
    given = []
    monkeypatch.setattr(
        "ssl_xcit.sweeps.launchers.Basic.submit",
        lambda self, job: given.append(job.words) or Future(),
    )
    monkeypatch.setattr("ssl_xcit.sweeps.driver.Sweep.look", lambda self: self.started.clear())
    Path("mine").mkdir()
    words = ["seed=0,1", "name=s", "logger=wandb", "sweep.metric=linear", "--config-dir", "mine"]
    assert run("pretrain", "-m", *words) == 0
    for number, job in enumerate(given):
        assert job[2:] == (
            "pretrain", "--config-dir", "mine", "logger=wandb", f"seed={number}",
            "++logger.wandb.group='s'", "report=null", "out='runs/s'", f"name='seed-{number}'",
        )  # fmt: skip


def test_failures_end_with_1_and_are_told(capsys):
    assert run("pretrain", "-m", "optim.lr=1,2", "name=f", "+fail=1") == 1
    out = capsys.readouterr().out
    assert "optim.lr=1: failed; optim.lr=huge: a number below 10; see runs/f/optim.lr-1" in out
    assert "runs/f: 2 failed" in out
    assert "the same command starts them again" in out
    assert (
        run("pretrain", "-m", "optim.lr=1,2", "name=f", "+fail=1", "sweep.retry_failed=false") == 1
    )
    assert "leaves them as they are" in capsys.readouterr().out
    assert states(Path("runs/f")) == ["failed"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1,nothing"], "optim.lr=nothing: a number above 0"),
        (["optim.lt=1,2"], "optim.lt: no such setting; did you mean optim.lr?"),
        (["model=xcit_small_12_p16,xcit_smal"], "no such option"),
        (["optim.lr=interval(0.1,1)"], "sweep=random or sweep=optuna"),
        (["optim.lr=1,2", "sweep=bayes"], "sweep=bayes: no such option"),
        (["optim.lr=1,2", "launcher=dask"], "launcher=dask: no such option; there are basic"),
        (["optim.lr=1,2", "hydra/launcher=joblib"], "launcher=basic, joblib, submitit or ray"),
        (["optim.lr=1,2", "launcher=joblib", "launcher.n_jobs=0"], "launcher.n_jobs=0"),
        (["optim.lr=1,2", "launcher=submitit"], "no SLURM here"),
        (["sweep=optuna"], "nothing to search"),
        (["sweep=random", "seed=1,2", "sweep.search.num_trials=0"], "num_trials=0"),
        (["sweep=optuna", "seed=1,2", "sweep.search.pruning.first=2"], "pruning.first=2"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(words, message, capsys):
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


@pytest.mark.parametrize("extra", ["ray", "submitit"])
def test_a_launcher_that_is_not_installed(extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, extra, None)
    assert run("pretrain", "-m", "optim.lr=1,2", f"launcher={extra}") == 2
    assert f"pip install 'ssl-xcit[{extra}]'" in capsys.readouterr().err


def test_ray_gets_resources_and_jobs(tmp_path, monkeypatch):
    """Ray itself is not installed for the tests; what it would be told is."""
    told = {}

    def remote(**resources):
        told.update(resources)

        def make(function):
            def call(job):
                future = Future()
                future.set_result(function(job))
                return types.SimpleNamespace(future=lambda: future)

            return types.SimpleNamespace(remote=call)

        return make

    fake = types.SimpleNamespace(
        init=lambda **k: told.update(k), remote=remote, shutdown=lambda: told.update(down=True)
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    words = ["launcher=ray", "launcher.num_cpus=3", "launcher.num_gpus=0.5"]
    assert run("pretrain", "-m", "optim.lr=1,2", "name=r", *words) == 0
    assert told == {
        "address": None, "log_to_driver": False, "ignore_reinit_error": True,
        "num_cpus": 3, "num_gpus": 0.5, "down": True,
    }  # fmt: skip
    assert states(Path("runs/r")) == ["finished"] * 2
