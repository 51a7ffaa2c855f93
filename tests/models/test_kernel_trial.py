"""Kernels are taken where they are faster, which is tried once a machine."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ssl_xcit import create_model
from ssl_xcit.models import kernel_trial as room
from ssl_xcit.models.devices import prepare_cpu
from ssl_xcit.models.kernel_trial import Trial, kernel_speed, kernels_are_faster, new_trial
from ssl_xcit.utils.hardware import cpp_compiler


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A machine of its own, whose kernels have the speed that is set."""
    built = SimpleNamespace(path=tmp_path / "kernels.so", speed=0.7, reason="", trials=0)

    def new_trial():
        built.trials += 1
        return Trial(built.speed, built.reason)

    monkeypatch.setattr(room, "kernels", lambda: built)
    monkeypatch.setattr(room, "new_trial", new_trial)
    kernel_speed.cache_clear()
    yield built
    kernel_speed.cache_clear()


def taken(kernels: bool | None = None) -> bool:
    """By a network that is prepared in a new process."""
    kernel_speed.cache_clear()
    network = create_model("xcit_nano_12_p8")
    prepare_cpu(network, kernels)
    return network.blocks[0].fused


def test_slow_kernels_are_left_and_tried_once(trial):
    assert not taken()
    trial.speed = 2.0
    assert not taken()
    assert trial.trials == 1
    record = json.loads(trial.path.with_suffix(".json").read_text())
    assert (record["speed"], record["torch"]) == (0.7, torch.__version__)
    assert [f.name for f in trial.path.parent.iterdir()] == ["kernels.json"]


@pytest.mark.skipif(not cpp_compiler()[1], reason="no C++ compiler")
def test_a_run_decides_by_how_it_began(trial):
    assert taken(True)
    assert not taken(False)
    assert trial.trials == 0


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"speed": null}', '{"speed": "fast"}', '{"speed": 0.5, "torch": "2.0"}'],
)
def test_a_damaged_record_or_one_of_another_torch_is_tried_again(trial, content):
    trial.path.with_suffix(".json").write_text(content)
    trial.speed = 1.3
    assert kernel_speed() == 1.3
    assert trial.trials == 1


def test_as_fast_as_torch_is_fast_enough(trial, monkeypatch):
    trial.speed = 0.95  # within chance
    assert kernels_are_faster()
    kernel_speed.cache_clear()
    monkeypatch.setattr(room, "kernels", lambda: None)
    assert kernel_speed() is None
    assert not kernels_are_faster()


def test_without_a_folder_for_the_record(trial, tmp_path):
    (tmp_path / "none").write_text("no folder")
    trial.path = tmp_path / "none" / "kernels.so"
    trial.speed = 1.2
    assert kernel_speed() == 1.2


@pytest.mark.skipif(not cpp_compiler()[1], reason="no C++ compiler")
def test_the_trial_itself():
    assert new_trial().speed > 0


def test_the_trial_is_by_one_thread_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    code = room.CODE.replace("measured_speed()", "torch.get_num_threads()")
    monkeypatch.setattr(room, "CODE", f"import torch\n{code}")
    assert new_trial() == Trial(1.0)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("os.write(2, b'a warning'); os.abort()", "ended with SIGABRT"),
        ("print('no number')", "could not convert string to float: 'no number'"),
        ("raise ValueError('bad')", "ValueError: bad"),
        ("sys.exit(3)", "exit code 3"),
        ("pass", "exit code 0"),
    ],
)
def test_kernels_that_end_the_process_are_left(ending, reason, monkeypatch):
    monkeypatch.setattr(room, "CODE", f"import os\n{ending}")
    assert new_trial() == Trial(0.0, reason)


HANGS = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "100"])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(100)
"""


def test_kernels_that_hang_are_ended_with_what_they_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setattr(room, "CODE", HANGS)
    monkeypatch.setattr(room, "TIMEOUT", 4)
    started = time.monotonic()
    assert new_trial() == Trial(0.0, "no end within 4 s")
    assert time.monotonic() - started < 50
    for pid in (tmp_path / "pids").read_text().split():
        assert not is_running(pid)


def test_a_trial_ends_where_nobody_waits_for_it(monkeypatch):
    wait = subprocess.Popen.communicate
    monkeypatch.setattr(subprocess.Popen, "communicate", lambda child, timeout: wait(child))
    monkeypatch.setattr(room, "CODE", "import time; time.sleep(100)")
    monkeypatch.setattr(room, "TIMEOUT", 1)
    assert new_trial() == Trial(0.0, "ended with SIGALRM")


def is_running(pid: str) -> bool:
    """Not so of one that has ended and that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_trial_that_failed_counts_for_an_hour(trial, caplog):
    trial.speed, trial.reason = 0.0, "ended with SIGILL"
    assert not taken()
    trial.speed = 1.3
    caplog.clear()
    assert not taken()
    assert trial.trials == 1
    (line,) = caplog.messages
    assert line.endswith("which failed in a trial: ended with SIGILL")
    record = trial.path.with_suffix(".json")
    failed = json.loads(record.read_text())
    record.write_text(json.dumps({**failed, "time": failed["time"] - 3601}))
    kernel_speed.cache_clear()
    assert kernels_are_faster()
    assert trial.trials == 2


ONE_OF_SEVERAL = """
import sys, time
from pathlib import Path
from ssl_xcit.models import kernel_trial as room

def new_trial():
    time.sleep(1)
    return room.Trial(float(sys.argv[2]))

room.new_trial = new_trial
print(room.tried_once(Path(sys.argv[1])).speed)
"""


def test_processes_that_try_at_once_take_the_same(tmp_path):
    command = [sys.executable, "-c", ONE_OF_SEVERAL, str(tmp_path / "kernels.json")]
    processes = [
        subprocess.Popen([*command, speed], stdout=subprocess.PIPE, text=True)
        for speed in ("0.8", "1.2")
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert first == second
    assert first.strip() in ("0.8", "1.2")
