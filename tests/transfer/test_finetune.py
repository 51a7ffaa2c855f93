"""The command `finetune`: runs end, go on bit for bit, and say what is wrong in one line."""

import json

import pytest
import torch
from commands import metrics, run
from toys import KINDS, data, words

from ssl_xcit import load_backbone
from ssl_xcit.models.checkpoint_files import read_checkpoint
from ssl_xcit.transfer.load import load_task


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {kind: data(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def state(folder, step):
    content = read_checkpoint(folder / f"checkpoints/step-{step:06d}.ckpt")
    moments = content["optimizer_states"][0]["state"]
    flat = {f"{i}.{k}": v for i, of in moments.items() for k, v in of.items()}
    return content["state_dict"] | flat


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_equals_one_that_did_not_stop(kind, roots, tmp_path, capsys):
    """Also with an average of the weights, accumulation and loader processes."""
    more = [
        "epochs=4" if kind == "classification" else "epochs=3", "ema=0.9", "trainer.accumulate=2"
    ]  # fmt: skip
    assert run(*words(kind, roots[kind], "name=whole", *more)) == 0
    whole = tmp_path / "runs/whole"
    steps = int(metrics(whole)[-1]["step"])
    assert run(*words(kind, roots[kind], "name=cut", *more)) == 0
    cut = tmp_path / "runs/cut"
    for file in (*cut.glob("checkpoints/step-*.ckpt"), cut / "summary.json"):
        if file.name != "step-000006.ckpt":
            file.unlink()
    assert len(list(cut.glob("checkpoints/step-*.ckpt"))) == (steps > 6)
    assert run(*words(kind, roots[kind], "name=cut", "num_workers=1", *more)) == 0
    one, two = state(whole, steps), state(cut, steps)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one if isinstance(one[key], torch.Tensor))
    results = [json.loads((f / "summary.json").read_text())["results"] for f in (whole, cut)]
    assert results[0] == results[1]
    assert kind in results[0]
    capsys.readouterr()
    assert run(*words(kind, roots[kind], "name=cut", *more)) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_loads_as_a_task_and_as_a_backbone(kind, roots, tmp_path):
    assert run(*words(kind, roots[kind], "name=x", "ema=0.5", "epochs=1")) == 0
    task = load_task(tmp_path / "runs/x")
    assert task.kind == kind
    assert not task.training
    raw = load_task(tmp_path / "runs/x", "student")
    pairs = zip(task.parameters(), raw.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    backbone = load_backbone(tmp_path / "runs/x")
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, task.backbone.state_dict()[key]), key
    # the next task starts from it
    other = "detection" if kind == "classification" else "classification"
    given = words(other, roots[other], "name=y", "ckpt=runs/x", "epochs=1", "drop_path=0.0")
    given = [w for w in given if not w.startswith("model")]
    assert run(*given) == 0


def test_weights_to_start_from_are_taken_and_frozen_parts_stay(roots, tmp_path):
    assert run(*words("segmentation", roots["segmentation"], "name=first", "epochs=1")) == 0
    kept = load_backbone(tmp_path / "runs/first").state_dict()
    given = words(
        "classification", roots["classification"], "name=head", "ckpt=runs/first", "freeze=head",
        "optim.warmup_start=1e-3",
    )  # fmt: skip
    assert run(*(w for w in given if not w.startswith("model"))) == 0
    head = load_backbone(tmp_path / "runs/head").state_dict()
    shared = [key for key in kept if not key.startswith("fpn")]
    assert all(torch.equal(kept[key], head[key]) for key in shared)
    given = [
        w.replace("name=head", "name=blocks").replace("freeze=head", "freeze=1") for w in given
    ]
    assert run(*(w for w in given if not w.startswith("model"))) == 0
    blocks = load_backbone(tmp_path / "runs/blocks").state_dict()
    moved = {key for key in shared if not torch.equal(kept[key], blocks[key])}
    assert {key.split(".")[0] for key in moved} == {
        "blocks", "cls_attn_blocks", "cls_token", "norm"
    }  # fmt: skip
    assert not [key for key in moved if key.startswith("blocks.0.")]


REFUSED = {
    "model=null": "ckpt=null trains from scratch, and then model=NAME is needed",
    "ckpt=nowhere.pth": "no such file",
    "batch_size=100": "is larger than the data",
    "freeze=9": "freeze=9: the backbone has 2 blocks",
    "freeze=tail": "freeze=tail must be",
    "ema=1.5": "ema=1.5 must be a number above 0 and below 1",
    "label_fraction=0": "label_fraction=0 must be",
    "repeats=0": "repeats=0 must be",
    "optim.layer_decay=2": "optim.layer_decay=2 must be",
    "optim.optimizer.lr_=1": "optim.optimizer",
    "preprocess.channels=1": "the backbone takes images of 3 channels",
    "task.mixup=-1": "task.mixup=-1 must be",
    "task.class_weights=[1]": "class_weights",
    "task.multi_label=true": "multi_label",
    "data.root=nowhere": "nowhere",
    "tusks=1": "tusks: no such setting",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_wrong_is_said_in_a_line_before_anything_is_written(word, roots, tmp_path, capsys):
    given = words("classification", roots["classification"], word)
    if word == "model=null":
        given = [w for w in given if not w.startswith("model")]
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert REFUSED[word] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("batch", "accumulate", "smallest"), [(1, 1, 1), (2, 2, 1), (5, 2, None), (5, 4, 1)]
)
def test_uper_net_needs_two_images_a_part(batch, accumulate, smallest, roots, tmp_path, capsys):
    """The last of 4 parts of 5 images has one."""
    sizes = [f"batch_size={batch}", f"trainer.accumulate={accumulate}", "epochs=0.2"]
    given = words("segmentation", roots["segmentation"], "task.head=upernet", *sizes)
    given += ["task.auxiliary_channels=16"]
    if smallest is None:
        assert run(*given, "name=x") == 0
        return
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert f"at least 2 images, and the smallest has {smallest}: set a larger batch_size" in error
    assert "task.head=semantic_fpn" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_test_images_that_cannot_be_read_are_counted(tmp_path, capsys):
    root = data("classification", tmp_path / "own")
    bad = root / "test/class-0/0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert run(*words("classification", root, "name=x", "epochs=0.5")) == 0
    line = f"1 of 4 test images could not be read and are left out, such as {bad}"
    assert line in capsys.readouterr().out
    folder = tmp_path / "runs/x"
    for file in ("evaluation.json", "summary.json"):
        left_out = json.loads((folder / file).read_text())["left_out"]
        assert (left_out["count"], left_out["of"]) == (1, 4)
        assert left_out["examples"][0]["image"] == str(bad)
    assert run("eval", f"ckpt={folder}", "num_workers=0", "device=cpu") == 0
    assert line in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["bad_images"]["classification"]["count"] == 1


def test_a_run_with_other_classes_or_settings_is_refused(roots, tmp_path, capsys):
    given = words("classification", roots["classification"], "name=x", "epochs=1")
    assert run(*given) == 0
    assert run(*given, "optim.lr=0.1") == 2
    assert "optim.lr" in capsys.readouterr().err
