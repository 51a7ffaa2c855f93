"""Every published way of nesting weights is consumed whole; anything else is an error that names
the file.
"""

import argparse
import collections
import dataclasses
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
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        return torch.equal(model(x), other(x))


def full_training_file(model):
    head = DINOHead(model.embed_dim, 32, 16, 8).state_dict()
    state = {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    state |= {f"module.head.{k}": v for k, v in head.items()}
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    options = argparse.Namespace(arch="xcit_nano_12_p16", lr=5e-4)
    return {"student": other, "teacher": state, "args": options, "epoch": 3, "optimizer": {}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m.state_dict(),
        lambda m: {"model": m.state_dict()},
        full_training_file,
        lambda m: {"state_dict": {f"teacher.backbone.{k}": v for k, v in m.state_dict().items()}},
    ],
    ids=["bare", "supervised", "training", "ours"],
)
def test_published_nestings(model, wrap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(wrap(model), path)
    assert same(load_backbone(path), model)


def test_supervised_head_is_not_dropped(tmp_path):
    model = create_model(NAME, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "supervised.pth")
    loaded = load_backbone(tmp_path / "supervised.pth")
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_published_names_are_all_consumed():
    """The key patterns of the released files, for every block, and nothing else."""
    patterns = (
        r"patch_embed\.proj\.[0246]\.0\.weight|patch_embed\.proj\.[0246]\.1\.(weight|bias|running_mean|running_var|"
        r"num_batches_tracked)|pos_embeder\.token_projection\.(weight|bias)|cls_token|norm\.(weight|bias)|"
        r"blocks\.\d+\.(norm[123]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.temperature|"
        r"local_mp\.(conv1|conv2|bn)\.(weight|bias)|local_mp\.bn\.(running_mean|running_var|num_batches_tracked)|"
        r"mlp\.fc[12]\.(weight|bias)|gamma[123])|"
        r"cls_attn_blocks\.[01]\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|mlp\.fc[12]\.(weight|bias)|"
        r"gamma[12])"
    )
    with torch.device("meta"):
        keys = create_model("xcit_small_24_p16").state_dict()
    assert all(re.fullmatch(patterns, key) for key in keys)
    assert len(keys) == 4 * 6 + 2 + 1 + 2 + 24 * 27 + 2 * 14


def test_student_or_teacher(model, tmp_path):
    torch.save(full_training_file(model), tmp_path / "full.pth")
    student = load_backbone(tmp_path / "full.pth", which="student")
    assert all((p == 0).all() for p in student.parameters())


def test_architecture_is_read_off_the_shapes(tmp_path):
    for name in ("xcit_nano_12_p16", "xcit_tiny_12_p8", "xcit_nano_12_p4"):
        model = create_model(name, in_chans=5)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        loaded = load_backbone(tmp_path / "w.pth").architecture
        assert {k: v for k, v in loaded.items() if k != "layer_scale"} == {
            k: v for k, v in model.architecture.items() if k != "layer_scale"
        }


def test_another_architecture_is_named_with_both(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with torch.device("meta"):
        expect = create_model("xcit_small_12_p8").architecture
    with pytest.raises(ValueError, match="xcit_nano_12_p16, not xcit_small_12_p8"):
        load_backbone(tmp_path / "w.pth", expect=expect)


def broken(change):
    def make(model, path):
        state = dict(model.state_dict())
        change(state)
        torch.save(state, path)

    return make


class Hostile:
    def __reduce__(self):
        return (open, ("hostile-code-ran", "w"))


def hostile(model, path):
    path.write_bytes(pickle.dumps({"model": Hostile()}))


def truncated(model, path):
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "truncated"),
        (lambda model, path: path.write_bytes(b""), "0 bytes"),
        (hostile, "cannot be read"),
        (lambda model, path: torch.save([1], path), "holds a list"),
        (
            lambda model, path: torch.save({"fc.weight": torch.ones(2)}, path),
            "not an XCiT checkpoint",
        ),
        (broken(lambda s: s.pop("norm.bias")), "missing norm.bias"),
        (broken(lambda s: s.update(extra=torch.ones(1))), "unexpected extra"),
        (broken(lambda s: s.update({"norm.bias": torch.ones(3)})), "(3,), not (128,)"),
        (broken(lambda s: s.pop("cls_token")), "cls_token"),
        (broken(lambda s: s.update(epoch=3)), "entries that are no tensors: epoch"),
        (broken(lambda s: s.update({7: torch.ones(1)})), "entries that are no tensors: 7"),
        (broken(lambda s: s.update(cls_token=torch.ones(()))), "lack dimensions"),
        (broken(lambda s: s.update(cls_token=torch.ones(1, 1, 0))), "embed_dim 0"),
        (broken(lambda s: s.update({"blocks.99.gamma1": torch.ones(128)})), "missing blocks.12."),
        # a tensor that says a million channels takes no memory, and the network is not made
        (
            broken(lambda s: s.update(cls_token=torch.ones(1).expand(1, 1, 2**20))),
            "(16, 3, 3, 3), not (131072, 3, 3, 3)",
        ),
        *(
            (lambda model, path, key=key: torch.save({key: [1]}, path), f"{key} in it is a list")
            for key in ("state_dict", "teacher", "model")
        ),
    ],
)
def test_bad_files(model, make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    make(model, path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_backbone(path)
    assert "bad.pth" in str(error.value)
    assert not (tmp_path / "hostile-code-ran").exists()


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="without checkpoints"):
        load_backbone(tmp_path)


def test_newest_checkpoint_is_by_step_not_by_time(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, dim in ((1000, 32), (999, 64)):
        model = XCiT(dim, 1, 2, patch_size=4)
        state = {f"teacher.backbone.{k}": v for k, v in model.state_dict().items()}
        content = {"state_dict": state, "architecture": model.architecture}
        torch.save(content, folder / f"step-{step:06d}.ckpt")
    assert load_backbone(tmp_path).embed_dim == 32


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_small_24_p8"])
def test_timms_names_and_ours_convert_both_ways(name):
    """Names and shapes of timm's own model; test_xcit.py compares all sizes as functions."""
    with torch.device("meta"):
        theirs = timm.create_model(f"{name}_224", num_classes=10).state_dict()
        ours = create_model(name, num_classes=10).state_dict()
    there = from_timm_names(theirs)
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in ours.items()}
    back = to_timm_names(there)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}


def test_timms_values_and_ours_convert_both_ways(model):
    back = from_timm_names(to_timm_names(model.state_dict()))
    assert commands.same(back, dict(model.state_dict()))


def saved(model, path, header=None, change=dict):
    metadata = None if header is None else {"ssl_xcit": header}
    save_file(change(model.state_dict()), path, metadata)
    return path


def test_safetensors_in_published_and_timm_names(model, tmp_path):
    assert same(load_backbone(saved(model, tmp_path / "a.safetensors")), model)
    assert same(
        load_backbone(saved(model, tmp_path / "b.safetensors", change=to_timm_names)), model
    )
    folder = tmp_path / "exported"
    folder.mkdir()
    small = XCiT(32, 1, 2, patch_size=4, in_chans=2, tokens_norm=False).eval()
    preprocess = {"channels": 2, "mean": [0.1, 0.2], "std": [1.0, 1.0]}
    about = json.dumps({"architecture": small.architecture, "preprocess": preprocess})
    saved(small, folder / "model.safetensors", about)
    loaded = load_backbone(folder)
    assert loaded.architecture == small.architecture
    assert loaded.preprocess == preprocess
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize(
    "header",
    [
        '{"architecture": {"embed_dim": 32}}',
        '{"architecture": {"embed_dim": "os.system", "depth": 1}}',
        '{"architecture": [1]}',
        '{"architecture": "x"}',
        "no json",
        "[]",
    ],
)
def test_a_header_of_others_is_data(model, tmp_path, header):
    path = saved(model, tmp_path / "w.safetensors", header)
    if header == "[]":
        assert same(load_backbone(path), model)
        return
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_backbone(path)


def test_an_architecture_of_others_is_data(model, tmp_path):
    good = dict(model.architecture)
    state = {f"teacher.backbone.{k}": v for k, v in model.state_dict().items()}
    changes = ({"more": 1}, {"depth": 10**9}, {"depth": "12"}, {"embed_dim": None}, {"depth": 9999})
    for change in changes:
        torch.save({"state_dict": state, "architecture": {**good, **change}}, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match="architecture"):
            load_backbone(tmp_path / "w.ckpt")


def test_half_of_a_safetensors_file(model, tmp_path):
    path = saved(model, tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"w\.safetensors \(50,000 bytes\) cannot be read"):
        load_backbone(path)


@pytest.mark.parametrize("form", ["published", "parametrized", "ours"])
def test_training_files_give_head_and_center(model, tmp_path, form):
    torch.manual_seed(1)
    head = DINOHead(128, 32, 16, 8)
    content = full_training_file(model)
    content["teacher"] |= {f"module.head.{k}": v for k, v in head.state_dict().items()}
    center = torch.randn(1, 32)
    content["dino_loss"] = {"center": center}
    if form == "parametrized":
        for letter, number in (("g", 0), ("v", 1)):
            value = content["teacher"].pop(f"module.head.last_layer.weight_{letter}")
            key = f"module.head.last_layer.parametrizations.weight.original{number}"
            content["teacher"][key] = value
    if form == "ours":
        state = {f"teacher.backbone.{k}": v for k, v in model.state_dict().items()}
        state |= {f"teacher.head.{k}": v for k, v in head.state_dict().items()}
        content = {"state_dict": {**state, "center.center": center[0]}}
    torch.save(content, tmp_path / "full.pth")
    loaded = load_training(tmp_path / "full.pth")
    assert same(loaded.backbone, model)
    assert torch.equal(loaded.center, center[0])
    other = DINOHead(128, 32, 16, 8)
    other.load_state_dict(loaded.head)
    assert all(
        torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True)
    )


def test_a_backbone_alone_has_no_head_and_another_head_is_refused(tmp_path):
    model = XCiT(32, 1, 2, patch_size=4)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load_training(tmp_path / "bare.pth")[1:] == (None, None)
    content = full_training_file(model)
    head = "module.head.last_layer.weight_v"
    changes = {
        r"not DINO's: unexpected mlp\.1\.running_mean": {
            "module.head.mlp.1.running_mean": torch.ones(3)
        },
        "not DINO's: missing last_layer.weight_v": {head: None},
        r"not DINO's: last_layer.weight_v is \(32,\)": {head: torch.ones(32)},
    }
    for message, change in changes.items():
        other = {**content["teacher"], **change}
        teacher = {key: value for key, value in other.items() if value is not None}
        torch.save({**content, "teacher": teacher}, tmp_path / "other.pth")
        with pytest.raises(UserError, match=message):
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


def behind(prefix, model, change=dict):
    """A state dict with all of its names behind a prefix."""
    return {prefix + key: value for key, value in change(model.state_dict()).items()}


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


@dataclasses.dataclass
class Options:
    """Somebody's own options."""

    lr: float = 0.1

    class Inner:
        """And theirs."""


def by_name(model):
    """What an optimizer keeps for each tensor."""
    names = model.state_dict()
    return {"state": {name: {"exp_avg": torch.ones(1)} for name in names}, "exp_avg": dict(names)}


OWN_SCRIPTS = {
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
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SCRIPTS)
def test_own_scripts(pair, tmp_path, name):
    content = OWN_SCRIPTS[name](*pair)
    assert loaded_is(content, pair[0], tmp_path / "own.pth")
    assert load_training(tmp_path / "own.pth").head is None


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
    assert "model.backbone.* in state_dict; not loaded: model.projector.*; loss.*; queue" in (
        caplog.text
    )
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: behind("a.", m) | behind("b.", o), r"2 XCiTs that .*: a\.\*; b\.\*"),
        (lambda m, o: {"model": m.state_dict(), "best": o.state_dict()}, "model; best"),
        (lambda m, o: {"student": m.state_dict()}, "no teacher: student; set which=student"),
        (
            lambda m, o: {"state_dict": {"module.conv1.weight": torch.ones(1), "module.fc.weight":
                                         torch.ones(1)}, "center": torch.ones(1)},
            r"no blocks\.0\.attn\.temperature behind any prefix; it holds center; "
            r"module\.conv1\.\* in state_dict; module\.fc\.\* in state_dict",
        ),
        (
            lambda m, o: {"net": {k: v for k, v in behind("x.", m).items() if k != "x.norm.bias"}},
            r"own\.pth \(x\.\* in net\) does not fit the network: missing norm\.bias",
        ),
        (
            lambda m, o: behind("module.", m) | {"module.module.cls_token": torch.ones(1, 1, 32)},
            "there twice: cls_token",
        ),
        (lambda m, o: {"net": {k: v.to("meta") for k, v in behind("", m).items()}}, "on meta"),
        (
            lambda m, o: {"net": {k: v.to(torch.int8) for k, v in behind("", m).items()}},
            "cls_token is int8, not of floating point",
        ),
        (
            lambda m, o: {"net": {k: v.numpy() for k, v in behind("", m).items()}},
            r"no tensors: cls_token \(numpy",
        ),
        (lambda m, o: {"net": Hostile()}, "holds no tensors by name"),
    ],
)  # fmt: skip
def test_own_scripts_that_do_not_tell(pair, tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    torch.save(make(*pair), tmp_path / "own.pth")
    with pytest.raises(UserError, match=message) as error:
        load_backbone(tmp_path / "own.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hostile-code-ran").exists()


def test_classes_beside_the_weights_run_no_code(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loaded_is({"model": pair[0].state_dict(), "x": Hostile()}, pair[0], tmp_path / "x.pth")
    assert not (tmp_path / "hostile-code-ran").exists()
