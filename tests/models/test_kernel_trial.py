"""Kernels are taken where they are faster, which is tried once a machine."""

import json
from types import SimpleNamespace

import pytest
import torch

from ssl_xcit import create_model
from ssl_xcit.models import kernel_trial as room
from ssl_xcit.models.devices import prepare_cpu
from ssl_xcit.models.kernel_trial import kernel_speed, kernels_are_faster, measured_speed
from ssl_xcit.utils.hardware import cpp_compiler


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A machine of its own, whose kernels have the speed that is set."""
    built = SimpleNamespace(path=tmp_path / "kernels.so", speed=0.7, trials=0)

    def measured():
        built.trials += 1
        return built.speed

    monkeypatch.setattr(room, "kernels", lambda: built)
    monkeypatch.setattr(room, "measured_speed", measured)
    kernel_speed.cache_clear()
    yield built
    kernel_speed.cache_clear()


def taken() -> bool:
    """By a network that is prepared in a new process."""
    kernel_speed.cache_clear()
    network = create_model("xcit_nano_12_p8")
    prepare_cpu(network)
    return network.blocks[0].fused


def test_slow_kernels_are_left_and_tried_once(trial, capsys):
    assert not taken()
    assert "they have 0.70 of torch's speed here" in capsys.readouterr().out
    trial.speed = 2.0
    assert not taken()
    assert capsys.readouterr().out == ""
    assert trial.trials == 1
    assert json.loads(room.record_of(trial.path).read_text()) == {"speed": 0.7}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"speed": null}', '{"speed": "fast"}'])
def test_a_damaged_record_is_measured_again(trial, content):
    room.record_of(trial.path).write_text(content)
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


def test_a_record_that_cannot_be_written_is_no_fault(trial):
    trial.path = trial.path.parent / "none" / "kernels.so"
    trial.speed = 1.2
    assert kernel_speed() == 1.2


@pytest.mark.skipif(not cpp_compiler()[1], reason="no C++ compiler")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trial_leaves_no_trace(mode):
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with mode():
        assert measured_speed() > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
