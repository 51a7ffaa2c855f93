"""Exports of fine-tuned networks, in the tools that they are for, against torch.

Optimising a graph is half of the time that the exporter of ONNX takes, and onnxruntime does it too:
here it is left out, but in the slow tests.
"""

import contextlib
import io
import json
from functools import partial

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from commands import images, run, same
from PIL import Image
from torch import nn
from torchvision.ops import batched_nms

from ssl_xcit import load_backbone
from ssl_xcit.data.preprocess import normalise, of_weights, resize_center_crop
from ssl_xcit.errors import RunFailed
from ssl_xcit.export import huggingface, networks
from ssl_xcit.export.comparison import compare_objects
from ssl_xcit.export.description import Weights
from ssl_xcit.export.safetensors_files import timm_arguments
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.load import load_task
from ssl_xcit.transfer.segmentation.task import Segmentation

NAMES = {
    "classification": ["a", "b"],
    "segmentation": ["sky", "grass", "cat"],
    "detection": ["cup", "Äpfel, rot", "cat"],
}
PREPROCESS = {"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
SIZE = (64, 96)  # of the detector's images


def network(kind, **more):
    """A task with random weights that are far from flat."""
    torch.manual_seed(0)
    backbone = XCiT(32, 1, 2, patch_size=8, pyramid=kind != "classification")
    backbone.preprocess = dict(PREPROCESS)
    if kind == "classification":
        task = Classification(backbone, NAMES[kind], size=32, crop_ratio=0.8, **more)
        task.backbone.head.weight.data.normal_()
    elif kind == "segmentation":
        task = Segmentation(backbone, NAMES[kind], channels=8, size=64, **more)
        task.head.classifier.conv.weight.data.normal_()
    else:
        task = Detection(
            backbone, NAMES[kind], side=64, longest=90, channels=16, box_channels=16,
            anchor_scale=4, proposals=30, **more,
        )  # fmt: skip
        heads = task.network.roi_heads
        heads.box_predictor.cls_score.weight.data.normal_(std=3)
        heads.box_predictor.bbox_pred.weight.data.normal_()
        if task.masks:
            heads.mask_predictor.mask_fcn_logits.weight.data.normal_()
    for layer in task.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 2)
    return task.eval()


def save(task, folder):
    """A run folder with this task, as training leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    content = {
        "state_dict": {f"task.{key}": value for key, value in task.state_dict().items()},
        "architecture": task.backbone.architecture,
        "preprocess": task.backbone.preprocess,
        "transfer": {
            "kind": task.kind, "class_names": list(task.class_names), "settings": task.settings,
        },
    }  # fmt: skip
    torch.save(content, folder / "checkpoints/step-000005.ckpt")
    summary = {
        "results": {task.kind: {"top1": 75.0}}, "data": "pets", "last": {"step": 5.0},
        "intervals": {task.kind: {"top1": [70.0, 80.0]}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def exported(task, folder, *words):
    """Output of the command, and the folder of files."""
    save(task, folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run("export", f"ckpt={folder}", *words) == 0
    return output.getvalue(), folder / "export"


@pytest.fixture(scope="module", autouse=True)
def shapes_of_symbols():
    """Exporters trace with symbols for numbers, which jaxtyping would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def classifier(home, cache, shapes_of_symbols):
    """With test images that its files are measured on."""
    for part, count in (("train", 2), ("test", 9)):
        for label in "ab":
            images(home / "data" / part / label, count + (label == "b"))
    return exported(
        network("classification"), home / "classes",
        "format=[safetensors,timm,huggingface,bf16]", "eval_data=folder",
        f"eval_data.root={home}/data/train", f"eval_data.test_root={home}/data/test",
        "eval_data.resize=40", "eval_data.size=32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def not_optimised(shapes_of_symbols):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))
        yield


@pytest.fixture(scope="module")
def segmenter(home, cache, shapes_of_symbols):
    task = network("segmentation", inference="slide", crop=64, stride=40)
    return exported(task, home / "pixels", "format=[program,timm]")


@pytest.fixture(scope="module")
def detector(home, cache, not_optimised):
    return exported(network("detection"), home / "objects", "format=onnx")


def metadata(file):
    return {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props
            if not entry.key.startswith("onnx.")}  # fmt: skip


def by_onnx(file, x, **more):
    return onnxruntime.InferenceSession(file).run(None, {"images": x.numpy(), **more})


def axes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values}  # fmt: skip


def test_a_classifier_keeps_its_head_in_all_formats(classifier, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForImageClassification

    (output, folder), task = classifier, network("classification")
    assert "classification of 2 classes" in output
    pixels = torch.randint(0, 256, (3, 3, 45, 70), dtype=torch.uint8)
    x = normalise(pixels, of_weights(PREPROCESS))
    expected = np.stack(task.predict(pixels, [(45, 70)] * 3))
    assert np.ptp(expected) > 0.3
    options = {"num_classes": 2, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    of_timm = timm.create_model(
        "xcit_nano_12_p16_224", tokens_norm=True, eta=1.0, **options,
        checkpoint_path=folder / "classes-timm.safetensors",
    ).eval()  # fmt: skip
    card = folder / "classes-huggingface"
    of_hub = AutoModelForImageClassification.from_pretrained(card).eval()
    ours = load_backbone(folder / "classes.safetensors")
    networks = {
        "timm": of_timm, "folder": timm.create_model(f"local-dir:{card}", pretrained=True).eval(),
        "transformers": lambda x: of_hub(x).logits, "ours": lambda x: ours.head(ours(x)),
    }  # fmt: skip
    with torch.no_grad():
        for name, other in networks.items():
            assert np.abs(other(x).softmax(1).numpy() - expected).max() < 1e-5, name
    assert of_hub.config.id2label == {0: "a", 1: "b"}
    text = (card / "README.md").read_text()
    assert "pipeline_tag: image-classification" in text
    assert "one of 2 classes" in text
    assert "self-supervised" not in text
    assert "Test images of pets, in %" in text
    assert "75.0 | 70.0–80.0" in text
    for file in ("classes-timm.json", "classes.json"):
        about = json.loads((folder / file).read_text())
        assert (about["task"], about["class_names"]) == ("classification", ["a", "b"])
        assert about["architecture"]["num_classes"] == 2


@pytest.mark.parametrize("several", [False, True])
def test_transformers_is_told_of_several_labels(several):
    """Its pipeline takes the softmax of one label, the sigmoid of several."""
    task = network("classification", multi_label=several)
    weights = Weights(task.backbone, "x", {}, 32, 32, task=task)
    name, arguments = timm_arguments(weights)
    kind = huggingface.config(weights, name, arguments).get("problem_type")
    assert kind == ("multi_label_classification" if several else None)
    words = "any of 2 classes" if several else "one of 2 classes"
    assert words in huggingface.card(weights, "x", None)


def test_a_classifier_loads_again_as_the_task(classifier):
    task = load_task(classifier[1] / "classes.safetensors", class_names=["a", "b"], size=32)
    assert same(task.backbone.state_dict(), network("classification").backbone.state_dict())


def test_rounded_classifiers_are_measured_by_their_own_accuracy(classifier):
    output, folder = classifier
    files = sorted((folder.parent.parent / "data/test").rglob("*.png"))
    task, right = network("classification"), 0
    for file in files:
        pixels = resize_center_crop(np.asarray(Image.open(file)), 40, 32)
        (predicted,) = task.predict([torch.tensor(pixels).movedim(-1, 0)], [(48, 48)])
        right += "ab"[predicted.argmax()] == file.parent.name
    accuracy = 100 * right / len(files)
    about = json.loads((folder / "classes-bf16.json").read_text())["bf16"]["accuracy"]
    assert about["float32"] == pytest.approx(accuracy)
    assert about["bf16"] == pytest.approx(accuracy, abs=100 / len(files) + 0.1)
    assert f"accuracy in %: float32 {accuracy:.1f}, bf16 " in output


def test_features_of_a_classifier_without_its_head(home, classifier, capsys):
    assert run("export", f"ckpt={home / 'classes'}", "format=timm", "head=false", "out=x") == 0
    assert "its classifier is left out" in capsys.readouterr().out
    assert not [k for k in load_backbone("x-timm.safetensors").state_dict() if "head" in k]


def test_a_segmenter_of_any_size_as_a_program(segmenter):
    (output, folder), task = segmenter, network("segmentation")
    program = torch.export.load(folder / "pixels.pt2").module()
    for shape in ((1, 3, 64, 64), (3, 3, 70, 101), (2, 3, 96, 58)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            logits, expected = (f(task.normalised(pixels)) for f in (program, task))
        assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        classes = np.stack(task.predict(list(pixels), [shape[2:]] * len(pixels)))
        assert len(np.unique(classes)) > 1
        assert (logits.argmax(1).numpy() == classes).mean() > 0.999
    assert "largest difference of a logit of a pixel" in output
    assert "windows of 64 pixels every 40" in output


@pytest.mark.slow
def test_a_segmenter_of_any_size(tmp_path):
    task = network("segmentation", inference="slide", crop=64, stride=40)
    output, folder = exported(task, tmp_path / "pixels", "format=onnx")
    task = network("segmentation")
    file = folder / "pixels.onnx"
    model = onnx.load(file)
    assert axes(model.graph.input)["images"] == ["batch", 3, "height", "width"]
    assert axes(model.graph.output)["logits"] == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 64, 64), (3, 3, 70, 101), (1, 3, 33, 32), (2, 3, 96, 40)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        (logits,) = by_onnx(file, task.normalised(pixels))
        with torch.no_grad():
            expected = task(task.normalised(pixels)).numpy()
        assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())
        classes = np.stack(task.predict(list(pixels), [shape[2:]] * len(pixels)))
        assert (logits.argmax(1) == classes).mean() > 0.999
        assert len(np.unique(classes)) > 1
    about = json.loads((folder / "pixels.json").read_text())
    for known in (about, metadata(file)):
        assert (known["task"], known["class_names"]) == ("segmentation", NAMES["segmentation"])
        assert (known["mean"], known["size"]) == (PREPROCESS["mean"], 64)
        assert "windows of 64 pixels every 40" in known["note"]
    assert "largest difference of a logit of a pixel" in output


def test_dense_networks_are_backbones_in_timm(segmenter):
    output, folder = segmenter
    assert "the backbone alone, for there is no segmentation in such a file" in output
    loaded, own = (
        load_backbone(folder / "pixels-timm.safetensors"),
        network("segmentation").backbone,
    )
    state = {k: v for k, v in own.state_dict().items() if not k.startswith("fpn")}
    assert same(loaded.state_dict(), state)


@pytest.mark.parametrize("scale", [1, 2, 3, 6])
def test_pooling_of_symbolic_sizes_is_torchs(scale):
    pool = nn.AdaptiveAvgPool2d(scale)
    for height, width in ((1, 1), (2, 7), (6, 5), (13, 12), (24, 31)):
        x = torch.randn(2, 3, height, width)
        assert torch.allclose(networks.average_pool(pool, x), pool(x), atol=1e-6)


@pytest.mark.slow
def test_a_detector_finds_what_it_finds_in_torch(detector):
    (output, folder), task = detector, network("detection")
    file = folder / "objects.onnx"
    model = onnx.load(file)
    assert axes(model.graph.input)["images"] == [1, 3, *SIZE]
    assert axes(model.graph.output) == {
        "boxes": ["objects", 4], "labels": ["objects"], "scores": ["objects"],
        "masks": ["objects", 28, 28],
    }  # fmt: skip
    pixels = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    x = task.batch([pixels]).tensors
    boxes, labels, scores, masks = by_onnx(file, x)
    expected = task.predict([pixels], [SIZE])[0]
    assert len(scores) == len(expected.scores) > 5
    assert len(np.unique(labels)) > 1
    assert np.array_equal(labels, expected.labels)
    assert np.abs(boxes - expected.boxes).max() < 1e-5 * max(SIZE)
    assert np.abs(scores - expected.scores).max() < 1e-5
    with torch.no_grad():
        (raw,), _ = task.network(task.backbone.pyramid(x), task.batch([pixels]))
    assert np.abs(masks - raw["masks"].numpy()).max() < 1e-4
    for threshold in (0.0, 0.3, 1.0):  # 1: there is none
        few = by_onnx(file, x, score_threshold=np.array(threshold, np.float32))
        task.network.roi_heads.score_thresh = threshold
        assert len(few[2]) == len(task.predict([pixels], [SIZE])[0].scores)
    about = json.loads((folder / "objects.json").read_text())
    for known in (about, metadata(file)):
        assert (known["task"], known["class_names"]) == ("detection", NAMES["detection"])
        assert known["size"] == list(SIZE)
        assert "pad it at the right" in known["note"]
    assert "0 are found by one form only" in output


def test_non_maximum_suppression_on_a_plane_is_torchvisions():
    torch.manual_seed(0)
    corners, sides = torch.rand(600, 2) * 80, torch.rand(600, 2) * 40
    boxes, scores = torch.cat((corners, corners + sides), dim=1), torch.rand(600)
    for num_groups in (1, 2, 5, 7):
        groups = torch.randint(num_groups, (600,))
        kept = networks.nms_on_plane(121, num_groups, boxes, scores, groups, 0.4)
        assert torch.equal(kept, batched_nms(boxes, scores, groups, 0.4))
        assert 20 < len(kept) < 600


def test_a_detector_that_differs_is_not_exported():
    task = network("detection")
    weights = Weights(task.backbone, "x", {}, task=task)
    objects = networks.Objects(task, SIZE)

    def changed(**changes):
        def detect(images, threshold):
            result = dict(zip(objects.outputs, objects(images, threshold), strict=True))
            return tuple(changes.get(k, lambda t: t)(v) for k, v in result.items())

        return detect

    def check(detect):
        return compare_objects(weights, detect, objects, SIZE, 0.05)

    assert "0 are found by one form only" in check(changed())
    # the order of objects does not matter
    backwards = {name: lambda t: t.flip(0) for name in objects.outputs}
    assert "0 are found by one form only" in check(changed(**backwards))
    for wrong in (
        {"boxes": lambda t: t + 0.01}, {"labels": lambda t: t + 1}, {"scores": lambda t: t - 1e-4},
        {"masks": lambda t: 1 - t}, {name: lambda t: t[1:] for name in objects.outputs},
    ):  # fmt: skip
        with pytest.raises(RunFailed, match="found by one form only: nothing is exported"):
            check(changed(**wrong))
    with pytest.raises(RunFailed, match="not finite"):
        check(changed(scores=lambda t: t * float("nan")))


def test_a_detector_that_finds_nothing_is_compared_by_lower_scores():
    task = network("detection", masks=False)
    weights = Weights(task.backbone, "x", {}, task=task)
    objects = networks.Objects(task, SIZE)
    assert objects.outputs == ("boxes", "labels", "scores")
    words = compare_objects(weights, objects, objects, SIZE, 0.9999)
    assert "of scores above 0.09999" in words
    assert not words.startswith("of 0 objects")
    assert "masks" not in words


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("segmentation", ["format=int8"], "int8 rounds linear layers"),
        ("detection", ["format=int8"], "int8 rounds linear layers"),
        ("segmentation", ["format=onnx", "formats.onnx.patches=true"], "add head=false"),
        ("segmentation", ["format=onnx", "formats.onnx.size=[64,64]"], "size is of detectors"),
        ("detection", ["format=onnx", "formats.onnx.size=[60,64]"], "must be multiples of 32"),
        ("detection", ["format=onnx", "formats.onnx.size=[64]"], "[height,width]"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(kind, words, message, tmp_path, capsys):
    folder = save(network(kind), tmp_path / kind)
    assert run("export", f"ckpt={folder}", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(folder.glob("export/*"))


@pytest.mark.slow
def test_a_classifier_in_onnx_and_in_int8(tmp_path):
    task = network("classification")
    output, folder = exported(task, tmp_path / "classes", "format=[onnx,int8]", "eval_data=none")
    pixels = torch.randint(0, 256, (3, 3, 45, 70), dtype=torch.uint8)
    expected = np.stack(task.predict(pixels, [(45, 70)] * 3))
    for name, bound in (("classes", 1e-5), ("classes-int8", 0.1)):
        (logits,) = by_onnx(folder / f"{name}.onnx", normalise(pixels, of_weights(PREPROCESS)))
        assert np.abs(torch.from_numpy(logits).softmax(1).numpy() - expected).max() < bound
        about = metadata(folder / f"{name}.onnx")
        assert (about["class_names"], about["multi_label"]) == (["a", "b"], False)
        assert (about["resize"], about["size"], about["mean"]) == (40, 32, PREPROCESS["mean"])
        assert "softmax" in about["note"]
    assert "accuracy was not measured" in output


@pytest.mark.slow
@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_both_heads_of_segmentation_in_both_programs(head, tmp_path):
    task = network("segmentation", head=head)
    output, folder = exported(task, tmp_path / "x", "format=[onnx,program]")
    assert output.count("largest difference of a logit of a pixel") == 2
    program = torch.export.load(folder / "x.pt2").module()
    for shape in ((1, 3, 64, 64), (2, 3, 120, 77)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected, of_program = task(x), program(x)
        for other in (of_program, torch.from_numpy(by_onnx(folder / "x.onnx", x)[0])):
            assert (other - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
def test_a_detector_in_both_programs_and_of_another_size(masks, tmp_path):
    task, words = (
        network("detection", masks=masks),
        [f"formats.{name}.size=[96,128]" for name in ("onnx", "program")],
    )
    output, folder = exported(task, tmp_path / "x", "format=[onnx,program]", *words)
    assert output.count("0 are found by one form only") == 2
    x, threshold = torch.randn(1, 3, 96, 128), 0.2
    of_program = torch.export.load(folder / "x.pt2").module()(x, torch.tensor(threshold))
    by = by_onnx(folder / "x.onnx", x, score_threshold=np.array(threshold, np.float32))
    assert len(by) == len(of_program) == 3 + masks
    assert len(by[0]) > 3
    for one, other in zip(by, of_program, strict=True):
        assert np.abs(one - other.detach().numpy()).max() < 1e-4 * max(1, np.abs(one).max())
