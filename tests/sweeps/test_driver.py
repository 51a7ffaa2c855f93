"""The loop of a sweep, with toys for trials: what is skipped, resumed, marked, waited for."""

import json
import os
import runpy
import signal
import sys
import threading
import time

import pytest
from commands import held_by_another
from sweeping import process, swept, toy_words

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.driver import Sweep
from ssl_xcit.sweeps.job import IN_USE, PARENT, Job
from ssl_xcit.sweeps.launchers import Basic, Joblib, Local, Submitit
from ssl_xcit.sweeps.searches import Grid
from ssl_xcit.sweeps.space import Choice, Space
from ssl_xcit.utils.locks import InUse


def folders(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def states(folder):
    return [trials.state_of(p) for p in folders(folder)]


def steps(folder):
    """Every step that any start of a trial has taken."""
    return [(p / "steps.txt").read_text().split() for p in folders(folder)]


def wait_for(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def test_all_trials_and_a_rerun_does_nothing(tmp_path):
    code, lines = swept(tmp_path)
    assert code == 0
    assert [line for line in lines if line[0] == "finished"] == [
        ("finished", 0, 80.0, ""), ("finished", 1, 90.0, ""), ("finished", 2, 100.0, ""),
    ]  # fmt: skip
    content = json.loads((tmp_path / "lr-2/trial.json").read_text())
    assert (content["overrides"], content["number"]) == (["lr=2"], 1)
    assert (content["state"], content["exit_code"]) == ("finished", 0)
    assert [start["seconds"] >= 0 for start in content["starts"]] == [True]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, lines = swept(tmp_path)
    assert code == 0
    assert {line[0] for line in lines} == {"finished"}
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    swept(tmp_path, ("1", "2", "3", "4"))  # one more value: one more trial
    assert len(folders(tmp_path)) == 4
    assert all(s == [str(i) for i in range(1, 9)] for s in steps(tmp_path))


def test_a_failed_trial_is_marked_and_the_others_run(tmp_path):
    more = {"1": [], "2": ["fail=1"], "3": ["fail=9"]}
    search, launcher = Grid(), Basic()
    search.start(Space((), {"lr": Choice(tuple(more))}), tmp_path)
    launcher.start(tmp_path)
    sweep = Sweep(
        search, launcher, lambda t: toy_words(t, *more[t.overrides[0][-1]]), "knn_k20", True
    )
    assert sweep.run() == 1
    launcher.close()
    assert states(tmp_path) == ["finished", "failed", "failed"]
    errors = [trials.read(p).get("error") for p in folders(tmp_path)]
    assert errors == [None, "optim.lr=huge: a number below 10", "killed by SIGKILL: out of memory?"]
    code, lines = swept(tmp_path, retry=False)
    assert code == 1
    assert [line[0] for line in lines] == ["finished", "failed", "failed"]
    assert swept(tmp_path)[0] == 0  # tried again, and now nothing is in the way
    assert states(tmp_path) == ["finished"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("victim", ["driver", "group"])
def test_killed_twice_no_step_is_taken_twice(tmp_path, jobs, victim):
    """SIGKILL of the sweep alone, or of its group; the third start ends with six results."""
    for wanted in (1, 3):
        sweep = process(tmp_path, jobs)
        wait_for(lambda n=wanted: len(list(tmp_path.glob("*/summary.json"))) >= n)
        wait_for(lambda: "running" in states(tmp_path))
        if victim == "driver":
            sweep.kill()
        else:
            os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait(20)
        assert len(list(tmp_path.glob("*/summary.json"))) < 6
    assert process(tmp_path, jobs).wait(60) == 0
    assert states(tmp_path) == ["finished"] * 6
    assert steps(tmp_path) == [[str(i) for i in range(1, 9)]] * 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_asked_to_stop_every_trial_saves(tmp_path, number, code):
    sweep = process(tmp_path, 2, "1,2,3", "sleep=0.3")
    wait_for(lambda: len(list(tmp_path.glob("*/steps.txt"))) == 2)
    sweep.send_signal(number)
    assert sweep.wait(20) == code
    assert sorted(states(tmp_path)) == ["stopped", "stopped"]
    assert [trials.read(p)["exit_code"] for p in folders(tmp_path)] == [code, code]
    assert process(tmp_path, 2, "1,2,3", "sleep=0.01").wait(60) == 0
    assert steps(tmp_path) == [[str(i) for i in range(1, 9)]] * 3


def test_another_sweeps_trial_is_waited_for(tmp_path):
    """By the lock of its run folder: two sweeps of the same trials share them out."""
    folder, summary = tmp_path / "lr-2", {"results": {"p": {"knn_k20": 7.0}}}

    def finish(holder):
        (folder / "summary.json").write_text(json.dumps(summary))
        os.kill(holder, signal.SIGKILL)

    with held_by_another(folder / ".lock") as holder:
        threading.Timer(0.5, finish, [holder]).start()
        code, lines = swept(tmp_path)
    assert code == 0
    assert any(line[1].startswith(f"lr=2: waiting for process {holder} on") for line in lines
               if line[0] == "message")  # fmt: skip
    assert lines[-1] == ("finished", 1, 7.0, "")
    assert not (folder / "steps.txt").exists()


def test_a_trial_whose_lock_is_taken_at_its_start_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.sweeps.driver.lock_holder", lambda folder: "")
    with held_by_another(tmp_path / "lr-1/.lock") as holder:
        threading.Timer(0.5, os.kill, [holder, signal.SIGKILL]).start()
        code, lines = swept(tmp_path, ("1",), ["steps=2"])
    assert code == 0
    assert lines[-1] == ("finished", 0, 80.0, "")
    assert "in use by process" in (tmp_path / "lr-1/output.txt").read_text()


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
    launcher = Joblib(None, [0, 1, 2, 3], 2)
    assert launcher.slots == 2
    assert launcher.overrides() == ["num_workers=3"]
    started = time.monotonic()
    assert swept(tmp_path, ("1", "2", "3", "4"), ["rest=0.5"], launcher)[0] == 0
    summaries = [json.loads((p / "summary.json").read_text()) for p in folders(tmp_path)]
    assert {s["visible"] for s in summaries} == {"0,1", "2,3"}
    assert {s["threads"] for s in summaries} == {"4"}
    assert time.monotonic() - started < 20
    with pytest.raises(UserError, match=r"set launcher\.n_jobs=1"):
        Local(3, [0, 1], 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert Local().gpus == ["5", "7"]
    assert Local().slots == 2


def test_submitit_without_slurm(tmp_path):
    """A local executor really runs the trials, in processes of its own."""
    launcher = Submitit("local", 2, {"timeout_min": 5, "cpus_per_task": None})
    assert swept(tmp_path, ("1", "2"), ["steps=2"], launcher)[0] == 0
    assert steps(tmp_path) == [["1", "2"]] * 2
    assert list((tmp_path / ".submitit").glob("*_result.pkl"))


@pytest.mark.parametrize(
    ("cluster", "parameters", "message"),
    [
        (None, {}, "no SLURM here"),
        ("local", {"timeout": 5}, "timeout"),
    ],
)
def test_submitit_that_cannot_start(tmp_path, cluster, parameters, message):
    with pytest.raises(UserError, match=message):
        Submitit(cluster, 1, parameters).start(tmp_path)


def test_a_job_whose_launcher_ends_is_stopped(tmp_path):
    """The job's own end takes the trial along, saved."""
    job = Job((sys.executable, "-c", "import time; time.sleep(60)"), str(tmp_path))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    time.sleep(0.5)
    (tmp_path / ".stop").write_text(str(int(signal.SIGTERM)))
    thread.join(10)
    assert codes == [-signal.SIGTERM]
