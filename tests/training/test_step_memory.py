"""The memory of a step that fake tensors give, against what torch's allocator hands out."""

import io
import json

import pytest
import torch
from commands import SMALL, run
from test_conf import load
from torch.profiler import ProfilerActivity, profile

from ssl_xcit.data.picture import RGB
from ssl_xcit.training.build import make_module
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.step_memory import checkpoint_bytes, step_memory
from ssl_xcit.utils.validation import parse

CPU = torch.device("cpu")
IN_PARTS = ("checkpoint_blocks=true", "trainer.accumulate=2")
WORDS = [
    "experiment=none", "model=xcit_micro_4_p8", "epochs=4", "model.depth=2", "batch_size=32",
    "objective.num_prototypes=512", "objective.head.hidden_dim=64",
]  # fmt: skip
SHAPES = [(2, 32, 3, 48, 48), (4, 32, 3, 24, 24)]


def made(*words):
    settings = parse(PretrainSettings, load("pretrain", *WORDS, *words))
    return make_module(settings, make_plan(settings, 320, 1), RGB)


def stepping(module):
    """The module without a trainer."""
    optimizer = module.configure_optimizers()
    module._trainer = type("Alone", (), {"world_size": 1, "global_rank": 0, "global_step": 20})
    module.optimizers, module.manual_backward = lambda: optimizer, lambda loss: loss.backward()
    module.on_train_start()
    return optimizer


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ((), "32-true"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((), "bf16-mixed"),
                (IN_PARTS, "32-true"),
                (IN_PARTS, "bf16-mixed"),
            )
        ),
    ],
)
def test_the_peak_is_that_of_the_allocator(precision, words, tmp_path):
    memory = step_memory(made(*words), SHAPES, CPU, precision)
    low = torch.autocast(
        "cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, low:
        module = made(*words)
        optimizer = stepping(module)
        views = [torch.zeros(V, B, h, w, C).permute(0, 1, 4, 2, 3) for V, B, C, h, w in SHAPES]
        for _ in range(2):
            module.step(views)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]"]
    first = min(found, key=lambda e: e["ts"])["args"]  # earlier profiles count in the total
    before = first["Total Allocated"] - first["Bytes"]
    peak = max(e["args"]["Total Allocated"] for e in found) - before
    assert memory.total == pytest.approx(peak, rel=0.05)
    file = io.BytesIO()
    torch.save([module.state_dict(), optimizer.state_dict()], file)
    assert checkpoint_bytes(module, memory) == pytest.approx(file.tell(), rel=0.05)


def test_the_command_prints_a_plan_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", "plan=true", *SMALL) == 0
    text = capfd.readouterr().out
    assert "a plan, nothing is started" in text
    for words in ("1,494 images", "9 of 8 images", "32 prototypes", "GB a step", "fits", "stay"):
        assert words in text, words
    assert not list(tmp_path.iterdir())
    assert run("pretrain", "plan=true", *SMALL, "batch_size=9999") == 2
    assert "larger than the data" in capfd.readouterr().err


def test_a_plan_that_does_not_fit_says_what_to_set(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_xcit.training.plan_preview.memory_of", lambda device: 10**8)
    assert run("pretrain", "plan=true", *SMALL) == 0
    out, err = capfd.readouterr()
    assert "does not fit" in out
    assert "trainer.accumulate=2" in out + err
