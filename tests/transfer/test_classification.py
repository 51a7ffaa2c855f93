"""Classification against torchvision, timm, scikit-learn and loops written from the papers."""

import copy
import json
from collections import Counter
from math import exp, log

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    top_k_accuracy_score,
)
from sklearn.utils.class_weight import compute_class_weight
from timm.data import create_transform, resolve_data_config
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torchmetrics.classification import MulticlassCalibrationError
from torchvision.transforms import v2

from ssl_xcit import load_backbone
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.data.sets import Arrays
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification import measure
from ssl_xcit.transfer.classification.augment import ClassificationAugment
from ssl_xcit.transfer.classification.data import (
    balanced_weights,
    class_counts,
    classification_data,
    of_pair,
)
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.weights_ema import weights_ema
from ssl_xcit.utils.intervals import wilson
from ssl_xcit.utils.validation import Checker

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "erase_prob": 0.0}
LABEL = np.array(3)
seed_torch = torch.default_generator.manual_seed  # torch.manual_seed takes its time


def make_task(num_classes=5, **settings):
    seed_torch(0)
    backbone = XCiT(16, 1, 2, patch_size=8)
    task = Classification(backbone, [f"class {i}" for i in range(num_classes)], size=16, **settings)
    torch.nn.init.normal_(backbone.head.weight)
    return task.eval()  # so that BatchNorm treats images one by one


def images(count, height=16, width=16, channels=3):
    generator = np.random.default_rng(count)
    pixels = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return [*pixels], torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


# --- augmentation -------------------------------------------------------------------------------


def test_augmentation_is_torchvisions_bit_for_bit():
    pixels, _ = images(40, 50, 37)
    bicubic = v2.InterpolationMode.BICUBIC
    operation = v2.RandAugment(1, 9, 11, bicubic, (124, 116, 104))
    crop = v2.RandomResizedCrop(24, (0.2, 0.9), (0.5, 2.0), bicubic)
    flip, maybe = v2.RandomHorizontalFlip(0.3), v2.RandomApply([operation], 0.5)
    published = v2.Compose([crop, flip, maybe, maybe, v2.PILToTensor()])
    jittered = v2.Compose([crop, flip, v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()])
    settings = {"size": 24, "scale": [0.2, 0.9], "ratio": [0.5, 2.0], "flip_prob": 0.3}
    for ours, theirs in (
        (ClassificationAugment(**settings), published),
        (ClassificationAugment(**settings, rand_augment_ops=0), jittered),
    ):
        for seed, image in enumerate(pixels):
            seed_torch(seed)
            inputs, target = ours(image, LABEL)
            seed_torch(seed)
            assert torch.equal(inputs, theirs(Image.fromarray(image)))
            assert target == 3


def test_small_images_are_shifted_instead():
    image = images(1, 16, 16)[0][0]
    shifted = v2.Compose([v2.RandomCrop(16, 4), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    augment = ClassificationAugment(size=16, rand_augment_ops=0, jitter=0.0)
    results = set()
    for seed in range(20):
        seed_torch(seed)
        inputs, _ = augment(image, LABEL)
        seed_torch(seed)
        assert torch.equal(inputs, shifted(Image.fromarray(image)))
        results.add(inputs.numpy().tobytes())
    assert len(results) > 10
    assert augment(images(1, 40, 40)[0][0], LABEL)[0].shape == (3, 16, 16)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(channels):
    image = images(1, 30, 20, channels)[0][0]
    colours = {} if channels == 1 else {"rand_augment_ops": 0, "jitter": 0.0}
    augment = ClassificationAugment(size=12, **colours)
    assert augment.fitted_to(Preprocess(channels=channels)) is augment
    assert augment(image, LABEL)[0].shape == (channels, 12, 12)
    with pytest.raises(UserError, match="rand_augment_ops=0"):
        ClassificationAugment().fitted_to(Preprocess(channels=5))


def test_the_statistics_of_an_epoch_are_torchvisions(monkeypatch):
    """Of 1,200 images: which operations with which strengths, crops, flips."""
    drawn, crops, flips = [], [], []
    size, count = 40, 1200

    def record(self, image, name, magnitude, **options):
        drawn.append((name, round(magnitude, 4)))
        return image

    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", record)
    augment = ClassificationAugment(size=8)
    make_params = augment.resized_crop.make_params

    def recorded(flat_inputs):
        crops.append(make_params(flat_inputs))
        return crops[-1]

    monkeypatch.setattr(augment.resized_crop, "make_params", recorded)
    ramp = np.broadcast_to(np.arange(size, dtype=np.uint8)[None, :, None] * 4, (size, size, 3))
    reference = v2.RandomResizedCrop(8, (0.08, 1.0), (3 / 4, 4 / 3))
    areas, expected = [], []
    for seed in range(count):
        seed_torch(seed)
        inputs, _ = augment(np.ascontiguousarray(ramp), LABEL)
        flips.append(bool(inputs[0, 0, 0] > inputs[0, 0, -1]))
        seed_torch(seed)
        params = reference.make_params([torch.empty(3, size, size)])
        areas.append(crops[-1]["height"] * crops[-1]["width"])
        expected.append(params["height"] * params["width"])
    assert areas == expected
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / count**0.5

    # two draws an image, each applied with probability 1/2, of 14 operations
    assert abs(len(drawn) / count - 1.0) < 4 * 0.5**0.5 / count**0.5
    frequency = Counter(name for name, _ in drawn)
    assert frequency.keys() == v2.RandAugment._AUGMENTATION_SPACE.keys()
    share = len(drawn) / 14
    assert all(abs(n - share) < 4.5 * share**0.5 for n in frequency.values())
    strengths = {(name, abs(magnitude)) for name, magnitude in drawn}
    moved = round(0.9 * 150 / 331 * 8, 4)  # of a crop of 8 pixels
    assert strengths == {
        ("Identity", 0.0), ("AutoContrast", 0.0), ("Equalize", 0.0), ("Rotate", 27.0),
        ("ShearX", 0.27), ("ShearY", 0.27), ("TranslateX", moved), ("TranslateY", moved),
        ("Brightness", 0.81), ("Color", 0.81), ("Contrast", 0.81), ("Sharpness", 0.81),
        ("Posterize", 4.0), ("Solarize", 0.1),
    }  # fmt: skip
    signs = [m > 0 for name, m in drawn if name == "Rotate"]
    assert abs(np.mean(signs) - 0.5) < 4 * 0.5 / len(signs) ** 0.5


def test_erasing_is_torchvisions_with_normal_noise():
    task = make_task(**{**PLAIN, "erase_prob": 0.25})
    seed_torch(1)
    x = torch.full((4000, 3, 20, 20), 9.0)
    for image in x:
        task.erase_(image)
    seed_torch(1)
    reference = v2.RandomErasing(0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")
    assert torch.equal(
        x, torch.stack([reference(torch.full((3, 20, 20), 9.0)) for _ in range(4000)])
    )
    noise = x[x != 9.0]
    share = (x != 9.0).flatten(1).any(1).float().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


# --- loss ---------------------------------------------------------------------------------------


def by_the_paper(task, normalised, targets, lam, others, smoothing):
    """- sum_k y_k log p_k, an image at a time, with y = lam y_a + (1 - lam) y_b."""
    total, K = 0.0, len(task.class_names)
    for i, image in enumerate(normalised):
        logits = task.logits(image[None])[0].double()
        log_p = [float(z) - log(sum(exp(float(o)) for o in logits)) for z in logits]
        for label, weight in ((targets[i], lam), (targets[others[i]], 1 - lam)):
            for k in range(K):
                y = (1 - smoothing) * (k == label) + smoothing / K
                total -= weight * y * log_p[k]
    return float(total) / len(normalised)


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "none"])
@pytest.mark.parametrize("count", [2, 5])
def test_loss_is_the_papers_and_timms(kind, count, monkeypatch):
    on = {} if kind == "none" else {kind: 0.7}
    task = make_task(**{**PLAIN, **on, "label_smoothing": 0.1})
    _, pixels = images(count)
    targets = torch.arange(count) * 2 % 5
    x = (pixels / 255 - MEAN) / STD
    monkeypatch.setattr(torch, "randperm", torch.arange)
    lam, others = 1.0, [i - 1 for i in range(count)]  # torchvision mixes with the one before
    if kind == "mixup":
        lam = 0.3
        monkeypatch.setattr(task.mixup, "make_params", lambda flat: {"lam": lam})
        x = lam * x + (1 - lam) * x[others]
    elif kind == "cutmix":
        box = (2, 1, 10, 9)  # left, top, right, bottom
        lam = 1 - 8 * 8 / 16**2
        monkeypatch.setattr(
            task.cutmix, "make_params", lambda flat: {"box": box, "lam_adjusted": lam}
        )
        mixed = x.clone()
        mixed[:, :, 1:9, 2:10] = x[others][:, :, 1:9, 2:10]
        x = mixed
    with torch.no_grad():
        losses = task.losses(pixels, targets)
        assert losses.keys() == {"cross_entropy"}
        loss = float(losses["cross_entropy"])
        assert loss == pytest.approx(
            by_the_paper(task, x, targets.tolist(), lam, others, 0.1), abs=1e-5
        )
        if count == 2:  # timm takes the batch in reverse, which is the same for two
            soft = mixup_target(targets, 5, lam, 0.1)
            theirs = SoftTargetCrossEntropy()(task.logits(x), soft)
            assert loss == pytest.approx(float(theirs), abs=1e-6)


def test_which_mixing_is_drawn():
    """Shares of MixUp, CutMix and neither over many batches, and lambda's distribution."""
    task = make_task(mixup=0.8, cutmix=1.0, mix_prob=0.9, switch_prob=0.4)
    counts, lams, draws = Counter(), [], 1500
    x, y = torch.zeros(2, 1, 8, 8), torch.eye(2)
    x[1] = 1.0
    seed_torch(0)
    for _ in range(draws):
        mixed, soft = task.mixed(x, y)
        assert torch.allclose(mixed[0].mean(), soft[0, 1], atol=1e-6)
        values = mixed.unique()
        if soft[0, 0] == 1.0:
            counts["none"] += 1
        elif set(values.tolist()) <= {0.0, 1.0}:
            counts["cutmix"] += 1
        else:
            counts["mixup"] += 1
            lams.append(float(soft[0, 0]))
    assert abs(counts["mixup"] / draws - 0.9 * 0.6) < 0.05
    assert 0.9 * 0.4 - 0.12 < counts["cutmix"] / draws < 0.9 * 0.4 + 0.03  # some boxes are empty
    assert abs(np.mean(lams) - 0.5) < 0.04
    assert abs(np.var(lams) - 1 / (4 * (2 * 0.8 + 1))) < 0.02  # of Beta(a, a)


def test_repeated_images_are_mixed_with_others():
    """Three copies of an image stand side by side in a batch of repeated augmentation."""
    task = make_task(mixup=0.8, cutmix=0.0)
    y = torch.eye(5).repeat_interleave(3, dim=0)
    x = torch.zeros(15, 1, 8, 8)
    seed_torch(0)
    alone = [float((task.mixed(x, y)[1].amax(1) > 1 - 1e-6).float().mean()) for _ in range(200)]
    assert np.mean(alone) == pytest.approx(2 / 14, abs=0.03)  # of 14 others two are copies


def test_several_labels_are_compared_class_by_class(monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)
    task = make_task(3, **{**PLAIN, "mixup": 0.5, "label_smoothing": 0.1}, multi_label=True)
    _, pixels = images(2)
    rows = torch.tensor([[1, 0, 1], [0, 0, 1]])
    monkeypatch.setattr(task.mixup, "make_params", lambda flat: {"lam": 0.2})
    x = (pixels / 255 - MEAN) / STD
    with torch.no_grad():
        p = task.logits(0.2 * x + 0.8 * x.flip(0)).double().sigmoid()
        y = mixup_target(rows, 3, 0.2, 0.1, multi_label=True)
        loss = task.losses(pixels, rows)["cross_entropy"]
    loop = [
        -y[i, k] * log(p[i, k]) - (1 - y[i, k]) * log(1 - p[i, k])
        for i in range(2)
        for k in range(3)
    ]
    assert float(loss) == pytest.approx(float(sum(loop)) / 6, abs=1e-6)
    predictions = task.predict([*pixels], [(16, 16)] * 2)
    with torch.no_grad():
        assert np.allclose(np.stack(predictions), task.logits(x).sigmoid(), atol=1e-6)


def pair_of(train_labels, test_labels, names=()):
    def source(labels):
        pixels = np.zeros((len(labels), 16, 16, 3), np.uint8)
        return Arrays(pixels, "made", np.array(labels), names)

    return LabelledPair(source(train_labels), source(test_labels), "made", 16, 16)


def test_class_weights():
    labels = [0, 0, 0, 0, 1, 1, 2, 4]  # none of class 3
    data = of_pair(pair_of(labels, [0, 1]))
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 2, 4]), y=labels)
    weights = balanced_weights(data.train)
    assert np.allclose(weights, [*expected[:3], 1.0, expected[3]])
    assert np.isclose(weights[labels].mean(), 1.0)

    task = make_task(5, **PLAIN, class_weights="balanced")
    task.before_training(data.train)
    _, pixels = images(3)
    targets = torch.tensor([0, 4, 2])
    with torch.no_grad():
        log_p = task.logits((pixels / 255 - MEAN) / STD).log_softmax(1)
        loss = task.losses(pixels, targets)["cross_entropy"]
    terms = [-weights[t] * float(log_p[i, t]) for i, t in enumerate(targets)]
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-6)

    rows = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    several = of_pair(pair_of(rows, rows))
    assert np.allclose(balanced_weights(several.train), [1 / 3, 3.0])  # without by with
    with pytest.raises(UserError, match="class_weights has 2 numbers, and there are 5 classes"):
        make_task(5, class_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="several labels each: set multi_label=true"):
        make_task(2).before_training(several.train)


def test_the_same_seed_gives_the_same_bits():
    task = make_task().train()
    _, pixels = images(4)
    state = copy.deepcopy(task.state_dict())
    results = []
    for seed in (1, 1, 2):
        task.load_state_dict(state)
        seed_torch(seed)
        results.append(task.losses(pixels, torch.arange(4))["cross_entropy"].item())
    assert results[0] == results[1] != results[2]


# --- prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_published_classifiers_predict_as_in_timm(crop_ratio, tmp_path):
    """Random weights under the published names: preprocessing, probabilities and accuracy."""
    seed_torch(0)
    K, size = 7, 96
    theirs = timm.create_model("xcit_tiny_12_p16_224", depth=2, num_classes=K).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    torch.save({"model": from_timm_names(theirs.state_dict())}, tmp_path / "classifier.pth")
    backbone = load_backbone(tmp_path / "classifier.pth")
    task = Classification(backbone, list("abcdefg"), size=size, crop_ratio=crop_ratio).eval()
    assert torch.equal(task.backbone.head.weight, theirs.head.weight)  # no fresh head

    config = resolve_data_config(
        {"crop_pct": crop_ratio, "input_size": (3, size, size)}, model=theirs
    )
    transform = create_transform(**config)
    pictures = [
        images(i, *sides)[0][0] for i, sides in enumerate([(96, 96), (150, 101), (60, 200)], 1)
    ]
    pictures = [np.asarray(Image.fromarray(p[:5, :7]).resize(p.shape[1::-1])) for p in pictures]
    inputs = [task.prepare(picture) for picture in pictures]
    seen = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        logits = theirs(seen)
        ours = task.logits((torch.stack(inputs) / 255 - MEAN) / STD)
    assert (ours - logits).abs().max() < 1e-5
    probabilities = np.stack(task.predict(inputs, [p.shape[:2] for p in pictures]))
    assert np.abs(probabilities - logits.softmax(1).numpy()).max() < 1e-5
    targets = np.array([int(logits[0].argmax()), 0, 1])
    measured = task.measure()
    for row, target in zip(probabilities, targets, strict=True):
        measured.update("image", row, np.array(target))
    right = (logits.argmax(1).numpy() == targets).mean()
    assert measured.compute().results["top1"] == pytest.approx(100 * right)


def test_a_task_is_built_again_from_its_settings():
    task = make_task(4, class_weights=[1.0, 2.0, 3.0, 4.0], mixup=0.3)
    settings = json.loads(json.dumps(task.settings))
    again = Classification(XCiT(**task.backbone.architecture), task.class_names, **settings)
    again.load_state_dict(task.state_dict(), strict=True)
    again.eval()
    _, pixels = images(3)
    for one, other in zip(
        *(t.predict([*pixels], [(16, 16)] * 3) for t in (task, again)), strict=True
    ):
        assert np.array_equal(one, other)
        assert one.sum() == pytest.approx(1.0, abs=1e-6)
    assert again.settings == task.settings
    assert not any(p.numel() == 0 for p in again.parameters())
    assert {key.split(".")[0] for key in task.state_dict()} == {"backbone"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1.0}, "transfer.task.mixup=-1.0 must be a number of at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be"),
        ({"crop_ratio": 0.0}, "crop_ratio=0.0 must be"),
        ({"class_weights": "equal"}, "class_weights=equal must be balanced or"),
        ({"erase_scale": [0.5, 0.1]}, r"erase_scale=\[0.5,0.1\] must be \[low,high\]"),
        ({"mix_up": 1.0}, "did you mean transfer.task.mixup"),
    ],
)
def test_wrong_settings(settings, message):
    node = {"_target_": f"{Classification.__module__}.Classification", **settings}
    with pytest.raises(UserError, match=message):
        Checker({}).value(dict, node, "transfer.task")
    node = {"_target_": f"{ClassificationAugment.__module__}.ClassificationAugment"}
    with pytest.raises(UserError, match="rand_augment_magnitude=11 must be"):
        Checker({}).value(dict, {**node, "rand_augment_magnitude": 11}, "transfer.augment")


# --- measures -----------------------------------------------------------------------------------


def test_accuracy_is_scikit_learns():
    generator = np.random.default_rng(0)
    N, K = 400, 8
    targets = generator.integers(0, K - 1, N)  # one class has no image
    probabilities = generator.dirichlet(np.ones(K) / 2, N)
    probabilities[np.arange(N), targets] += 0.5
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    measured = measure.AccuracyMeasure([f"c{k}" for k in range(K)])
    for i in range(N):
        measured.update(f"image {i}", probabilities[i], np.array(targets[i]))
    results, intervals, details = measured.compute()
    predicted = probabilities.argmax(axis=1)
    assert next(iter(results)) == "top1"
    assert results["top1"] == pytest.approx(100 * (predicted == targets).mean())
    top5 = top_k_accuracy_score(targets, probabilities, k=5, labels=np.arange(K))
    assert results["top5"] == pytest.approx(100 * top5)
    balanced = balanced_accuracy_score(targets, predicted)
    assert results["mean_class_accuracy"] == pytest.approx(100 * balanced)
    assert details["confusion"] == confusion_matrix(targets, predicted, labels=range(K)).tolist()
    ece = MulticlassCalibrationError(K, n_bins=15, norm="l1")
    expected = ece(torch.from_numpy(probabilities), torch.from_numpy(targets))
    assert results["calibration_error"] == pytest.approx(100 * float(expected), abs=1e-4)
    hits = int((predicted == targets).sum())
    assert intervals["top1"] == wilson(hits, N)
    assert [row["class"] for row in details["per_class"]] == [f"c{k}" for k in range(K - 1)]
    wrong = np.flatnonzero(predicted != targets)
    worst = wrong[probabilities.max(1)[wrong].argmax()]
    assert details["worst"][0] == {
        "image": f"image {worst}",
        "true": f"c{targets[worst]}",
        "predicted": f"c{predicted[worst]}",
        "probability": probabilities.max(1)[worst],
    }
    json.dumps([results, intervals, details])


def test_equal_probabilities_are_no_right_answers():
    measured = measure.AccuracyMeasure([str(k) for k in range(10)])
    for k in range(10):
        measured.update(str(k), np.full(10, 0.1), np.array(k))
    results = measured.compute().results
    assert results["top1"] == pytest.approx(10)
    assert results["top5"] == pytest.approx(50)


def test_the_interval_of_the_mean_over_classes_covers():
    """In 95 % of simulated test sets, about; of one class it is Wilson's."""
    assert measure.mean_interval(np.array([30.0]), [wilson(3, 10)]) == pytest.approx(wilson(3, 10))
    generator = np.random.default_rng(0)
    shares, counts = np.array([0.5, 0.8, 0.95, 0.99]), np.array([30, 12, 50, 20])
    covered = 0
    for _ in range(300):
        hits = generator.binomial(counts, shares)
        bounds = [wilson(int(h), int(n)) for h, n in zip(hits, counts, strict=True)]
        low, high = measure.mean_interval(100 * hits / counts, bounds)
        covered += low <= 100 * shares.mean() <= high
    assert 0.92 < covered / 300 < 0.99


def test_average_precision_is_scikit_learns():
    generator = np.random.default_rng(0)
    N, K = 120, 4
    truth = generator.random((N, K)) < [0.5, 0.2, 0.1, 0.0]  # none of the last
    scores = (0.4 * truth + 0.6 * generator.random((N, K))).astype(np.float32)
    measured = measure.MultiLabelMeasure(list("abcd"))
    for i in range(N):
        measured.update(str(i), scores[i], truth[i].astype(np.int64))
    results, intervals, details = measured.compute()
    precision = average_precision_score(truth[:, :3], scores[:, :3], average="macro")
    assert results["mAP"] == pytest.approx(100 * precision)
    decided = scores >= 0.5
    assert results["F1"] == pytest.approx(100 * f1_score(truth, decided, average="micro"))
    by_class = f1_score(truth[:, :3], decided[:, :3], average=None)
    assert [row["F1"] for row in details["per_class"]] == pytest.approx(100 * by_class)
    low, high = intervals["mAP"]
    assert low < results["mAP"] < high < low + 20
    assert details["worst"][0]["probability"] >= 0.5 or details["worst"][0]["true"]
    json.dumps([results, intervals, details])


# --- data ---------------------------------------------------------------------------------------


def test_built_in_data(photos_pair, cache):
    data = classification_data(cache=cache)
    assert data.train.class_names == data.test.class_names == list(photos_pair.train.class_names)
    assert len(data.train.images) == len(photos_pair.train)
    target = data.test.read_target(5, 64, 64)
    assert target.shape == ()
    assert target == photos_pair.test.labels[5]
    assert data.train.digest != data.test.digest
    assert data.train.digest == classification_data(cache=cache).train.digest
    assert class_counts(data.train.labels).sum() == len(data.train.images)


def test_folders_and_lists(tmp_path):
    lines = []
    for i in range(12):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    folders = classification_data(str(tmp_path / "images"))
    listed = classification_data(str(tmp_path / "images"), file=str(tmp_path / "list.csv"))
    for data in (folders, listed):
        assert list(data.train.class_names) == ["a", "b"]
        assert len(data.train.images) + len(data.test.images) == 12
        name = data.test.images.name(0)
        assert "ab"[int(data.test.read_target(0, 8, 8))] == name.split("/")[-2]
    (tmp_path / "paths.txt").write_text("\n".join(line.split(",")[0] for line in lines))
    with pytest.raises(UserError, match=r"^data: .*paths\.txt has no labels, which classification"):
        classification_data(str(tmp_path / "images"), file=str(tmp_path / "paths.txt"))
    with pytest.raises(UserError, match=r"data\.test_root is given without data\.root"):
        classification_data(test_root=str(tmp_path))
    with pytest.raises(MissingPath):
        classification_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0.5, 1.5], [0.5, 2.5], "the labels are numbers, and classification takes classes"),
        ([0, 1], [0, 2], r"1 classes of the test images have no training image \(2\)"),
        ([0, 2], [0, 1], r"no training image \(1\)"),
        ([0, 0], [0, 0], "one class only"),
        ([0, 1], [[0, 1], [1, 0]], "training labels are classes of shape"),
        ([0, 1], [], "no images to train or to test on"),
    ],
)
def test_labels_that_do_not_fit(train, test, message):
    with pytest.raises(UserError, match=message) as error:
        of_pair(pair_of(train, test))
    assert "\n" not in str(error.value)


def test_rows_of_several_labels():
    rows = np.array([[1, 0, 1], [0, 1, 0]])
    data = of_pair(pair_of(rows, rows[:1]))
    assert list(data.train.class_names) == ["0", "1", "2"]
    assert data.train.read_target(0, 16, 16).tolist() == [1, 0, 1]
    assert label_kind(data.train.labels) == "several"
    source = Arrays(np.zeros((2, 4, 4, 3), np.uint8), "made")
    with pytest.raises(UserError, match="no labels"):
        of_pair(LabelledPair(source, source, "made", 4, 4))


# --- average of weights -------------------------------------------------------------------------


def test_average_of_weights():
    """Against its definition, and exact after its state was saved and loaded."""
    task = make_task().train()
    average = weights_ema(task, decay=0.9)
    assert not any(p.requires_grad for p in average.parameters())
    expected, saved = None, None
    for t in range(6):
        seed_torch(t)
        with torch.no_grad():
            for parameter in task.parameters():
                parameter += torch.randn_like(parameter)
            task.logits(torch.randn(2, 3, 16, 16))  # moves running statistics
        average.update_parameters(task)
        now = {k: v.clone() for k, v in task.state_dict().items() if v.is_floating_point()}
        expected = now if t == 0 else {k: 0.9 * expected[k] + 0.1 * now[k] for k in now}
        if t == 2:
            saved = copy.deepcopy(average.state_dict())
            resumed = weights_ema(make_task(), decay=0.9)
            resumed.load_state_dict(saved, strict=True)
        if t > 2:
            resumed.update_parameters(task)
    state = average.module.state_dict()
    assert all(torch.allclose(state[k], v, atol=1e-6) for k, v in expected.items())
    assert {k for k in expected if k.endswith("running_mean")}
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in average.state_dict().items())


def test_statistics_of_the_images_are_the_backbones():
    backbone = XCiT(16, 1, 2, patch_size=8, in_chans=1)
    backbone.preprocess = {"channels": 1, "mean": [0.2], "std": [0.1]}
    task = Classification(backbone, ["a", "b"], size=16).eval()
    pixels = images(2, channels=1)[1]
    with torch.no_grad():
        expected = task.logits((pixels / 255 - 0.2) / 0.1).softmax(1).numpy()
    assert np.allclose(np.stack(task.predict([*pixels], [(16, 16)] * 2)), expected, atol=1e-5)
    assert of_weights(backbone.preprocess).channels == 1
