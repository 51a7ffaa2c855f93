"""`pretrain -m` as a person types it, with toys for trials."""

import json
import sys
from pathlib import Path

import pytest
from commands import run
from sweeping import TOY, folders


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
    assert "optim.lr=5: started" in out
    assert list(Path("runs").iterdir()) == [folder]
    about = json.loads((folder / "sweep.json").read_text())
    words = "optim.lr=1,3,5 epochs=2 num_workers=1 experiment=photos"
    assert about["command"] == f"ssl-xcit pretrain -m {words}"
    assert about["fixed"] == ["epochs=2", "experiment=photos"]


def test_what_all_trials_get(monkeypatch):
    commands = []
    monkeypatch.setattr(
        "ssl_xcit.sweeps.job.Job.__call__", lambda job: commands.append(job.words) or 75
    )
    Path("mine").mkdir()
    words = ["seed=0,1", "name=s", "logger=wandb", "sweep.metric=linear", "--config-dir", "mine"]
    assert run("pretrain", "-m", *words) == 75
    for number, job in enumerate(commands):
        assert job[2:] == (
            "pretrain", "--config-dir", "mine", "logger=wandb", "experiment=photos",
            f"seed={number}", "++logger.wandb.group='s'", "report=null", "out='runs/s'",
            f"name='seed-{number}'",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["num_workers=3"] * 2),
        (["num_workers=1"], ["num_workers=1"] * 2),
        (["num_workers=0,2"], ["num_workers=0", "num_workers=2"] * 2),
    ],
)
def test_workers_that_are_typed_replace_the_launchers(words, expected, monkeypatch):
    commands = []
    monkeypatch.setattr("ssl_xcit.sweeps.launchers.usable_cores", lambda: 8)
    monkeypatch.setattr("ssl_xcit.sweeps.launchers.visible_gpus", list)
    monkeypatch.setattr(
        "ssl_xcit.sweeps.job.Job.__call__", lambda job: commands.append(job.words) or 1
    )
    assert run("pretrain", "-m", "seed=0,1", *words, "launcher.n_jobs=2") == 1
    given = [word for words in commands for word in words if word.startswith("num_workers=")]
    assert sorted(given) == sorted(expected)


def test_failures_end_with_1_and_are_told(capsys):
    words = ["pretrain", "-m", "optim.lr=1,2", "name=f", "+trainer.fail=1"]
    assert run(*words) == 1
    out = capsys.readouterr().out
    assert "optim.lr=1: failed; optim.lr=huge: a number below 10; see runs/f/optim.lr-1" in out
    assert "runs/f: 2 failed" in out
    assert "the same command starts them again" in out
    assert run(*words, "sweep.retry_failed=false") == 1
    assert "leaves them as they are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1,nothing"], "optim.lr=nothing must be a number above 0"),
        (["optim.lt=1,2"], "optim.lt: no such setting; did you mean optim.lr?"),
        (["model=xcit_small_12_p16,xcit_smal"], "no such option"),
        (["optim.lr=1,2", "launcher=dask"], "launcher=dask: no such option; there are local"),
        (["seed=1,2", "launcher.n_jobs=0"], "launcher.n_jobs=0 must be a whole number of at least"),
        (["seed=1,2", "sweep.num_trials=-1"], "sweep.num_trials=-1 must be a whole number"),
        (["seed=1,2", "launcher.gpus=some"], "gpus=some must be a list of whole numbers or auto"),
        (["launcher=submitit", "launcher.cluster=moon"], "moon must be slurm or local or null"),
        (["launcher=ray", "launcher.num_cpus=0"], "launcher.num_cpus=0 must be a number above 0"),
        (["launcher=submitit"], "launcher=submitit needs submitit: pip install 'ssl-xcit[submit"),
        (["launcher=ray"], "launcher=ray needs ray: pip install 'ssl-xcit[ray]'"),
        (["sweep=random"], "there is nothing to search: name values, such as optim.lr=1e-4,5e-4"),
        (["sweep=optuna", "seed=1,2", "sweep.pruner.min_resource=0"], "`min_resource >= 1`"),
        (["sweep=optuna", "seed=1,2", "+sweep.sampler.sed=0"], "argument 'sed'"),
    ],
)
def test_errors_come_before_anything_starts(words, message, capsys, monkeypatch):
    for library in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, library, None)
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
