"""The loop of a sweep, with toys for trials: what is skipped, resumed, marked, waited for."""

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import held_by_another
from sweeping import INTEGERS, TPE, WHOLE, folders, process, states, steps, swept, wait_for

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.job import IN_USE, PARENT
from ssl_xcit.sweeps.launchers import local, ray_cluster, slurm
from ssl_xcit.utils.locks import InUse, lock_holder

SIX = ["1", "2", "3", "4", "5", "6"]


def test_all_trials_and_a_rerun_does_nothing(tmp_path, capsys):
    assert swept(tmp_path) == 0
    out = capsys.readouterr().out
    assert "[1/3] lr=1: finished; k-NN 20 80.0\n" in out
    assert "[3/3] lr=3: finished; k-NN 20 100.0\n" in out
    content = json.loads((tmp_path / "lr-2/trial.json").read_text())
    assert (content["overrides"], content["number"]) == (["lr=2"], 1)
    assert (content["state"], content["exit_code"]) == ("finished", 0)
    assert [start["seconds"] >= 0 for start in content["starts"]] == [True]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*")}
    assert swept(tmp_path) == 0
    assert "[1/3] lr=1: finished before; k-NN 20 80.0\n" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*")}
    shutil.rmtree(tmp_path / "lr-2")  # a folder that is gone is run again
    assert swept(tmp_path, ("1", "2", "3", "4")) == 0  # one more value: one more trial
    assert len(folders(tmp_path)) == 4
    assert steps(tmp_path) == [WHOLE] * 4


@pytest.mark.parametrize(
    "search", [{"values": ("1", "2")}, {"sampler": TPE, "num_trials": 2, "space": INTEGERS}]
)
def test_a_failed_trial_is_marked_and_tried_again_when_asked(search, tmp_path, capsys):
    for fail, error in (("1", "optim.lr=huge: a number below 10"), ("9", "killed by SIGKILL: out")):
        assert swept(tmp_path, more=[f"fail={fail}"], **search) == 1
        assert capsys.readouterr().out.count(f": failed; {error}") == 2
        assert all(trials.read(p)["error"].startswith(error) for p in folders(tmp_path))
    assert swept(tmp_path, retry_failed=False, **search) == 1
    assert states(tmp_path) == ["failed"] * 2
    assert swept(tmp_path, **search) == 0  # nothing is in the way any more
    assert states(tmp_path) == ["finished"] * 2
    assert [len(trials.read(p)["starts"]) for p in folders(tmp_path)] == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("victim", ["driver", "group"])
def test_killed_twice_no_step_is_taken_twice(tmp_path, jobs, victim):
    """SIGKILL of the sweep alone, or of its group; the third start ends with six results."""
    kill_twice(tmp_path, os.kill if victim == "driver" else os.killpg, values=SIX, jobs=jobs)
    assert states(tmp_path) == ["finished"] * 6
    assert steps(tmp_path) == [WHOLE] * 6


@pytest.mark.slow
def test_killed_twice_it_searches_as_if_it_had_not_been(tmp_path):
    search = {"sampler": TPE, "num_trials": 8}
    assert process(tmp_path / "whole", **search).wait(60) == 0
    kill_twice(tmp_path / "killed", os.killpg, **search)
    names = [[p.name for p in folders(tmp_path / run)] for run in ("whole", "killed")]
    assert names[0] == names[1]
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")


def kill_twice(folder, kill, **arguments):
    """Kill a sweep after one result, and after three; the third start runs to its end."""
    for wanted in (1, 3):
        sweep = process(folder, more=["sleep=0.05"], **arguments)
        wait_for(lambda n=wanted: len(list(folder.glob("*/summary.json"))) >= n)
        wait_for(lambda: "running" in states(folder))
        kill(sweep.pid, signal.SIGKILL)
        sweep.wait(20)
        assert len(list(folder.glob("*/summary.json"))) < 6
    assert process(folder, more=["sleep=0.05"], **arguments).wait(60) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_asked_to_stop_every_trial_saves(tmp_path, number, code):
    sweep = process(tmp_path, jobs=2, more=["sleep=0.3"])
    wait_for(lambda: len(list(tmp_path.glob("*/steps.txt"))) == 2)
    sweep.send_signal(number)
    assert sweep.wait(20) == code
    assert states(tmp_path) == ["stopped", "stopped"]
    assert [trials.read(p)["exit_code"] for p in folders(tmp_path)] == [code, code]
    assert process(tmp_path, jobs=2).wait(60) == 0
    assert steps(tmp_path) == [WHOLE] * 3


def test_two_sweeps_at_once_share_the_trials(tmp_path):
    sweeps = [process(tmp_path, values=SIX, more=["sleep=0.1"]) for _ in range(2)]
    assert [sweep.wait(60) for sweep in sweeps] == [0, 0]
    assert steps(tmp_path) == [WHOLE] * 6


@pytest.mark.parametrize("seen", [True, False])
def test_another_sweeps_trial_is_waited_for(seen, tmp_path, capsys, monkeypatch):
    """Also where its lock is taken between a look and the start of a trial."""
    looks = []

    def look(folder):
        looks.append(lock_holder(folder) if seen else "")
        return looks[-1]

    monkeypatch.setattr("ssl_xcit.sweeps.driver.lock_holder", look)
    folder, summary = tmp_path / "lr-2", {"results": {"p": {"knn_k20": 7.0}}}

    def finish(holder):
        output = folder / "output.txt"
        wait_for(lambda: any(looks) or (output.exists() and "in use by" in output.read_text()))
        (folder / "summary.json").write_text(json.dumps(summary))
        os.kill(holder, signal.SIGKILL)

    with held_by_another(folder / ".lock") as holder:
        threading.Thread(target=finish, args=[holder]).start()
        assert swept(tmp_path) == 0
    out = capsys.readouterr().out
    assert (f"lr=2: waiting for process {holder} on" in out) == seen
    assert "lr=2: finished" in out
    if seen:
        assert "k-NN 20 7.0" in out
        assert not (folder / "steps.txt").exists()


def test_a_trial_says_by_its_exit_code_that_its_folder_is_in_use(monkeypatch):
    def fail():
        try:
            raise InUse("x")
        except InUse:
            raise SystemExit(2)  # noqa: B904

    monkeypatch.setattr("ssl_xcit.cli.main", fail)
    monkeypatch.setattr("ssl_xcit.sweeps.job.end_with", lambda *_: None)
    for parent, code in (("1", IN_USE), ("", 2)):
        monkeypatch.setenv(PARENT, parent)
        with pytest.raises(SystemExit) as ending:
            runpy.run_module("ssl_xcit", run_name="__main__")
        assert ending.value.code == code


def test_trials_on_one_machine_share_its_gpus_and_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ssl_xcit.sweeps.launchers.usable_cores", lambda: 8)
    launcher = local(None, None, [0, 1, 2, 3], 2)
    assert (launcher.slots, launcher.overrides) == (2, ["num_workers=3"])
    started = time.monotonic()
    assert swept(tmp_path, ("1", "2", "3", "4"), ["rest=0.5"], launcher) == 0
    assert time.monotonic() - started < 20
    summaries = [json.loads((p / "summary.json").read_text()) for p in folders(tmp_path)]
    assert {s["visible"] for s in summaries} == {"0,1", "2,3"}
    threads = {"OMP_NUM_THREADS": "4"}
    assert {s["threads"] for s in summaries} == {"4"}
    with pytest.raises(UserError, match=r"set launcher\.n_jobs=1"):
        local(None, 3, [0, 1], 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert local(n_jobs=None).environment(1) == {"CUDA_VISIBLE_DEVICES": "7", **threads}
    assert local().environment(0) == {}  # one trial has the whole machine


def test_submitit_without_slurm(tmp_path):
    """A local executor really runs the trials, in processes of its own."""
    launcher = slurm(tmp_path, "local", 2, {"timeout_min": 5, "cpus_per_task": None})
    assert swept(tmp_path, ("1", "2"), ["steps=2"], launcher) == 0
    assert steps(tmp_path) == [["1", "2"]] * 2
    assert list((tmp_path / ".submitit").glob("*_result.pkl"))
    for cluster, parameters, message in (
        (None, {}, "no SLURM here"), ("local", {"timeout": 5}, "timeout"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            slurm(tmp_path, cluster, 1, parameters)


def test_ray_gets_resources_and_jobs(tmp_path, monkeypatch):
    """Ray itself is not installed for the tests; a stand-in records its arguments."""
    arguments, pool = {}, ThreadPoolExecutor(2)

    def remote(**resources):
        arguments.update(resources)

        def submit(function, job):
            running = pool.submit(function, job)
            return types.SimpleNamespace(future=lambda: running)

        return lambda function: types.SimpleNamespace(remote=lambda job: submit(function, job))

    ray = types.SimpleNamespace(
        init=arguments.update, remote=remote, shutdown=lambda: arguments.update(down=True)
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert swept(tmp_path, ("1", "2"), ["steps=1"], ray_cluster(num_cpus=3, num_gpus=0.5)) == 0
    assert arguments == {
        "address": None, "log_to_driver": False, "ignore_reinit_error": True,
        "num_cpus": 3, "num_gpus": 0.5, "down": True,
    }  # fmt: skip
    assert states(tmp_path) == ["finished"] * 2
