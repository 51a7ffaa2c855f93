"""Pictures over training: they leave no trace in the run, a run that goes on has the same, and
trouble with them is none of the run's.
"""

import itertools
import json
import math
from pathlib import Path
from unittest.mock import Mock

import lightning
import numpy as np
import pytest
import torch
from commands import NO_ONLINE, images, metrics, run, same
from PIL import Image
from ssl_xcit.eval.views import attention, snapshots
from ssl_xcit.eval.views.pictures import ANCHORS
from ssl_xcit.eval.views.snapshots import Snapshots, aligned, moments_of

from ssl_xcit.data.decode import RGB
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import load_backbone

DROPPED = ("evaluation", "callbacks.snapshots", "epochs", "callbacks.online")
PLAIN = [w for w in NO_ONLINE if not w.startswith(DROPPED)]
PLAIN += ["~callbacks.online", "model=xcit_micro_4_p8", "data=folder", "data.root=own", "epochs=3"]
NO_LABELS = "eval_data=none"
LABELS = ["eval_data=folder", "eval_data.root=own", "evaluation.evaluators.knn.k=[1]",
          "evaluation.baselines=null"]  # fmt: skip
LABELS += [
    f"evaluation.evaluators.{name}=null"
    for name in ("linear", "few_shot", "logistic", "clustering", "retrieval")
]
PICTURES = ["callbacks.snapshots.images=3", "callbacks.snapshots.moments=4",
            "callbacks.snapshots.size=64"]  # fmt: skip
WITH = [*PLAIN, *PICTURES, NO_LABELS]
TIMES = ("images_per_second", "data_wait", "seconds")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """24 windows of two photographs: 9 steps of 8 images."""
    monkeypatch.chdir(tmp_path)
    for name, file in photographs():
        if name in ("astronaut", "coffee"):
            Path("own", name).mkdir(parents=True)
            picture = Image.open(file).convert("RGB").resize((384, 288))
            for i in range(12):
                left, top = i % 4 * 96, i // 4 * 96
                picture.crop((left, top, left + 96, top + 64)).save(f"own/{name}/{i:02d}.png")


def index(name):
    return json.loads(Path("runs", name, "pictures", "index.json").read_text())


def weights(name):
    newest = max(Path("runs", name, "checkpoints").glob("step-*.ckpt"))
    content = torch.load(newest, weights_only=True)
    return content["state_dict"], content["optimizer_states"]


def untimed(name):
    rows = metrics(f"runs/{name}")
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


def pictures(name):
    folder = Path("runs", name, "pictures")
    return {f.name: f.read_bytes() for f in folder.glob("*.jpg")}


def test_no_trace_and_what_lies_in_the_folder():
    assert run("pretrain", "name=with", *PLAIN, *PICTURES, *LABELS) == 0
    assert run("pretrain", "name=without", *PLAIN, "callbacks.snapshots=null", NO_LABELS) == 0
    assert same(weights("with"), weights("without"))
    assert untimed("with") == untimed("without")
    assert not Path("runs/without/pictures").exists()

    content = index("with")
    assert [one["step"] for one in content["moments"]] == [0, 3, 6, 9]
    assert len(content["images"]) == 3
    named = {one["file"] for one in content["images"]}
    for moment in content["moments"]:
        assert moment["attention"] == [f"attention-{moment['step']:07d}-{i}.jpg" for i in range(3)]
        assert moment["pca"] == [f"pca-{moment['step']:07d}-{i}.jpg" for i in range(3)]
        assert 0 < moment["seconds"] < 60
        named |= {*moment["attention"], *moment["pca"]}
    folder = Path("runs/with/pictures")
    assert {f.name for f in folder.iterdir()} == named | {"index.json"}
    assert {Image.open(folder / name).size for name in named} == {(64, 40)}
    for one in content["images"]:
        assert Path(one["name"]).parent.name == one["label"]  # the photograph is the class
        original = Image.open(one["name"]).resize((64, 40), Image.Resampling.BICUBIC)
        shown = np.asarray(Image.open(folder / one["file"]), float)
        assert np.abs(shown - np.asarray(original)).mean() < 6

    # the last moment, computed from the run's last checkpoint without any of these functions
    backbone = load_backbone("runs/with")
    entropies = []
    for number, one in enumerate(content["images"]):
        original = Image.open(one["name"]).resize((64, 40), Image.Resampling.BICUBIC)
        pixels = np.asarray(original)
        x = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], RGB)
        inputs = []
        hook = backbone.blocks[0].attn.register_forward_pre_hook(
            lambda _, args, kept=inputs: kept.append(args[0])
        )
        with torch.no_grad():
            mean = backbone.attention(x)[0].mean(0).double().numpy()
            attn, tokens = backbone.blocks[0].attn, inputs[0][0].double()
            qkv = tokens @ attn.qkv.weight.double().T + attn.qkv.bias.double()
            q, k, _ = qkv.view(len(tokens), 3, 2, 16).permute(1, 2, 3, 0)
            cosine = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
            rows = (cosine * attn.temperature.double()).softmax(-1)
        hook.remove()
        entropies.append((-(rows * rows.log()).sum(-1).mean() / math.log(16)).item())
        scaled = (mean - mean.min()) / (np.quantile(mean, 0.995) - mean.min())
        places = np.linspace(0, 1, len(ANCHORS))
        colour = [np.interp(scaled.clip(0, 1), places, c) for c in zip(*ANCHORS, strict=True)]
        grey = pixels @ [0.299, 0.587, 0.114]
        name = content["moments"][-1]["attention"][number]
        got = np.asarray(Image.open(folder / name), float)
        patches = got.reshape(5, 8, 8, 8, 3).mean((1, 3))
        expected = (
            0.65 * np.stack(colour, -1) + 0.35 * grey.reshape(5, 8, 8, 8).mean((1, 3))[..., None]
        )
        difference = np.abs(patches - expected)
        assert np.median(difference) < 8, difference  # interpolated between patches, and a JPEG
        assert np.corrcoef(patches.ravel(), expected.ravel())[0, 1] > 0.95
    told = content["moments"][-1]["entropy"]
    assert told == pytest.approx([np.mean(entropies)], abs=1e-4)


def test_a_run_that_goes_on_has_the_same_pictures():
    assert run("pretrain", "name=run", *WITH) == 0
    before, whole = pictures("run"), index("run")
    folder = Path("runs/run")
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-000009.ckpt").unlink()  # it goes on from 6
    (folder / "pictures" / "pca-0000009-1.jpg").write_bytes(b"damaged")
    looked = []
    real = attention.look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "look", lambda *a: looked.append(len(a[1])) or real(*a))
        assert run("pretrain", "name=run", *WITH) == 0
    assert looked == [3]  # one moment of three images
    assert pictures("run") == before
    again = index("run")
    for one in (*whole["moments"], *again["moments"]):
        one.pop("seconds")
    assert again == whole


def test_moments_of_another_plan_leave_nothing_behind():
    assert run("pretrain", "name=run", *WITH) == 0
    folder = Path("runs/run")
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-000009.ckpt").unlink()
    more = [w.replace("moments=4", "moments=10").replace("images=3", "images=2") for w in WITH]
    assert run("pretrain", "name=run", *more) == 0
    content = index("run")
    assert [one["step"] for one in content["moments"]] == [6, 7, 8, 9]  # of other images: anew
    named = {n for one in content["moments"] for n in (*one["attention"], *one["pca"])}
    named |= {one["file"] for one in content["images"]}
    assert named <= set(pictures("run"))
    assert not [n for n in pictures("run") if "0000003" in n]


def test_unlabelled_images_of_any_shape_and_one_that_cannot_be_read(capsys):
    images(Path("odd"), 4, (40, 90))
    images(Path("odd/tall"), 3, (90, 40))
    Path("odd/9.png").write_bytes(b"no image")
    words = [*PLAIN, *PICTURES[1:], NO_LABELS, "data.root=odd", "callbacks.snapshots.images=8"]
    assert run("pretrain", "name=own", "data.max_bad_fraction=0.5", *words) == 0
    error = capsys.readouterr().err
    assert error.count("callbacks.snapshots: odd/9.png") == 1
    content = index("own")
    assert len(content["images"]) == 7
    assert all(one["label"] is None for one in content["images"])
    last = content["moments"][-1]
    for kind in ("attention", "pca"):
        sizes = [Image.open(f"runs/own/pictures/{name}").size for name in last[kind]]
        assert sizes == [(64, 32)] * 4 + [(32, 64)] * 3


def test_a_disk_that_is_full_for_a_while_costs_a_moment(monkeypatch, capsys):
    real, calls = snapshots.write_jpeg, itertools.count()

    def full(picture, path):
        if "0000003" in path.name and next(calls) == 4:
            raise OSError(28, "No space left on device")
        real(picture, path)

    monkeypatch.setattr(snapshots, "write_jpeg", full)
    assert run("pretrain", "name=full", *WITH) == 0
    assert capsys.readouterr().err.count("No space left on device; some of") == 1
    assert [one["step"] for one in index("full")["moments"]] == [0, 6, 9]
    assert not [name for name in pictures("full") if "0000003" in name]


def test_memory_that_is_not_there_is_said_once(monkeypatch, capsys):
    def look(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "look", look)
    assert run("pretrain", "name=tight", *WITH) == 0
    assert capsys.readouterr().err.count("out of memory") == 1
    assert index("tight")["moments"] == []


def test_wandb_gets_a_sheet_at_each_moment():
    assert run("pretrain", "name=w", "logger=wandb", *WITH) == 0
    sheets = sorted(Path("runs/w/wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(sheets) == 4
    assert {s.name.split("_")[0] for s in sheets} == {"pictures"}
    width, height = Image.open(sheets[0]).size
    assert width > 3 * 64
    assert height > 3 * 64


def test_only_rank_zero_looks():
    callback = Snapshots()
    trainer = Mock(spec=lightning.Trainer, is_global_zero=False, global_step=0)
    module = Mock(spec=lightning.LightningModule)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert not trainer.method_calls
    assert not module.method_calls
    assert list(Path().iterdir()) == [Path("own")]


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


@pytest.mark.parametrize("options", [{"images": 0}, {"moments": 1}, {"size": 8}, {"moments": True}])
def test_bad_settings(options):
    with pytest.raises(UserError, match=rf"callbacks\.snapshots\.{next(iter(options))}="):
        Snapshots(**options)
