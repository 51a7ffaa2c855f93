"""How long a run may take, in words and in steps."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch
from commands import SMALL, metrics, run

from ssl_xcit.commands.pretrain import BUDGET_INSTEAD
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoints_of
from ssl_xcit.training import budget
from ssl_xcit.training.budget import (
    LEFT_OUT,
    Speed,
    Stopwatch,
    online_seconds,
    parse_budget,
    steps_within,
)
from ssl_xcit.training.plan import check_one_device
from ssl_xcit.utils import hardware
from ssl_xcit.utils.hardware import seconds_since_start


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5d", 129_600), ("3 m", 180)]
)
def test_times_in_words(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "10", "m", "0m", "-5m", "10 minutes", "1h30m"])
def test_words_that_are_no_time(text):
    with pytest.raises(UserError, match=r"such as 90s, 10m, 2h"):
        parse_budget(text)


def test_steps_fill_what_start_evaluation_and_report_leave(monkeypatch):
    monkeypatch.setattr(budget, "seconds_since_start", lambda: 20.0)
    speed = Speed(0.5, 60.0, 10.0)
    steps = steps_within("10m", speed, {})
    assert 20.0 + 0.5 * steps + 60.0 + budget.REPORT == pytest.approx(0.99 * 600, abs=0.5)
    drawn = steps_within("10m", speed, {"snapshots": {"moments": 8}})
    assert drawn == steps - 8 * budget.PICTURE
    assert steps_within("10m", speed, {"online": {"every_steps": 400}}) == steps - 2 * 20
    assert steps_within("10m", speed, {"online": None, "snapshots": None}) == steps
    with pytest.raises(UserError, match=r"the start has taken 20 s.*give at least budget=\d+s"):
        steps_within("80s", speed, {})


@pytest.mark.parametrize(
    ("training", "one", "share", "seconds"),
    [
        (200.0, 10.0, 0.05, 0.0),  # no time for one
        (300.0, 10.0, 0.05, 10.0),
        (1200.0, 10.0, 0.05, 40.0),
        (1200.0, 100.0, 0.05, 100.0),  # the first is made at any cost
        (1200.0, 100.0, None, 300.0),
        (1200.0, 0.0, 0.05, 0.0),  # nothing to evaluate on
    ],
)
def test_what_online_evaluation_takes(training, one, share, seconds):
    online = {"every_steps": 500, "eval_budget": share}
    assert online_seconds(online, Speed(0.5, 60.0, one), training) == seconds
    assert online_seconds(None, Speed(0.5, 60.0, one), training) == 0.0


def test_the_first_steps_do_not_count(monkeypatch):
    """Steps of one second behind slow ones; the trial ends when its time is up."""
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    watch, trainer = Stopwatch(12.0), Mock(lightning.Trainer, should_stop=False)
    module = SimpleNamespace(output=SimpleNamespace(loss=torch.zeros(())))
    for number in range(100):
        now[0] += 5.0 if number < LEFT_OUT else 1.0
        watch.on_train_batch_end(trainer, module)
        if trainer.should_stop:
            break
    assert watch.step_seconds() == pytest.approx(1.0)
    assert len(watch.ends) >= LEFT_OUT + budget.FEWEST
    assert now[0] < 40.0


def test_one_device_only():
    check_one_device(1, "budget", BUDGET_INSTEAD)
    with pytest.raises(UserError, match="give epochs or max_steps"):
        check_one_device(2, "budget", BUDGET_INSTEAD)


def test_seconds_since_the_process_or_the_clock_began(monkeypatch):
    monkeypatch.setattr(hardware, "clock", {})
    listed = subprocess.run(
        ["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    assert seconds_since_start() == pytest.approx(float(listed.stdout), abs=2.0)
    hardware.start_clock()
    assert seconds_since_start() < 1.0


@pytest.mark.slow
def test_a_run_ends_when_its_budget_does(tmp_path):
    """Whole commands, one killed on the way: what was decided stays, and baselines too."""
    words = [word for word in SMALL if not word.startswith(("epochs=", "callbacks.checkpoints"))]
    command = [
        sys.executable, "-m", "ssl_xcit", "pretrain", *words, "budget=75s",
        "callbacks.checkpoints.every_steps=5", "callbacks.checkpoints.keep_last=10000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([*command, "name=whole"], cwd=tmp_path, env=environment, check=True)
    # another suite takes and gives back cores meanwhile; alone a run of 3m took 178 s
    assert 0.5 * 75 < time.monotonic() - began < 2.0 * 75
    summary = json.loads((tmp_path / "runs/whole/summary.json").read_text())
    assert set(summary["results"]) > {"random weights", "pretrained"}
    assert json.loads((tmp_path / "runs/whole/baselines.json").read_text())["results"].items() <= (
        summary["results"].items()
    )
    # the same run from its first checkpoint: what was decided of its length is decided
    again = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/again")
    (again / "summary.json").unlink()
    _, *later = sorted(again.glob("checkpoints/step-*.ckpt"))
    last = torch.load(later[-1], weights_only=True)["state_dict"]
    for file in later:
        file.unlink()
    subprocess.run([*command, "name=again"], cwd=tmp_path, env=environment, check=True)
    assert checkpoints_of(again)[-1] == later[-1]
    ends = torch.load(later[-1], weights_only=True)["state_dict"]
    assert all(torch.equal(ends[name], last[name]) for name in last)
    folder = tmp_path / "runs/killed"
    with subprocess.Popen([*command, "name=killed"], cwd=tmp_path, env=environment) as run:
        while not list(folder.glob("checkpoints/step-000005.ckpt")):
            assert run.poll() is None
            time.sleep(0.1)
        run.kill()
    decided = json.loads((folder / "pace.json").read_text())["revisions"]
    subprocess.run([*command, "name=killed"], cwd=tmp_path, env=environment, check=True)
    revisions = json.loads((folder / "pace.json").read_text())["revisions"]
    assert revisions[: len(decided)] == decided
    plan = json.loads((folder / "summary.json").read_text())["plan"]
    assert plan["total_steps"] == revisions[-1][2]


def test_max_steps_instead_of_epochs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in SMALL if not word.startswith("epochs=")]
    assert run("pretrain", "name=few", "max_steps=3", "eval_data=none", *words) == 0
    plan = json.loads(Path("runs/few/summary.json").read_text())["plan"]
    assert plan["total_steps"] == 3
    assert metrics("runs/few")[-1]["step"] == "3"
