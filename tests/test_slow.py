"""Minutes long: the wheel away from the checkout, the demo's numbers, compiled runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SMALL
from runs import content_of

from ssl_xcit.models.checkpoint_files import checkpoints_of

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def command(words, **options):
    return subprocess.run(words, check=True, text=True, capture_output=True, **options).stdout


def test_the_wheel_runs_from_its_own_yaml(tmp_path):
    """Built, installed into another folder beside the same dependencies, run somewhere else."""
    source = tmp_path / "source"
    leave = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave)
    command([sys.executable, "-m", "build", "--wheel", "--no-isolation", source], cwd=tmp_path)
    (wheel,) = source.glob("dist/*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command([*pip, "--target", site, wheel])
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    where = tmp_path / "elsewhere"
    where.mkdir()
    code = "import ssl_xcit.eval as e, ssl_xcit.conf as c; print(*e.__path__, *c.__path__)"
    found = command([sys.executable, "-c", code], env=environment, cwd=where).split()
    assert all(path.startswith(str(site)) for path in found)
    words = ["pretrain", "epochs=0.05", "batch_size=8", "name=wheel"]
    out = command([site / "bin/ssl-xcit", *words], env=environment, cwd=where)
    assert "pretrained" in out
    assert (where / "runs/wheel/summary.json").is_file()


def test_the_demo_learns(tmp_path):
    """`make demo`'s command: 8 points above random weights, every accuracy above the colour
    histogram's.
    """
    out = command([Path(sys.executable).parent / "ssl-xcit", "pretrain", "name=demo"], cwd=tmp_path)
    print(out)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    random, colour, ours = (
        summary["results"][row] for row in ("random weights", "colour histogram", "pretrained")
    )
    assert ours["knn_k20"] >= random["knn_k20"] + 8
    for metric in ("knn_k10", "knn_k20", "knn_k100", "knn_k200", "linear", "logistic"):
        assert ours[metric] > colour[metric], metric
    assert ours["linear"] > ours["knn_k20"]


def test_what_a_first_gpu_measures_runs_at_toy_size(tmp_path):
    """`benchmarks/gpu.py` ends with a file in which no part has failed."""
    out = tmp_path / "gpu.json"
    command([sys.executable, ROOT / "benchmarks/gpu.py", "--toy", "--out", out], cwd=tmp_path)
    found = json.loads(out.read_text())
    assert "error" not in out.read_text()
    assert {found["command_line"][name]["code"] for name in ("plan", "pretrain", "eval")} == {0}
    assert found["steps"]["toy 32-true"]["ms"] > 0
    assert found["parity"]["toy float32"]["largest"] < 1e-5
    assert found["parity"]["toy bfloat16"]["largest"] > 1e-5


COMPILED = """
from copy import deepcopy
import torch
from ssl_xcit.models.xcit import XCiT

torch.manual_seed(0)
plain = XCiT(16, 1, 2, patch_size=4)
other = deepcopy(plain)
compiled = torch.compile(other.forward, dynamic=False, fullgraph=True)
for side, count, low in ((24, 2, False), (24, 2, True), (80, 1, True)):  # the last: Gram form
    x, wanted = torch.randn(count, 3, side, side), torch.randn(count, 16)
    for model, run in ((plain, plain), (other, compiled)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (run(x) * wanted).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        bound = (0.1 if low else 1e-3) * p.grad.norm()
        assert (p.grad - q.grad).norm() < bound, (side, low, name)
with torch.no_grad():
    assert torch.allclose(plain(x), compiled(x), atol=1e-4), side
assert not torch._dynamo.utils.counters["graph_break"]
"""


def test_compiled_backbone_is_the_same_function():
    command([sys.executable, "-c", COMPILED])


def test_a_compiled_run(tmp_path):
    """`compile=true` trains, evaluates and leaves a checkpoint like any other, from which a killed
    run goes on bit for bit.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    exact = [*SMALL, "trainer.precision=32-true"]  # bfloat16 rounds elsewhere when compiled
    words = [*exact, "name=compiled", "compile=true"]
    program = Path(sys.executable).parent / "ssl-xcit"
    out = command([program, "pretrain", *words], env=environment, cwd=tmp_path)
    assert "compiles both backbones" in out
    plain = command([program, "pretrain", *exact, "name=plain"], env=environment, cwd=tmp_path)
    assert "compiles" not in plain
    last = [
        json.loads((tmp_path / "runs" / name / "summary.json").read_text())["last"]["loss"]
        for name in ("compiled", "plain")
    ]
    assert abs(last[0] - last[1]) < 0.01 * last[1]
    killed = [*exact, "name=killed", "compile=true"]
    slow = ["+callbacks.slow._target_=tricks.Slow", "+callbacks.slow.seconds=2"]
    with_tricks = environment | {"PYTHONPATH": str(ROOT / "tests/reliability")}
    begun = subprocess.Popen([program, "pretrain", *killed, *slow], env=with_tricks, cwd=tmp_path)
    try:
        while not (tmp_path / "runs/killed/checkpoints/step-000003.ckpt").is_file():
            assert begun.poll() is None
            time.sleep(0.05)
    finally:
        begun.kill()
    assert begun.wait() == -signal.SIGKILL
    out = command([program, "pretrain", *killed], env=environment, cwd=tmp_path)
    assert "going on from" in out
    assert "step-000003.ckpt" in out
    files = [checkpoints_of(tmp_path / "runs" / name)[-1] for name in ("compiled", "killed")]
    assert files[0].name == files[1].name != "step-000003.ckpt"
    assert content_of(files[0]) == content_of(files[1])
