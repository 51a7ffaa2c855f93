"""Every way of nesting weights is consumed whole; anything else is an error that names the file."""

import argparse
import collections
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys

import commands
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from safetensors.torch import save_file
from timm.models.xcit import checkpoint_filter_fn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from ssl_xcit import create_model, load_backbone
from ssl_xcit.errors import UserError
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.timm_keys import from_timm_names, to_timm_names
from ssl_xcit.models.weights import load_training
from ssl_xcit.models.xcit import XCiT

NAME = "xcit_nano_12_p16"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(NAME).eval()


def same(model, other) -> bool:
    x = torch.randn(2, model.architecture["in_chans"], 48, 48)
    with torch.no_grad():
        return torch.equal(model(x), other(x))


def behind(prefix, model, change=dict):
    """A state dict with all of its names behind a prefix."""
    return {prefix + key: value for key, value in change(model.state_dict()).items()}


def changed(model, without=None, **new):
    return {k: v for k, v in model.state_dict().items() if k != without} | new


def full_training_file(model, head=None):
    head = DINOHead(model.embed_dim, 32, 16, 8) if head is None else head
    state = behind("module.backbone.", model) | behind("module.head.", head)
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    options = argparse.Namespace(arch=NAME, lr=5e-4)
    return {"student": other, "teacher": state, "args": options, "epoch": 3, "optimizer": {}}


def test_architecture_and_head_are_read_off_the_shapes(tmp_path):
    for name in (NAME, "xcit_tiny_12_p8", "xcit_nano_12_p4"):
        model = create_model(name, in_chans=5, num_classes=10)
        torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
        loaded = load_backbone(tmp_path / "w.pth")
        layer_scale = loaded.architecture["layer_scale"]
        assert loaded.architecture == {**model.architecture, "layer_scale": layer_scale}
        assert torch.equal(loaded.head.weight, model.head.weight)


class Hostile:
    def __reduce__(self):
        return (open, ("hostile-code-ran", "w"))


def test_newest_checkpoint_is_by_step_not_by_time(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, dim in ((1000, 32), (999, 64)):
        model = XCiT(dim, 1, 2, patch_size=4)
        state = behind("teacher.backbone.", model)
        content = {"state_dict": state, "architecture": model.architecture}
        torch.save(content, folder / f"step-{step:06d}.ckpt")
    assert load_backbone(tmp_path).embed_dim == 32


def shapes(state):
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("name", [NAME, "xcit_small_24_p8"])
def test_published_and_timm_s_names_convert(name):
    """By timm's own filter of the released files too; test_xcit.py compares sizes as functions."""
    with torch.device("meta"):
        model = timm.create_model(f"{name}_224", num_classes=10)
        theirs, ours = model.state_dict(), create_model(name, num_classes=10).state_dict()
    assert shapes(from_timm_names(theirs)) == shapes(ours)
    assert shapes(to_timm_names(ours)) == shapes(theirs)
    assert shapes(checkpoint_filter_fn(dict(ours), model)) == shapes(theirs)


def saved(model, path, header=None, change=dict):
    save_file(change(model.state_dict()), path, header and {"ssl_xcit": header})
    return path


def test_safetensors_in_published_and_timm_names(model, tmp_path):
    assert same(load_backbone(saved(model, tmp_path / "a.safetensors")), model)
    timms = load_backbone(saved(model, tmp_path / "b.safetensors", change=to_timm_names))
    assert commands.same(timms.state_dict(), model.state_dict())
    folder = tmp_path / "exported"
    folder.mkdir()
    small = XCiT(32, 1, 2, patch_size=4, in_chans=2, tokens_norm=False).eval()
    preprocess = {"channels": 2, "mean": [0.1, 0.2], "std": [1.0, 1.0]}
    about = json.dumps({"architecture": small.architecture, "preprocess": preprocess})
    saved(small, folder / "model.safetensors", about)
    loaded = load_backbone(folder)
    assert loaded.architecture == small.architecture
    assert loaded.preprocess == preprocess
    assert same(loaded, small)


def test_a_header_of_others_is_data(model, tmp_path):
    path = tmp_path / "w.safetensors"
    assert same(load_backbone(saved(model, path, "[]")), model)
    for header in (
        '{"architecture": {"embed_dim": 32}}', '{"architecture": [1]}', '{"architecture": "x"}',
        '{"architecture": {"embed_dim": "os.system", "depth": 1}}', "no json",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            load_backbone(saved(model, path, header))
    path.write_bytes(saved(model, path).read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"w\.safetensors \(50,000 bytes\) cannot be read"):
        load_backbone(path)


def test_an_architecture_of_others_is_data(model, tmp_path):
    content = {"state_dict": behind("teacher.backbone.", model)}
    changes = ({"more": 1}, {"depth": 10**9}, {"depth": "12"}, {"embed_dim": None}, {"depth": 9999})
    for change in changes:
        content["architecture"] = {**model.architecture, **change}
        torch.save(content, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match="architecture"):
            load_backbone(tmp_path / "w.ckpt")


@pytest.mark.parametrize("form", ["published", "parametrized", "ours"])
def test_training_files_give_head_and_center(model, tmp_path, form):
    torch.manual_seed(1)
    head = DINOHead(128, 32, 16, 8)
    center = torch.randn(1, 32)
    content = {**full_training_file(model, head), "dino_loss": {"center": center}}
    if form == "parametrized":
        for letter, number in (("g", 0), ("v", 1)):
            value = content["teacher"].pop(f"module.head.last_layer.weight_{letter}")
            key = f"module.head.last_layer.parametrizations.weight.original{number}"
            content["teacher"][key] = value
    if form == "ours":
        state = behind("teacher.backbone.", model) | behind("teacher.head.", head)
        content = {"state_dict": {**state, "center.center": center[0]}}
    torch.save(content, tmp_path / "full.pth")
    assert same(load_backbone(tmp_path / "full.pth"), model)
    if form == "published":
        student = load_backbone(tmp_path / "full.pth", which="student")
        assert all((p == 0).all() for p in student.parameters())
    loaded = load_training(tmp_path / "full.pth")
    assert same(loaded.backbone, model)
    assert torch.equal(loaded.center, center[0])
    other = DINOHead(128, 32, 16, 8)
    other.load_state_dict(loaded.head)
    assert commands.same(other.state_dict(), head.state_dict())


def test_a_backbone_alone_has_no_head_and_another_head_is_refused(tmp_path):
    model = XCiT(32, 1, 2, patch_size=4)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load_training(tmp_path / "bare.pth")[1:] == (None, None)
    content = full_training_file(model)
    head = "module.head.last_layer.weight_v"
    for message, change in (
        (r"unexpected mlp\.1\.running_mean", {"module.head.mlp.1.running_mean": torch.ones(3)}),
        ("missing last_layer.weight_v", {head: None}),
        (r"last_layer.weight_v is \(32,\)", {head: torch.ones(32)}),
    ):
        other = {**content["teacher"], **change}
        teacher = {key: value for key, value in other.items() if value is not None}
        torch.save({**content, "teacher": teacher}, tmp_path / "other.pth")
        with pytest.raises(UserError, match=f"not DINO's: {message}"):
            load_training(tmp_path / "other.pth")
    for center in (torch.ones(3), "x"):
        torch.save({**content, "dino_loss": {"center": center}}, tmp_path / "other.pth")
        with pytest.raises(UserError, match="its center is not one number for each of 32"):
            load_training(tmp_path / "other.pth")


@pytest.fixture(scope="module")
def pair():
    """Two small networks of one architecture."""
    torch.manual_seed(0)
    return tuple(XCiT(32, 2, 2, patch_size=4).eval() for _ in range(2))


def loaded_is(content, model, path, which="teacher"):
    torch.save(content, path)
    return commands.same(load_backbone(path, which).state_dict(), model.state_dict())


def wrapped_inside(state):
    """As FSDP, activation checkpoints and torch.compile of parts name things."""
    inside = "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    return {
        key.replace("blocks.0.", inside).replace(".attn.", ".attn._orig_mod."): value
        for key, value in state.items()
    }


class Own(nn.Module):
    """A network of somebody's own script."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(32, 3)


class Settings(dict):
    """Somebody's own dictionary."""


class Options:
    """Somebody's own options."""

    def __init__(self):
        self.lr = 0.1

    class Inner:
        """And theirs."""


def by_name(model):
    """What an optimizer keeps for each tensor."""
    names = model.state_dict()
    return {"state": {name: {"exp_avg": torch.ones(1)} for name in names}, "exp_avg": dict(names)}


OWN_SCRIPTS = {
    "bare": lambda m, o: m.state_dict(),
    "supervised": lambda m, o: {"model": m.state_dict()},
    "ours": lambda m, o: {"state_dict": behind("teacher.backbone.", m)},
    "ddp": lambda m, o: {"state_dict": behind("module.", m), "epoch": 3},
    "model_state_dict": lambda m, o: {"model_state_dict": m.state_dict(), "optimizer": by_name(o)},
    "net": lambda m, o: {"net": behind("module.", m)},
    "ema": lambda m, o: {"ema": m.state_dict()},
    "lightning": lambda m, o: {"state_dict": behind("model.", m), "hyper_parameters": {"lr": 1.0}},
    "compiled": lambda m, o: {"state_dict": behind("model._orig_mod.", m)},
    "parts": lambda m, o: behind("_fsdp_wrapped_module.net.", m, wrapped_inside),
    "nested": lambda m, o: {"model": {"state_dict": behind("encoder.", m)}},
    "deep": lambda m, o: {"a": {"b": {"c": {"d": {"trunk": behind("module.", m)}}}}},
    "timm": lambda m, o: {"state_dict": behind("model.backbone.", m, to_timm_names)},
    "one under two names": lambda m, o: behind("backbone.", m) | behind("model.backbone.", m),
    "its own words": lambda m, o: {
        "architecture": "xcit", "preprocess": {"resize": 9}, "model": behind("module.", m)
    },
    "its own objects": lambda m, o: {
        "model": m.state_dict(), "args": Options(), "inner": Options.Inner(),
        "accuracy": np.float64(71.5), "log": collections.defaultdict(list, {"loss": [1.0]}),
    },
    "its own dictionary": lambda m, o: Settings(model=Settings(m.state_dict())),
    "a whole network": lambda m, o: {"model": nn.DataParallel(Own(m)), "epoch": 3},
    "what would run code": lambda m, o: {"model": m.state_dict(), "x": Hostile()},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SCRIPTS)
def test_own_scripts(pair, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = OWN_SCRIPTS[name](*pair)
    assert loaded_is(content, pair[0], tmp_path / "own.pth")
    assert load_training(tmp_path / "own.pth").head is None
    assert not (tmp_path / "hostile-code-ran").exists()


ROLES = {
    "model_ema": lambda m, o: {"model": o.state_dict(), "model_ema": {"module": m.state_dict()}},
    "state_dict_ema": lambda m, o: {
        "state_dict": behind("module.", o), "state_dict_ema": behind("module.", m)
    },
    "ema_state_dict": lambda m, o: {"net": o.state_dict(), "ema_state_dict": m.state_dict()},
    "modelEMA": lambda m, o: {"model": o.state_dict(), "modelEMA": m.state_dict()},
    "moco": lambda m, o: behind("module.encoder_q.", o) | behind("module.encoder_k.", m),
    "byol": lambda m, o: {"state_dict": behind("online.", o) | behind("target.", m)},
    "momentum": lambda m, o: behind("backbone.", o) | behind("momentum_backbone.", m),
    "teacher": lambda m, o: {"model": behind("student.net.", o) | behind("teacher.net.", m)},
    "current": lambda m, o: {"state_dict": behind("m.", m), "current_model_state": behind("m.", o)},
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_the_averaged_weights_are_the_teacher_s(pair, tmp_path, name, caplog):
    averaged, plain = pair
    content, path = ROLES[name](averaged, plain), tmp_path / "both.pth"
    with caplog.at_level(logging.WARNING):
        assert loaded_is(content, averaged, path, "teacher")
        assert loaded_is(content, plain, path, "student")
    warnings = [f"which={which}" for which in ("teacher", "student") if name != "teacher"]
    assert len(caplog.records) == len(warnings)  # none for its very names
    assert all(w in r.getMessage() for w, r in zip(warnings, caplog.records, strict=True))


def test_what_is_beside_the_backbone_is_named(pair, tmp_path, caplog):
    content = {"state_dict": behind("model.backbone.", pair[0])}
    beside = ("model.projector.0.weight", "model.projector.2.weight", "loss.center", "queue")
    content["state_dict"] |= {key: torch.ones(3) for key in beside}
    assert loaded_is(content, pair[0], tmp_path / "own.pth")
    words = "model.backbone.* in state_dict; not loaded: model.projector.*; loss.*; queue"
    assert words in caplog.text
    caplog.clear()
    head = {"model.head.0.weight": torch.ones(3, 32), "model.head.2.weight": torch.ones(3)}
    assert loaded_is(behind("model.", pair[0]) | head, pair[0], tmp_path / "own.pth")
    assert "the backbone is model.*; not loaded: model.head.*" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(pair, tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in behind("", pair[0]).items()}
    torch.save({"model": state}, tmp_path / "own.pth")
    loaded = load_backbone(tmp_path / "own.pth").state_dict()
    assert all(torch.equal(loaded[key], state[key].to(loaded[key].dtype)) for key in state)
    assert {v.dtype for v in loaded.values()} == {torch.float32, torch.int64}


def test_tensors_of_a_gpu_load_on_the_cpu(pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"model": pair[0].state_dict()}, tmp_path / "cuda.pth")
    assert b"cuda:3" in (tmp_path / "cuda.pth").read_bytes()
    state = load_backbone(tmp_path / "cuda.pth").state_dict()
    assert all(v.device.type == "cpu" for v in state.values())


LOADING = """
import sys, torch
from ssl_xcit import load_backbone

print("torch.distributed.tensor" in sys.modules)
plain = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    try:
        state = load_backbone(path).state_dict()
        print(all(torch.equal(state[name], plain[name]) for name in plain))
    except ValueError as error:
        print(error)
"""


def test_dtensors_and_what_was_saved_in_parts(pair, tmp_path):
    """Loaded in another process, which has not imported what makes them."""
    state = dict(pair[0].state_dict())
    torch.save(state, tmp_path / "plain.pth")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, place in (("whole", Shard(0)), ("parts", Partial())):
            made = {k: DTensor.from_local(v, mesh, [place]) if v.ndim else v
                    for k, v in state.items()}  # fmt: skip
            torch.save({"model": made}, tmp_path / f"{name}.pth")
        torch.distributed.checkpoint.save({"model": state}, checkpoint_id=tmp_path / "in parts")
    finally:
        dist.destroy_process_group()
    names = ("plain.pth", "whole.pth", "parts.pth", "in parts", "in parts/__0_0.distcp")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *(str(tmp_path / name) for name in names)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    imported, whole, parts, *folder = done.stdout.splitlines()
    assert [imported, whole] == ["False", "True"]
    assert re.search(r"parts of tensors.*: cls_token;.*full_state_dict=True", parts)
    assert len(folder) == 2
    for message in folder:
        assert f"dcp_to_torch '{tmp_path}/in parts' 'in parts.pth'" in message


BAD = {  # messages by what is in the file, of one network or of two
    "truncated": lambda m, o: contents(m.state_dict())[:50_000],
    "0 bytes": lambda m, o: b"",
    "cannot be read": lambda m, o: pickle.dumps({"model": Hostile()}),
    "holds a list": lambda m, o: [1],
    "state_dict in it is a list": lambda m, o: {"state_dict": [1]},
    "teacher in it is a list": lambda m, o: {"teacher": [1]},
    "model in it is a list": lambda m, o: {"model": [1]},
    "holds no tensors by name": lambda m, o: {"net": Hostile()},
    "not an XCiT checkpoint": lambda m, o: {"fc.weight": torch.ones(2)},
    "missing norm.bias": lambda m, o: changed(m, "norm.bias"),
    "unexpected extra": lambda m, o: changed(m, extra=torch.ones(1)),
    r"\(3,\), not \(32,\)": lambda m, o: changed(m, **{"norm.bias": torch.ones(3)}),
    "cls_token": lambda m, o: changed(m, "cls_token"),
    "entries that are no tensors: epoch": lambda m, o: changed(m, epoch=3),
    "entries that are no tensors: 7": lambda m, o: changed(m) | {7: torch.ones(1)},
    "lack dimensions": lambda m, o: changed(m, cls_token=torch.ones(())),
    "embed_dim 0": lambda m, o: changed(m, cls_token=torch.ones(1, 1, 0)),
    r"missing blocks\.2\.": lambda m, o: changed(m, **{"blocks.99.gamma1": torch.ones(32)}),
    # a tensor that says a million channels takes no memory, and the network is not made
    r"\(16, 3, 3, 3\), not \(524288, 3, 3, 3\)": lambda m, o: changed(
        m, cls_token=torch.ones(1).expand(1, 1, 2**20)
    ),
    r"2 XCiTs that .*: a\.\*; b\.\*": lambda m, o: behind("a.", m) | behind("b.", o),
    "model; best": lambda m, o: {"model": m.state_dict(), "best": o.state_dict()},
    "no teacher: student; set which=student": lambda m, o: {"student": m.state_dict()},
    r"no blocks\.0\.attn\.temperature behind any prefix; it holds center; "
    r"module\.conv1\.\* in state_dict; module\.fc\.\* in state_dict": lambda m, o: {
        "state_dict": {f"module.{name}.weight": torch.ones(1) for name in ("conv1", "fc")},
        "center": torch.ones(1),
    },
    r"own\.pth \(x\.\* in net\) does not fit the network: missing norm\.bias": lambda m, o: {
        "net": {f"x.{k}": v for k, v in changed(m, "norm.bias").items()}
    },
    "there twice: cls_token": lambda m, o: (
        behind("module.", m) | {"module.module.cls_token": torch.ones(1, 1, 32)}
    ),
    "on meta": lambda m, o: {"net": {k: v.to("meta") for k, v in m.state_dict().items()}},
    "cls_token is int8, not of floating point": lambda m, o: {
        "net": {k: v.to(torch.int8) for k, v in m.state_dict().items()}
    },
    r"no tensors: cls_token \(numpy": lambda m, o: {
        "net": {k: v.numpy() for k, v in m.state_dict().items()}
    },
}


def contents(value):
    """The bytes of a file of torch."""
    if isinstance(value, bytes):
        return value
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("message", BAD)
def test_bad_files(pair, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pth").write_bytes(contents(BAD[message](*pair)))
    with pytest.raises(UserError, match=message) as error:
        load_backbone(tmp_path / "own.pth")
    assert "own.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hostile-code-ran").exists()
