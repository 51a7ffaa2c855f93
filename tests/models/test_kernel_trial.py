"""Kernels are taken where they are faster, which is tried once a machine."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ssl_xcit import create_model
from ssl_xcit.models import kernel_trial as room
from ssl_xcit.models.devices import prepare_cpu
from ssl_xcit.models.kernel_trial import kernel_speed, kernels_are_faster, tried_speed
from ssl_xcit.utils.hardware import cpp_compiler


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A machine of its own, whose kernels have the speed that is set."""
    built = SimpleNamespace(path=tmp_path / "kernels.so", speed=0.7, trials=0)

    def tried():
        built.trials += 1
        return built.speed

    monkeypatch.setattr(room, "kernels", lambda: built)
    monkeypatch.setattr(room, "tried_speed", tried)
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
    assert record == {"speed": 0.7, "torch": torch.__version__}
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
    assert tried_speed() > 0


@pytest.mark.parametrize("ending", ["os.abort()", "print('no number')", "raise ValueError"])
def test_kernels_that_end_the_process_are_left(ending, monkeypatch, capsys):
    monkeypatch.setattr(room, "CODE", f"import os\n{ending}")
    assert tried_speed() == 0.0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("networks run without kernels for this processor, which failed")


def test_a_trial_that_failed_is_tried_again(trial):
    trial.speed = 0.0
    assert not taken()
    trial.speed = 1.3
    assert kernels_are_faster() is False  # by this process
    assert taken()
    assert trial.trials == 2


ONE_OF_SEVERAL = """
import sys, time
from pathlib import Path
from ssl_xcit.models import kernel_trial as room

def tried():
    time.sleep(1)
    return float(sys.argv[2])

room.tried_speed = tried
print(room.tried_once(Path(sys.argv[1])))
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
