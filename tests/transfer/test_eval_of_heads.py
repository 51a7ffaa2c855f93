"""`ssl-xcit eval` of what has a head: runs of `ssl-xcit finetune`, published classifiers; their
backbones in the other commands.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from layouts import coco, ids, mask, picture
from PIL import Image
from sklearn.metrics import confusion_matrix
from timm.data import create_transform
from timm.models.xcit import Xcit
from toys import KINDS, data

from ssl_xcit import load_backbone
from ssl_xcit.eval.heads import named_test_data
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.evaluate import predictions
from ssl_xcit.transfer.load import load_task

QUICK = ["num_workers=0", "device=cpu"]
FEW = [*QUICK, "evaluation.cache=false", "evaluation.baselines=null",
       "evaluation.evaluators.linear=null", "evaluation.evaluators.logistic=null",
       "evaluation.evaluators.few_shot=null", "evaluation.evaluators.clustering=null",
       "evaluation.evaluators.retrieval=null", "evaluation.evaluators.knn.k=[1]"]  # fmt: skip


@pytest.fixture
def runs(transfer_runs, tmp_path, monkeypatch):
    """Copies, by the kind of task."""
    monkeypatch.chdir(tmp_path)
    return {k: Path(shutil.copytree(p, tmp_path / "runs" / k)) for k, p in transfer_runs.items()}


def content(file):
    return json.loads(Path(file).read_text())


def said(capsys, *command):
    """The one message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert run(*command) == 2, command
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("ssl-xcit: ")]
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_run_are_those_of_its_end(kind, runs, capsys):
    assert run("eval", f"ckpt={runs[kind]}", "per_class=true", *QUICK) == 0
    shown = capsys.readouterr().out
    assert kind in shown
    found, end = content(runs[kind] / "results.json"), content(runs[kind] / "summary.json")
    assert found["results"] == end["results"]
    assert found["intervals"] == end["intervals"]
    assert found["transfer"] == kind
    assert len(found["weights_sha256"]) == len(found["annotations_sha256"]) == 64
    assert "by class" in shown
    (by_class,) = found["by_class"].values()
    values = [value for value, _ in next(iter(by_class.values())).values()]
    metric = {"classification": "mean_class_accuracy", "segmentation": "miou"}.get(kind, "box_AP")
    assert np.mean(values) == pytest.approx(end["results"][kind][metric])
    assert next(iter(end["results"][kind])) in ("top1", "miou", "box_AP")
    assert "95 %" in (runs[kind] / "results.md").read_text()


def test_segmentation_of_other_images_is_that_of_scikit_learn(runs, tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / f"own/images/{i}.jpg", 50 + i)
        mask(tmp_path / f"own/masks/{i}.png", ids(50 + i))
    (tmp_path / "own/classes.txt").write_text("sky\ngrass\ncat\n")
    assert run("eval", f"ckpt={runs['segmentation']}", "data.root=own", *QUICK) == 0
    found = content(runs["segmentation"] / "results-own.json")
    assert found["test_images"] == 3
    task = load_task(runs["segmentation"])
    annotated, _ = named_test_data(task, {"root": "own"}, {})
    true, predicted = [], []
    for each in predictions(task, annotated.images, annotated, num_workers=0):
        true.append(each.target.ravel())
        predicted.append(each.prediction.ravel())
    counts = confusion_matrix(np.concatenate(true), np.concatenate(predicted), labels=range(3))
    hits = counts.diagonal()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)
    assert found["results"]["segmentation"]["miou"] == pytest.approx(iou.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_part_alone_without_some_of_the_classes(kind, runs, tmp_path, capsys):
    """And one that has another class is an error of one line."""
    own = tmp_path / "own"
    if kind == "classification":
        picture(own / "val/class-1/a.png")
        other = picture(own / "val/wasp/a.png")
    elif kind == "segmentation":
        picture(own / "val/images/a.jpg")
        mask(own / "val/masks/a.png", ids(values=(0, 2)))
        other = mask(own / "val/masks/a.png", ids(values=(0, 9)))
    else:
        coco(own, 0, 2, categories=((1, "dog"), (2, "wasp")))
        other = own / "annotations/instances_val2017.json"
        (own / "annotations/instances_train2017.json").unlink()
    words = ["eval", f"ckpt={runs[kind]}", "data.root=own", *QUICK]
    line = said(capsys, *words)
    assert ("values 9 are no class" if kind == "segmentation" else "(wasp)") in line
    if kind == "classification":
        shutil.rmtree(other.parent)
    elif kind == "segmentation":
        mask(other, ids(values=(0, 2)))
    else:
        text = content(other)
        text["annotations"] = [a for a in text["annotations"] if a["category_id"] == 1]
        other.write_text(json.dumps(text))
    assert run(*words) == 0
    found = content(runs[kind] / "results-own.json")
    assert found["test_images"] == (2 if kind == "detection" else 1)
    assert found["classes"] == (3 if kind == "segmentation" else 2)


def test_a_json_with_its_images_elsewhere(runs, tmp_path):
    coco(tmp_path / "own", 0, 2)
    (tmp_path / "own/val2017").rename(tmp_path / "pictures")
    file = "data.root=own/annotations/instances_val2017.json"
    words = [f"ckpt={runs['detection']}", file, "data.images=pictures", "out=x.json", *QUICK]
    assert run("eval", *words) == 0
    assert content("x.json")["test_images"] == 2


def test_two_runs_are_compared_image_by_image(runs, tmp_path, capsys):
    for kind in ("classification", "detection"):
        other = Path(shutil.copytree(runs[kind], tmp_path / f"runs/{kind}-2"))
        assert run("eval", f"ckpt=[{runs[kind]},{other}]", *QUICK) == 0
        shown = " ".join(capsys.readouterr().out.split())
        compared = content(runs[kind] / "comparison.json")
        assert list(compared["results"]) == [kind, f"{kind}-2"]
        one, two = compared["results"].values()
        assert one == two
        assert ("(paired)" in shown) == (kind == "classification")  # AP has no number an image
    assert compared.get("differences") in (None, {f"{kind}-2 less {kind}": {}})
    message = said(capsys, "eval", f"ckpt=[{runs['detection']},{runs['segmentation']}]", *QUICK)
    assert "different tasks" in message


def test_a_classifier_s_features_are_measured_as_every_backbone_s(runs, capsys):
    root = runs["classification"].parents[1] / "own"
    data("classification", root)
    words = ["eval_data.root=own/train", "eval_data.test_root=own/test", "eval_data.resize=32"]
    folder = runs["classification"]
    assert run("eval", f"ckpt={folder}", *words, "eval_data.size=32", *FEW) == 0
    assert list(content(folder / "results-folder.json")["results"]["pretrained"]) == ["knn_k1"]
    assert run("eval", f"ckpt={folder}", "evaluation=standard", *FEW) == 0  # on its own images
    assert content(folder / "results-standard.json")["size"] == 32
    assert not (folder / "results.json").exists()  # which is of its head


def noise(folder, classes, count, side):
    rng = np.random.default_rng(0)
    for k in range(classes):
        for i in range(count):
            file = folder / f"class-{k}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(coarse).resize((side + 9, side), Image.Resampling.BICUBIC).save(file)


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_a_published_classifier_gives_timm_s_logits_and_accuracy(tmp_path, monkeypatch, crop_ratio):
    """Random weights under the published names; images larger than the network's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    K, size = 7, 64
    model = Xcit(img_size=size, patch_size=8, embed_dim=128, depth=2, num_heads=4, num_classes=K,
                 eta=1.0, tokens_norm=True).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.3)
    torch.save({"model": from_timm_names(model.state_dict())}, "xcit.pth")
    noise(tmp_path / "own", K, 5, 150)
    transform = create_transform(
        (3, size, size), is_training=False, interpolation="bicubic", crop_pct=crop_ratio
    )
    assert run(
        "eval", "ckpt=xcit.pth", "evaluation=head", f"evaluation.size={size}",
        f"evaluation.crop_ratio={crop_ratio}", "eval_data.root=own", "eval_data.test_fraction=0",
        "out=results.json", *QUICK,
    ) == 0  # fmt: skip
    files = sorted(Path("own").rglob("*.png"))
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    with torch.no_grad():
        theirs = torch.cat([model(transform(Image.open(file))[None]) for file in files])
    task = Classification(load_backbone("xcit.pth"), [str(k) for k in range(K)], size, crop_ratio)
    inputs = [task.prepare(np.asarray(Image.open(file))) for file in files]
    ours = torch.from_numpy(np.stack(task.eval().predict(inputs, [(size, size)] * len(files))))
    torch.testing.assert_close(ours.log(), theirs.log_softmax(1), atol=1e-5, rtol=1e-5)
    best = theirs.topk(5).indices
    found = content("results.json")["results"]["pretrained"]
    hits = best == labels[:, None]
    assert found["top1"] == pytest.approx(100 * hits[:, 0].float().mean().item(), abs=1e-5)
    assert found["top5"] == pytest.approx(100 * hits.any(1).float().mean().item(), abs=1e-5)
    assert 0 < found["top1"] < found["top5"]
    assert content("results.json")["protocol"]["crop_ratio"] == crop_ratio


def test_messages(runs, tmp_path, capsys):
    noise(tmp_path / "own", 3, 2, 32)
    on_own = ["eval_data.root=own", "eval_data.test_fraction=0", "evaluation.size=32"]
    ckpt = f"ckpt={runs['classification']}"
    message = said(capsys, "eval", ckpt, "evaluation=head", *on_own, *QUICK)
    assert "has 3 classes" in message
    assert "has 2" in message
    dense = f"ckpt={runs['segmentation']}"
    message = said(capsys, "eval", dense, "evaluation=head", *on_own, *QUICK)
    assert "have no classifier; ssl-xcit finetune ckpt=... trains one" in message
    message = said(capsys, "eval", ckpt, "data.root=own", *QUICK)
    assert "3 (class-0, class-1, class-2), and the head 2 (class-0, class-1)" in message
    assert "no such setting" in said(capsys, "eval", ckpt, "data.root=own", "data.layout=voc")
    assert "no such folder" in said(capsys, "eval", dense, "data.root=gone", *QUICK)
    message = said(capsys, "eval", ckpt, "evaluation=standard", "data.root=own", *QUICK)
    assert "eval_data.root=DIR" in message
    coco(tmp_path / "birds", 1, 2, categories=((1, "bird"), (2, "dog")))
    message = said(capsys, "eval", f"ckpt={runs['detection']}", "data.root=birds", *QUICK)
    assert "2 (bird, dog), and the head 2 (cat, dog)" in message
    shutil.rmtree(tmp_path / "runs/detection/checkpoints")
    assert run("eval", f"ckpt={runs['detection']}", *QUICK) == 2


def test_nothing_that_a_run_s_file_names_is_made(runs, tmp_path, capsys):
    file = runs["classification"] / "run.json"
    record = content(file)
    node = "{_target_: os.mkdir, path: made}"
    for word in (f"data.source={node}", f"data.root={node}", "data.root=${oc.env:HOME}"):
        changed = {**record, "overrides": [*record["overrides"], word]}
        file.write_text(json.dumps(changed))
        assert run("eval", f"ckpt={runs['classification']}", "out=x.json", *QUICK) == 0
    assert not (tmp_path / "made").exists()


def test_other_commands_take_the_backbone(runs, capsys):
    """Of a dense task it has the layers of its pyramid; of a classifier the images have classes."""
    picture(Path("pictures/a.png"), 1)
    picture(Path("pictures/b.png"), 2)
    dense = [f"ckpt={runs['segmentation']}", "device=cpu"]
    assert "pyramid" in load_backbone(runs["segmentation"]).architecture
    for words in (
        ["visualize", *dense, "num_workers=0", "kinds=[neighbours]", "cache=false", "out=near"],
        ["embed", *dense, "num_workers=0", "data.root=pictures", "out=f.npy"],
        ["search", *dense, "index=f.npy", "image=pictures/a.png", "out=found.json"],
        ["atlas", *dense, "num_workers=0", "cache=false", "out=atlas.html"],
        ["export", dense[0], "out=exported", "format=safetensors", "eval_data=none"],
    ):
        assert run(*words) == 0, words
    shown = capsys.readouterr().out
    assert f"the 5 nearest of 6 images (training images of {runs['segmentation']})" in shown
    assert "2 images, short side 64, central 64 x 64" in shown
    assert np.load("f.npy").shape == (2, 32)
    exported, run_s = (load_backbone(f) for f in ("exported.safetensors", runs["segmentation"]))
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(exported(image), run_s(image))
    words = [f"ckpt={runs['classification']}", *QUICK, "kinds=[neighbours]", "cache=false"]
    assert run("visualize", *words, "out=classes") == 0
    assert "are of the query's class" in capsys.readouterr().out
