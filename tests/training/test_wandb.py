"""Runs that are recorded by wandb, against a server that stands in for its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL
from wandb_server import wandb_server

from ssl_xcit.training.wandb_run import panel_of, without_paths

ONLINE = ["logger=wandb", "logger.wandb.offline=false", "logger.wandb.log_model=true"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        for kind in ("DATA", "CACHE", "CONFIG"):
            monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
        yield server


def finished(*words):
    """What a command writes to stderr, which ends well."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def pretrain(*words):
    """With its report."""
    small = [word for word in SMALL if word != "report=null"]
    return finished(sys.executable, "-m", "ssl_xcit", "pretrain", *small, *words)


@pytest.mark.slow
def test_a_run_its_numbers_and_what_it_leaves(server):
    words = [*ONLINE, "name=a_seed-3", "seed=3"]
    assert "WARNING: logger" not in pretrain(*words)
    ((key, run),) = server.runs.items()
    assert (run["displayName"], run["groupName"]) == ("a_seed-3", "a")
    assert run["tags"] == ["pretrain", "photos", "xcit_micro_4_p8", "dino"]
    assert json.loads(run["config"])["optim"]["value"]["lr"] == 2.5e-3
    first, *_, last = server.history[key]
    assert {"loss", "epoch", "schedule/lr", "health/rankme", "speed/data_wait"} <= first.keys()
    assert last["trainer/global_step"] == 9
    assert any("knn_k20" in line for line in server.history[key])
    results = json.loads(Path("runs/a_seed-3/summary.json").read_text())["results"]
    for row, numbers in results.items():
        for metric, value in numbers.items():
            assert server.summary[key][f"{row}/{metric}"] == pytest.approx(value)
    about = {name: (a["type"], a["committed"]) for name, a in server.artifacts.items()}
    assert about == {f"report-{key}": ("report", True), f"model-{key}": ("model", True)}
    page = Path("runs/a_seed-3/report.html").read_bytes()
    assert server.files[f"report-{key}/report.html"] == page
    newest = Path("runs/a_seed-3/checkpoints/step-000009.ckpt").read_bytes()
    assert server.files[f"model-{key}/step-000009.ckpt"] == newest
    assert server.ended == {key: 0}

    # stopped at step 6, it goes on as the same run
    Path("runs/a_seed-3/summary.json").unlink()
    Path("runs/a_seed-3/checkpoints/step-000009.ckpt").unlink()
    before = len(server.history[key])
    assert "WARNING: logger" not in pretrain(*words)
    assert list(server.runs) == [key]
    after = server.history[key]
    assert [line["_step"] for line in after] == list(range(len(after)))
    assert {line["trainer/global_step"] for line in after[before:]} == {8, 9}


@pytest.mark.slow
def test_trials_of_its_own_agent(server, monkeypatch):
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    server.sweep = {
        "program": "ssl-xcit", "method": "grid",
        "command": ["ssl-xcit", "pretrain", "logger=wandb", "${args_no_hyphens}", *SMALL],
    }  # fmt: skip
    rates = {"first": 1e-3, "second": 2e-3}
    server.commands = [
        {"type": "run", "run_id": key, "program": "", "args": {"optim.lr": {"value": rate}}}
        for key, rate in rates.items()
    ]
    finished(here / "wandb", "agent", "me/ssl_xcit/s")
    assert {key: run["sweep"] for key, run in server.runs.items()} == dict.fromkeys(rates, "s")
    assert server.ended == dict.fromkeys(rates, 0)
    for key, rate in rates.items():
        assert json.loads(server.runs[key]["config"])["optim"]["value"]["lr"] == rate
        assert 0 < server.summary[key]["pretrained/knn_k20"] <= 100


def test_panels():
    names = {"loss": "", "loss_koleo": "", "knn_k20": "", "accuracy": "", "lr": "schedule/",
             "grad_norm_stem": "gradients/", "prototypes_used": "health/",
             "online_seconds": "speed/"}  # fmt: skip
    assert {name: panel_of(name) for name in names} == names


def test_paths_stay_here():
    given = {"data": {"root": ["/home/me/photos", "rel/x"]}, "n": 3, "file": "/a/b.txt"}
    assert without_paths(given) == {
        "data": {"root": ["photos", "rel/x"]}, "n": 3, "file": "b.txt",
    }  # fmt: skip
