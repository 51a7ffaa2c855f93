"""`ssl-xcit predict`: tables, pictures and files of tiny tasks against what the networks say."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from skimage.color import rgb2lab
from torch.nn.functional import interpolate

from ssl_xcit.data.folders import image_files
from ssl_xcit.data.sources import Files
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer import kinds
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.masks import runs_from_text, runs_of, runs_to_text
from ssl_xcit.transfer.detection.measure import Detections
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.drawing import (
    OPACITY,
    SMALLEST,
    class_colours,
    contact_sheet,
)
from ssl_xcit.transfer.evaluate import predictions
from ssl_xcit.transfer.load import load_task
from ssl_xcit.transfer.module import Transfer
from ssl_xcit.transfer.segmentation.data import segmentation_data
from ssl_xcit.transfer.segmentation.task import Segmentation
from ssl_xcit.transfer.task import Instances

SIDE = 32
NAMES = ("cat", "dog, wild", "ox")
STATISTICS = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.25, 0.2]}
KINDS = {
    "classification": (Classification, {"size": SIDE}),
    "segmentation": (Segmentation, {"channels": 8, "neck_channels": 8, "size": SIDE}),
    "detection": (
        Detection,
        {"side": SIDE, "longest": 64, "channels": 8, "box_channels": 16, "anchor_scale": 4.0,
         "test_candidates": 50, "proposals": 20, "score_threshold": 0.05, "max_detections": 7},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(folder, kind, **settings):
    """A task without training, as a finished run keeps it."""
    cls, own = KINDS[kind]
    torch.manual_seed(0)
    backbone = XCiT(16, 2, 2, 8, pyramid=kind != "classification")
    backbone.preprocess = {"channels": 3, **STATISTICS}
    task = cls(backbone, NAMES, **{**own, **settings}).eval()
    if kind == "classification":
        torch.nn.init.normal_(backbone.head.weight)
    for name, weight in task.named_parameters():  # masks of both values, classes of all kinds
        if "mask_fcn_logits" in name or "cls_score.weight" in name:
            torch.nn.init.normal_(weight, std=3)
    content = {"state_dict": {f"task.{k}": v for k, v in task.state_dict().items()}}
    guard = SimpleNamespace(save=lambda checkpoint: None)
    Transfer.on_save_checkpoint(SimpleNamespace(task=task, guard=guard), content)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints/step-000001.ckpt")
    return task


def make_images(folder, names, sizes=((SIDE, SIDE),)):
    """Images of noise with large blocks; their pixels by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for i, name in enumerate(names):
        height, width = sizes[i % len(sizes)]
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        made[name] = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
        Image.fromarray(made[name]).save(folder / name)
    return made


def predict(*words):
    return run("predict", "num_workers=0", *words)


def draw_prediction(pixels, prediction, names, kind, threshold=0.5, largest=800):
    draw = kinds.KINDS[kind].presentation.draw_prediction
    return draw(pixels, prediction, names, threshold, largest)


def draw_target(pixels, target, names, kind):
    return kinds.KINDS[kind].presentation.draw_target(pixels, target, names, 800)


def rows(file):
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return list(csv.DictReader(opened))


def normalised(pixels):
    mean, std = (torch.tensor(STATISTICS[k])[:, None, None] for k in ("mean", "std"))
    return ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]


# --- classification -----------------------------------------------------------------------------


def test_classes_and_their_probabilities(tmp_path, capsys):
    task = make_run(tmp_path / "run", "classification")
    pixels = make_images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    assert predict("ckpt=run", "images=in") == 0
    out = capsys.readouterr().out
    assert "3 images; images by class: " in out
    assert "in run/predict" in out
    table = rows("run/predict/predictions.csv")
    assert [row["path"] for row in table] == [f"in/{name}" for name in pixels]
    for row, image in zip(table, pixels.values(), strict=True):
        with torch.no_grad():
            logits = task.backbone.head(task.backbone(normalised(image)))[0]
        expected = sorted(zip(logits.softmax(0).tolist(), NAMES, strict=True), reverse=True)
        given = [(float(row[f"probability{i}"]), row[f"class{i}"]) for i in ("", "_2", "_3")]
        assert [name for _, name in given] == [name for _, name in expected]
        np.testing.assert_allclose([p for p, _ in given], [p for p, _ in expected], atol=2e-6)
    assert list(rows("run/predict/predictions.csv")[0]) == [
        "path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3",
    ]  # fmt: skip


def test_several_labels_are_listed_from_the_threshold_on(tmp_path):
    task = make_run(tmp_path / "run", "classification", multi_label=True)
    pixels = make_images(tmp_path / "in", [f"{i}.png" for i in range(6)])
    batch = torch.cat([normalised(image) for image in pixels.values()])
    with torch.no_grad():
        probabilities = task.backbone.head(task.backbone(batch)).sigmoid().numpy()
    some = np.sort(probabilities.ravel())
    threshold = float(some[8:10].mean())  # half of all reach it
    assert predict("ckpt=run", "images=in", f"threshold={threshold}", "max_pictures=0") == 0
    numbers = set()
    for row, p in zip(rows("run/predict/predictions.csv"), probabilities, strict=True):
        expected = {name for name, value in zip(NAMES, p, strict=True) if value >= threshold}
        assert set(filter(None, row["classes"].split(";"))) == expected
        numbers.add(len(expected))
    assert numbers != {0}
    assert numbers != {3}
    assert not (tmp_path / "run/predict/pictures").exists()


def test_published_classifiers_predict_too(tmp_path, capsys):
    torch.manual_seed(1)
    backbone = XCiT(16, 2, 2, 8, num_classes=4).eval()
    torch.nn.init.normal_(backbone.head.weight)
    torch.save({"model": backbone.state_dict()}, "published.pth")
    image = make_images(tmp_path / "in", ["a.png"])["a.png"]
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)).float()[None]
    with torch.no_grad():
        best = int(backbone.head(backbone(x)).argmax())
    assert predict("ckpt=published.pth", "images=in/a.png", f"size={SIDE}") == 0
    assert rows("predict/predictions.csv")[0]["class"] == str(best)
    (tmp_path / "names.txt").write_text("w\nx\nx\nz\n")  # ImageNet has names twice as well
    words = ["ckpt=published.pth", "images=in", "out=named", f"size={SIDE}"]
    assert predict(*words, "class_names=names.txt") == 0
    assert rows("named/predictions.csv")[0]["class"] == "wxxz"[best]
    assert load_task("published.pth").prepare.size == 224
    (tmp_path / "names.txt").write_text("w\nx\n")
    capsys.readouterr()
    assert predict(*words, "class_names=names.txt") == 2
    assert "class_names has 2 names, and published.pth 4 classes" in capsys.readouterr().err


# --- segmentation -------------------------------------------------------------------------------


def test_masks_are_the_likeliest_classes_and_can_be_read_as_data(tmp_path):
    task = make_run(tmp_path / "run", "segmentation")
    sizes = ((SIDE, SIDE), (SIDE, 64), (48, SIDE))
    pixels = make_images(tmp_path / "set/images", ["a.png", "b.png", "c.png"], sizes)
    words = ["ckpt=run", "images=set/images", "formats=masks", "out=set", "batch_size=2"]
    assert predict(*words) == 0
    data = segmentation_data(str(tmp_path / "set"), test_fraction=0.0).train
    assert tuple(data.class_names) == NAMES
    table = rows("set/predictions.csv")
    for i, image in enumerate(pixels.values()):
        with torch.no_grad():
            logits = task.head(task.backbone.pyramid(normalised(image)))
        size = image.shape[:2]
        full = interpolate(logits, size, mode="bilinear", align_corners=False)
        mask = full.argmax(1)[0].numpy()
        given = data.read_target(i, *size)
        assert (given == mask).mean() > 0.999
        for k, name in enumerate(NAMES):
            assert abs(float(table[i][name]) - (given == k).mean()) < 1e-6
    about = json.loads((tmp_path / "set/predict.json").read_text())
    assert about["classes"].keys() <= set(NAMES)
    assert abs(sum(about["classes"].values()) - 1) < 1e-4
    assert about["num_read"] == 3


# --- detection ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A folder with a detector and images, what it says of them, and what the command wrote."""
    home = tmp_path_factory.mktemp("detector")
    task = make_run(home / "run", "detection")
    make_images(home / "in", ["a.png", "b.png"], ((40, 56), (64, 48)))
    source = Files([str(home / "in/a.png"), str(home / "in/b.png")])
    made = [p.prediction for p in predictions(task, source, batch_size=1, num_workers=0)]
    threshold = float(np.sort(np.concatenate([d.scores for d in made]))[-6])
    words = [f"ckpt={home}/run", f"images={home}/in", f"out={home}/out", "formats=[coco,masks]"]
    assert predict(*words, f"threshold={threshold}") == 0
    return home, made, threshold


def test_coco_results_are_what_pycocotools_reads(detector):
    home, made, _ = detector
    truth = COCO(str(home / "out/images.json"))
    results = truth.loadRes(str(home / "out/predictions.json"))
    assert [image["file_name"] for image in truth.loadImgs([1, 2])] == ["a.png", "b.png"]
    assert [c["name"] for c in truth.loadCats(truth.getCatIds())] == list(NAMES)
    assert sum(len(d.scores) for d in made) == len(results.anns) > 6
    for i, detections in enumerate(made):
        found = results.loadAnns(results.getAnnIds(imgIds=[i + 1]))
        assert [a["category_id"] for a in found] == (detections.labels + 1).tolist()
        np.testing.assert_allclose([a["score"] for a in found], detections.scores, atol=1e-5)
        boxes = np.array([a["bbox"] for a in found])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, detections.boxes, atol=0.02)
        for annotation, mask in zip(found, detections.masks, strict=True):
            assert (results.annToMask(annotation) == mask).all()
    assert any(0.05 < np.mean(list(d.masks)) < 0.95 for d in made)


def test_tables_and_instance_masks_have_the_confident_objects(detector):
    home, made, threshold = detector
    objects = rows(home / "out/detections.csv")
    counts = rows(home / "out/predictions.csv")
    chosen = [int((d.scores >= threshold).sum()) for d in made]
    assert sum(chosen) == len(objects) == 6
    for row, name, detections, count in zip(counts, "ab", made, chosen, strict=True):
        assert int(row["objects"]) == count
        labels = [NAMES[k] for k in detections.labels[:count]]
        assert [int(row[n]) for n in NAMES] == [labels.count(n) for n in NAMES]
        own = [o for o in objects if o["path"] == row["path"]]
        assert [o["class"] for o in own] == labels
        assert [int(o["object"]) for o in own] == list(range(1, count + 1))
        assert [int(o["pixels"]) for o in own] == [int(m.sum()) for m in detections.masks[:count]]
        ids = np.asarray(Image.open(home / f"out/masks/{name}.png"))
        expected = np.zeros_like(ids)
        for i, mask in enumerate(detections.masks[:count]):
            expected[mask & (expected == 0)] = i + 1
        assert (ids == expected).all()
        assert ids.shape == detections.masks[0].shape


def test_a_threshold_below_the_run_s_own_finds_more(tmp_path):
    make_images(tmp_path / "in", ["a.png", "b.png"], ((40, 56), (64, 48)))
    own, tables, results = 0.06, [], []
    for name in ("low", "high"):
        make_run(tmp_path / name, "detection", score_threshold=own)
        assert predict(f"ckpt={name}", "images=in", "threshold=0.06", "formats=coco") == 0
        tables.append(rows(tmp_path / name / "predict/detections.csv"))
        results.append((tmp_path / name / "predict/predictions.json").read_text())
        own = float(np.median([float(row["score"]) for row in tables[0]]))
    assert tables[0] == tables[1]
    assert results[0] == results[1]
    assert min(float(row["score"]) for row in tables[0]) < own
    assert load_task(tmp_path / "high").settings["score_threshold"] == own


def test_runs_are_compressed_as_pycocotools_does():
    rng = np.random.default_rng(0)
    masks = [rng.random((37, 53)) < share for share in (0.0, 0.02, 0.5, 0.98, 1.0)]
    masks += [np.zeros((700, 900), bool)]
    masks[-1][100:600, 200:850] = True
    for mask in masks:
        text = runs_to_text(runs_of(mask))
        assert text == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert runs_from_text(text) == runs_of(mask)


def test_a_detector_of_boxes_has_no_masks(tmp_path, capsys):
    make_run(tmp_path / "run", "detection", masks=False)
    make_images(tmp_path / "in", ["a.png"])
    assert predict("ckpt=run", "images=in", "formats=masks") == 2
    assert "formats=masks: the network does boxes alone" in capsys.readouterr().err
    assert predict("ckpt=run", "images=in/a.png", "formats=coco", "threshold=0") == 0
    assert "segmentation" not in (tmp_path / "run/predict/predictions.json").read_text()
    assert rows("run/predict/detections.csv")[0]["pixels"] == ""


# --- images, files and messages -----------------------------------------------------------------


def test_bad_images_are_left_out_and_listed(tmp_path, capsys):
    make_run(tmp_path / "run", "classification")
    make_images(tmp_path / "in", ["a.png", "b.png", "z.png"])
    (tmp_path / "in/m.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:60])
    assert predict("ckpt=run", "images=in", "formats=[]") == 0
    assert "1 image could not be read and left out, such as in/m.png" in capsys.readouterr().out
    assert len(rows("run/predict/predictions.csv")) == 3
    about = json.loads((tmp_path / "run/predict/predict.json").read_text())
    assert list(about["bad"]) == ["in/m.png"]
    assert predict("ckpt=run", "images=in/m.png", "out=none") == 1
    assert "none of 1 images can be read, such as in/m.png" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "none").iterdir()} == {"predict.json"}


def test_names_that_collide_and_images_that_are_chosen(tmp_path, capsys):
    make_run(tmp_path / "run", "segmentation")
    make_images(tmp_path / "in/a", ["x.png", "y.png"])
    make_images(tmp_path / "in/b", ["x.png", "X.png"])
    odd = b"in/b/\xff [1].png".decode("utf-8", "surrogateescape")
    (tmp_path / odd).write_bytes((tmp_path / "in/a/x.png").read_bytes())
    assert predict("ckpt=run", "images=in", "formats=masks") == 0
    out = tmp_path / "run/predict"
    assert len({p.name.casefold() for p in (out / "pictures").iterdir()}) == 5
    assert len(list((out / "masks").iterdir())) == 5
    assert {row["path"] for row in rows(out / "predictions.csv")} == {
        "in/a/x.png", "in/a/y.png", "in/b/x.png", "in/b/X.png", odd,
    }  # fmt: skip
    words = ["ckpt=run", "images=['in/a/*.png',in/b]", "max_images=3", "max_pictures=1"]
    assert predict(*words) == 0
    assert "3 of 5 images are taken" in capsys.readouterr().err
    assert len(rows(out / "predictions.csv")) == 3
    assert len(list((out / "pictures").iterdir())) == 1  # those of the call before are gone
    assert not list((out / "masks").iterdir())


def test_results_are_no_images(tmp_path):
    make_run(tmp_path / "run", "classification")
    make_images(tmp_path / "in", ["a.png"])
    for _ in range(2):
        assert predict("ckpt=run", "images=in", "out=in/found") == 0
        assert len(rows("in/found/predictions.csv")) == 1
    assert list(image_files("in")) == ["a.png"]


def test_ctrl_c_leaves_whole_files(tmp_path, monkeypatch):
    make_run(tmp_path / "run", "classification")
    make_images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    assert predict("ckpt=run", "images=in/a.png") == 0
    before = (tmp_path / "run/predict/predictions.csv").read_bytes()

    kind = kinds.KINDS["classification"]

    def draw(*args, count=[]):  # noqa: B006
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return kind.presentation.draw_prediction(*args)

    interrupted = replace(kind, presentation=replace(kind.presentation, draw_prediction=draw))
    monkeypatch.setitem(kinds.KINDS, "classification", interrupted)
    assert predict("ckpt=run", "images=in") == 130
    out = tmp_path / "run/predict"
    assert (out / "predictions.csv").read_bytes() == before
    assert {p.name for p in out.iterdir()} == {
        "predictions.csv", "pictures", "overview.jpg", "predict.json",
    }  # fmt: skip
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["a.jpg", "b.jpg"]
    for picture in (out / "pictures").iterdir():
        Image.open(picture).load()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ckpt=backbone.pth", "images=in"],
         "backbone.pth is a backbone without a head: ssl-xcit finetune ckpt=backbone.pth"),
        (["ckpt=run", "images=in", "formats=[coco]"],
         "formats=coco: the network does classification, which has no such results"),
        (["ckpt=run", "images=in", "formats=[png]"], "formats=[png] must be some of coco, masks"),
        (["ckpt=run", "images=in", "class_names=in.txt"], "class_names=in.txt: no such file"),
        (["ckpt=run", "images=in", "size=64"], "size is for weights of others"),
        (["ckpt=run", "images=nowhere"], "images=nowhere: no file fits"),
        (["ckpt=run", "images=[]"], "images=[]: name files"),
        (["ckpt=run", "images=empty"], "images=empty: no images in it"),
        (["ckpt=run", "images=in", "device=cuda:77"], "device=cuda:77"),
        (["ckpt=run"], "images is needed"),
        (["ckpt=run", "images=in", "threshold=2"], "threshold=2 must be a number of at least 0"),
    ],
)  # fmt: skip
def test_messages(tmp_path, capsys, words, said):
    make_run(tmp_path / "run", "classification")
    make_images(tmp_path / "in", ["a.png"])
    (tmp_path / "empty").mkdir()
    torch.save(XCiT(16, 1, 2, 8).state_dict(), "backbone.pth")
    assert predict(*words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run/predict").exists()


# --- drawing ------------------------------------------------------------------------------------


def test_colours_differ():
    """By distances in CIELAB, in which 2.3 is just seen."""
    assert class_colours(150)[:24] == class_colours(24)
    lab = rgb2lab(np.array(class_colours(24), np.uint8))
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 999 * np.eye(24)
    assert apart.min() > 8
    assert apart[:12, :12].min() > 25


def test_masks_and_boxes_lie_where_the_objects_are():
    side = SMALLEST
    pixels = np.full((side, side, 3), 100, np.uint8)
    mask = np.zeros((2, side, side), bool)
    mask[0, 50:150, 60:200], mask[1, 250:300, 250:300] = True, True
    boxes = np.array([[60, 50, 200, 150], [250, 250, 300, 300]], np.float32)
    found = Detections(boxes, np.array([1, 0]), np.array([0.9, 0.2], np.float32), mask)
    colours = np.array(class_colours(3))
    target = Instances(boxes, np.array([1, 0]), mask, np.array([False, True]))
    for picture, second in (
        (draw_prediction(pixels, found, NAMES, "detection"), 100),  # below the threshold
        (draw_target(pixels, target, NAMES, "detection"), (100 + 128) / 2),  # a crowd is grey
    ):
        drawn = np.asarray(picture).astype(float)
        assert abs(drawn[100, 120] - (OPACITY * colours[1] + (1 - OPACITY) * 100)).max() <= 1
        assert (drawn[100, 60] == colours[1]).all()  # the box
        assert abs(drawn[280, 280] - second).max() <= 1
        assert (drawn[220, 220] == 100).all()


def test_classes_by_pixel_are_coloured_but_for_the_background():
    side = SMALLEST
    pixels = np.full((side, side, 1), 60, np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[:100], mask[-50:] = 1, 255
    names = ("Background", "cat")
    drawn = np.asarray(draw_target(pixels, mask, names, "segmentation")).astype(float)
    assert abs(drawn[50, 50] - (class_colours(2)[1] + np.full(3, 60.0)) / 2).max() <= 1
    assert (drawn[200, 200] == 60).all()
    assert abs(drawn[side - 20, 20] - (128 + 60) / 2).max() <= 1
    assert (np.asarray(draw_prediction(pixels, mask, names, "segmentation")) == drawn).all()


def test_pictures_have_a_limited_size():
    for height, width, largest, expected in (
        (3000, 1000, 500, (500, 167)), (50, 100, 800, (SMALLEST // 2, SMALLEST)),
        (50, 100, 200, (100, 200)), (1, 5000, 100, (1, 100)),
    ):  # fmt: skip
        pixels = np.zeros((height, width, 4), np.uint8)
        probabilities = np.array([0.2, 0.5, 0.3], np.float32)
        picture = draw_prediction(pixels, probabilities, NAMES, "classification", largest=largest)
        assert picture.width == expected[1]
        assert expected[0] < picture.height < expected[0] + 80
    truth = draw_target(pixels, np.array(2), NAMES, "classification")
    several = draw_target(pixels, np.array([1, 0, 1]), NAMES, "classification")
    nothing = draw_target(pixels, np.array([0, 0, 0]), NAMES, "classification")
    assert len({np.asarray(p).tobytes() for p in (truth, several, nothing)}) == 3
    assert contact_sheet([("a", truth)] * 5, columns=2, side=50).width == 6 + 2 * 56
