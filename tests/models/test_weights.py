"""Every published way of nesting weights is consumed whole; anything else is an error that names
the file.
"""

import argparse
import pickle
import re

import pytest
import torch

from ssl_xcit import create_model, load_backbone
from ssl_xcit.models.head import DINOHead
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
    head = DINOHead(128, 32, 16, 8).state_dict()
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
