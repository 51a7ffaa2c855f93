"""Pictures over training: they leave no trace in the run, a run that goes on has the same, and
trouble with them is none of the run's.
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import lightning
import numpy as np
import pytest
import torch
from commands import images, last_state, metrics, run, same
from overlays import close, overlaid
from PIL import Image
from scipy.stats import entropy
from test_channels import textbook
from tiny_run import LABELS, NO_LABELS, PICTURES, PLAIN, sharp_backbone

from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.eval.viz import attention, snapshots
from ssl_xcit.eval.viz.snapshots import FixedImage, Snapshots, aligned, moments_of
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.training.module import Pretraining

TIMES = ("images_per_second", "data_wait", "seconds")


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """The run, in the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/with"


@pytest.fixture
def interrupted(copy):
    """The same after 6 of 9 steps, with a damaged picture of a later one."""
    (copy / "summary.json").unlink()
    (copy / "checkpoints" / "step-000009.ckpt").unlink()
    (copy / "pictures" / "pca-0000009-1.jpg").write_bytes(b"damaged")


def index(name, home="."):
    return json.loads(Path(home, "runs", name, "pictures", "index.json").read_text())


def untimed(name):
    rows = metrics(f"runs/{name}")
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


def pictures(name, home="."):
    folder = Path(home, "runs", name, "pictures")
    return {f.name: f.read_bytes() for f in folder.glob("*.jpg")}


def test_no_trace_and_what_lies_in_the_folder(copy):
    assert run("pretrain", "name=without", *PLAIN, "callbacks.snapshots=null", NO_LABELS) == 0
    assert same(last_state("runs/with"), last_state("runs/without"))
    assert untimed("with") == untimed("without")
    assert not Path("runs/without/pictures").exists()

    content = index("with")
    assert [m["step"] for m in content["moments"]] == [0, 3, 6, 9]
    assert len(content["images"]) == 3
    named = {image["file"] for image in content["images"]}
    for moment in content["moments"]:
        assert moment["attention"] == [f"attention-{moment['step']:07d}-{i}.jpg" for i in range(3)]
        assert moment["pca"] == [f"pca-{moment['step']:07d}-{i}.jpg" for i in range(3)]
        assert 0 < moment["seconds"] < 60
        named |= {*moment["attention"], *moment["pca"]}
    folder = Path("runs/with/pictures")
    assert {f.name for f in folder.iterdir()} == named | {"index.json"}
    assert {Image.open(folder / name).size for name in named} == {(64, 40)}

    # the last moment, computed from the run's last checkpoint without any of these functions
    backbone = load_backbone("runs/with")
    entropies, inputs = [], []
    backbone.blocks[0].attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for image, drawn in zip(content["images"], content["moments"][-1]["attention"], strict=True):
        assert Path(image["name"]).parent.name == image["label"]  # the photograph is the class
        original = Image.open(image["name"]).resize((64, 40), Image.Resampling.BICUBIC)
        pixels = np.array(original)
        kept = np.asarray(Image.open(folder / image["file"]), float)
        assert np.abs(kept - pixels).mean() < 6
        x = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            mean = backbone.attention(x)[0].mean(0).double().numpy()
        rows = textbook(backbone.blocks[0].attn, inputs[-1][0].double().numpy())
        entropies.append(entropy(rows, axis=-1).mean() / math.log(16))
        got = np.asarray(Image.open(folder / drawn), float)
        close(got[None], overlaid(pixels[None], mean[None]), 8.0)
    told = content["moments"][-1]["entropy"]
    assert told == pytest.approx([np.mean(entropies)], abs=1e-4)


def test_a_run_that_goes_on_has_the_same_pictures(trained, interrupted, monkeypatch):
    counts, real = [], attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a: counts.append(len(a[1])) or real(*a))
    assert run("pretrain", "name=with", *PLAIN, *PICTURES, *LABELS) == 0
    assert counts == [3]  # one moment of three images
    assert pictures("with") == pictures("with", trained)
    whole, again = index("with", trained), index("with")
    for moment in (*whole["moments"], *again["moments"]):
        moment.pop("seconds")
    assert again == whole


def test_moments_of_another_plan_leave_nothing_behind(interrupted, capsys):
    more = ["callbacks.snapshots.images=2", "callbacks.snapshots.moments=10"]
    assert run("pretrain", "name=with", *PLAIN, *PICTURES, *more, *LABELS) == 0
    assert "snapshot images changed; starting over from step 6" in capsys.readouterr().err
    content = index("with")
    assert [moment["step"] for moment in content["moments"]] == [6, 7, 8, 9]
    named = {n for m in content["moments"] for n in (*m["attention"], *m["pca"])}
    named |= {image["file"] for image in content["images"]}
    assert named <= set(pictures("with"))
    assert not [n for n in pictures("with") if "0000003" in n]


def test_unlabelled_images_of_any_shape_and_one_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(Path("odd"), 4, (40, 90))
    images(Path("odd/tall"), 3, (90, 40))
    Path("odd/9.png").write_bytes(b"no image")
    words = [*PLAIN, *PICTURES[1:], NO_LABELS, "data.root=odd", "callbacks.snapshots.images=8"]
    assert run("pretrain", "name=own", "data.max_bad_fraction=0.5", *words) == 0
    error = capsys.readouterr().err
    assert error.count("callbacks.snapshots: odd/9.png") == 1
    assert "training goes on" not in error  # nothing else went wrong
    content = index("own")
    assert len(content["images"]) == 7
    assert all(image["label"] is None for image in content["images"])
    last = content["moments"][-1]
    for kind in ("attention", "pca"):
        sizes = [Image.open(f"runs/own/pictures/{name}").size for name in last[kind]]
        assert sizes == [(64, 32)] * 4 + [(32, 64)] * 3


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw the moment at a step, as the callback does."""
    callback, rng = Snapshots(), np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 32, 48, 3), np.uint8)
    callback.images = [FixedImage(*one) for one in zip("xyz", [None] * 3, pixels, strict=True)]
    callback.steps, callback.folder = {3, 6}, tmp_path
    module = Mock(spec=Pretraining, device="cpu", teacher=Mock(backbone=sharp_backbone()))
    data = Mock(dataset=Mock(preprocess=RGB))
    monkeypatch.setattr(snapshots, "data_of", lambda _: data)

    def call(step):
        trainer = Mock(spec=lightning.Trainer, global_step=step, loggers=[])
        callback.on_train_batch_end(trainer, module)
        return [moment["step"] for moment in callback.done]

    return call


def test_a_disk_that_is_full_for_a_while_costs_a_moment(draw, tmp_path, monkeypatch, caplog):
    real, calls = snapshots.write_jpeg, itertools.count()

    def full(picture, path):
        if "0000003" in path.name and next(calls) == 4:
            raise OSError(28, "No space left on device")
        real(picture, path)

    monkeypatch.setattr(snapshots, "write_jpeg", full)
    assert draw(3) == []
    assert not list(tmp_path.iterdir())
    assert draw(6) == [6]
    assert caplog.text.count("No space left on device; some of") == 1


def test_memory_that_is_not_there_is_said_once(draw, monkeypatch, caplog):
    monkeypatch.setattr(attention, "forward", Mock(side_effect=torch.OutOfMemoryError("CUDA")))
    assert draw(3) == draw(6) == []
    assert caplog.text.count("callbacks.snapshots: CUDA") == 1


def test_wandb_gets_a_sheet_at_each_moment(trained):
    sheets = sorted((trained / "runs/with/wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(sheets) == 4
    assert {s.name.split("_")[0] for s in sheets} == {"pictures"}
    assert min(Image.open(sheets[0]).size) > 3 * 64


def test_only_rank_zero_looks():
    callback = Snapshots()
    trainer = Mock(spec=lightning.Trainer, is_global_zero=False, global_step=0)
    module = Mock(spec=lightning.LightningModule)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert not trainer.method_calls
    assert not module.method_calls


def test_moments():
    assert moments_of(8, 700) == [0, 100, 200, 300, 400, 500, 600, 700]
    assert moments_of(8, 3) == [0, 1, 2, 3]
    assert moments_of(2, 46) == [0, 46]
    assert moments_of(8, -1) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_components_keep_their_colours(seed):
    rng = np.random.default_rng(seed)
    before = torch.from_numpy(rng.normal(size=(500, 3)) * [3, 2, 1])
    order, signs = rng.permutation(3), rng.choice([-1.0, 1.0], 3)
    turned = before[:, order] * torch.from_numpy(signs) * 7 + 5
    noisy = turned + torch.from_numpy(rng.normal(size=(500, 3)))
    found = aligned(noisy, before)

    def fit(columns):
        return sum(np.corrcoef(columns[:, i], before[:, i])[0, 1] for i in range(3))

    best = max(
        fit(noisy.numpy()[:, list(p)] * np.array(s))
        for p in itertools.permutations(range(3))
        for s in itertools.product((-1, 1), repeat=3)
    )
    assert fit(found.numpy()) == pytest.approx(best)
    assert best > 2
    constant = torch.zeros(500, 3, dtype=torch.float64)
    assert torch.equal(aligned(noisy, constant).abs(), noisy.abs())
