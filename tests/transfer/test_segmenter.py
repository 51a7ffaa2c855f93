"""Segmentation: augmentation, losses, inference, mIoU."""

import colorsys

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from ssl_xcit.data.preprocess import Preprocess, normalise
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.segmentation.augment import (
    SegmentationAugment,
    SegmentationPrepare,
    distorted,
    resized_size,
    scaled_saturation,
)
from ssl_xcit.transfer.segmentation.measure import SegmentationMeasure
from ssl_xcit.transfer.segmentation.task import Segmentation, most_likely

CLASSES = ("wall", "sky", "tree", "road", "car")


def task_of(seed=0, **settings) -> Segmentation:
    torch.manual_seed(seed)
    backbone = XCiT(16, 4, 2, 8, pyramid=True)
    return Segmentation(backbone, CLASSES, **{"channels": 8, "auxiliary_channels": 8, **settings})


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose first two channels are its rows and columns, and a mask that is its rows."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack((rows, columns, rows), axis=-1), rows


def test_image_and_mask_stay_aligned():
    pixels, rows = coordinates(200, 120)
    columns = pixels[:, :, 1]
    augment = SegmentationAugment(crop=80, size=96, scale=(0.5, 2.0), max_share=1.0, distort=False)
    padded, mirrored = 0, 0
    for seed in range(40):
        crops = []
        for plane in (rows, columns):
            torch.manual_seed(seed)
            crops.append(augment(pixels, np.ascontiguousarray(plane)))
        (image, down), (again, right) = crops
        assert torch.equal(image, again)  # the mask draws nothing
        inside = down != 255
        padded += bool((~inside).any())
        for channel, mask in ((0, down), (1, right)):
            # a border of interpolation, and half a pixel of rounding at scale 0.4
            difference = image[channel].float() - mask.float()
            assert difference[inside].abs().max() <= 2
            assert difference[inside].abs().mean() < 0.7
            assert abs(difference[inside].mean()) < 0.35  # OpenCV 4: 0.34
        mirrored += bool(image[1, 0, 0] > image[1, 0, inside[0].sum() - 1])
        assert image[:, ~inside].unique(dim=1).shape[1] <= 1  # one colour
    assert 4 < padded < 20
    assert 10 < mirrored < 30


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_outside_the_image_is_0_for_the_network(channels):
    preprocess = Preprocess(channels=channels)
    augment = SegmentationAugment(crop=64, size=32, scale=(1.0, 1.0)).fitted_to(preprocess)
    pixels = np.full((40, 40, channels), 250, np.uint8)
    torch.manual_seed(0)
    image, mask = augment(pixels, np.zeros((40, 40), np.uint8))
    inputs = normalise(image[None], preprocess)[0]
    outside = inputs[:, mask == 255]
    assert outside.shape == (channels, 64 * 64 - 32 * 32)
    half = 0.5 / 255 / torch.tensor(preprocess.std)
    assert (outside.abs() <= half[:, None] + 1e-6).all()
    assert inputs[:, mask != 255].abs().min() > 0.5


def test_scales_are_those_asked_for():
    """A mask of columns tells how many columns of the file a crop spans."""
    pixels, _ = coordinates(200, 200)
    augment = SegmentationAugment(crop=100, size=200, scale=(1.0, 2.0), max_share=1.0)
    torch.manual_seed(0)
    spans = []
    for _ in range(200):
        _, mask = augment(pixels, np.ascontiguousarray(pixels[:, :, 1]))
        columns = mask[0].float()
        spans.append(100 / (1 + float(columns.max() - columns.min())))
    assert 0.95 < min(spans) < 1.05
    assert 1.9 < max(spans) < 2.1
    assert abs(np.mean(spans) - 1.5) < 0.08
    assert abs(np.std(spans) - 12**-0.5) < 0.05


def test_crops_of_one_class_are_drawn_again():
    pixels = np.zeros((64, 256, 3), np.uint8)
    mask = np.zeros((64, 256), np.uint8)
    mask[:, 200:] = 1
    several = {}
    for limit in (1.0, 0.75):
        augment = SegmentationAugment(32, 64, (1.0, 1.0), max_share=limit, distort=False)
        torch.manual_seed(0)
        shares = [float((augment(pixels, mask)[1] == 1).float().mean()) for _ in range(300)]
        several[limit] = np.mean([0.25 < share < 0.75 for share in shares])
    chance = 15 / 225  # of the window's first columns 169 to 199 those that leave 9 to 23 of 32
    assert abs(several[1.0] - chance) < 0.05
    assert abs(several[0.75] - (1 - (1 - chance) ** 11)) < 0.1


def test_sizes_are_the_published_ones():
    for shape, short, wanted in (
        ((600, 800), 512, (512, 683)), ((100, 1000), 512, (205, 2048)), ((30, 20), 40, (60, 40)),
        ((4, 4000), 64, (32, 256)),
    ):  # fmt: skip
        pixels = np.zeros((*shape, 3), np.uint8)
        assert resized_size(pixels, short) == wanted
        assert SegmentationPrepare(short)(pixels).shape == (3, *wanted)
    assert SegmentationPrepare(40)(np.zeros((50, 60, 5), np.uint8)).shape == (5, 40, 48)


def test_saturation_is_that_of_hsv():
    image = torch.rand(3, 4, 4) * 255
    for factor in (0.5, 1.0, 1.4):
        found = scaled_saturation(image, factor)
        for y, x in np.ndindex(4, 4):
            h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
            wanted = colorsys.hsv_to_rgb(h, min(1.0, s * factor), v)
            assert torch.allclose(found[:, y, x] / 255, torch.tensor(wanted), atol=1e-4)


def test_distortion_has_the_published_ranges():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)  # saturation and hue leave it
    torch.manual_seed(0)
    values = np.array([float(distorted(grey)[0, 0, 0]) for _ in range(1500)])
    assert values.min() >= 34  # (100 - 32) / 2
    assert values.max() <= 198  # (100 + 32) * 1.5
    assert abs(np.mean(values == 100) - 0.25) < 0.04  # neither brightness nor contrast
    bright = values[(values > 68) & (values < 132)]
    assert len(bright) > len(values) / 2
    coloured = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    hues = []
    for _ in range(400):
        red, green, blue = (distorted(coloured)[:, 0, 0] / 255).tolist()
        hues.append((colorsys.rgb_to_hsv(red, green, blue)[0] + 0.5) % 1 - 0.5)
    start = colorsys.rgb_to_hsv(200, 100, 50)[0]
    assert start - 0.13 < min(hues) < start - 0.08
    assert start + 0.08 < max(hues) < start + 0.13
    for channels in (1, 5):
        assert distorted(torch.zeros(channels, 4, 4, dtype=torch.uint8)).shape[0] == channels


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_losses_are_a_loop_over_pixels(head):
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    task = task_of(head=head, dropout=0.0, class_weights=weights).eval()
    images = torch.randint(256, (2, 3, 40, 64), dtype=torch.uint8)
    labels = torch.randint(5, (2, 40, 64), dtype=torch.uint8)
    labels[0, :, :10] = 255
    losses = task.losses(images, labels)
    maps = task.backbone.pyramid(normalise(images, Preprocess()))
    logits = {"segmentation": task.head(maps)}
    if head == "upernet":
        logits["auxiliary"] = task.auxiliary(maps[2])
    assert losses.keys() == logits.keys()
    for name, small in logits.items():
        large = torch.nn.functional.interpolate(small, (40, 64), mode="bilinear")
        chances, total = large.softmax(dim=1), 0.0
        for b, y, x in np.ndindex(2, 40, 64):
            label = int(labels[b, y, x])
            if label != 255:
                total -= weights[label] * chances[b, label, y, x].log().item()
        wanted = total / labels.numel() * (0.4 if name == "auxiliary" else 1.0)
        assert losses[name].item() == pytest.approx(wanted, rel=1e-4)
    task.train()
    ignored = task.losses(images, torch.full_like(labels, 255))
    assert all(loss.item() == 0 for loss in ignored.values())
    again = task.losses(list(images), list(labels))
    sum(again.values()).backward()
    assert task.backbone.patch_embed.proj[0][0].weight.grad.abs().max() > 0


def test_it_learns():
    """Bright and dark halves, told apart after a few steps from scratch."""
    task = task_of().train()
    images = torch.full((4, 3, 64, 64), 30, dtype=torch.uint8)
    labels = torch.zeros(4, 64, 64, dtype=torch.uint8)
    for i, columns in enumerate((16, 24, 40, 48)):
        images[i, :, :, columns:], labels[i, :, columns:] = 220, 3
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = task.losses(images, labels)["segmentation"]
        loss.backward()
        optimizer.step()
    measure = task.measure()
    predictions = task.eval().predict(list(images), [(64, 64)] * 4)
    for i, (prediction, label) in enumerate(zip(predictions, labels.numpy(), strict=True)):
        measure.update(str(i), prediction, label)
    assert measure.compute().results["miou"] > 80


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_predictions_are_the_highest_logits_at_the_files_size(head):
    task = task_of(head=head).eval()
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((40, 56), (33, 70))]
    sizes = [(80, 112), (20, 41)]
    for image, size, found in zip(images, sizes, task.predict(images, sizes), strict=True):
        with torch.no_grad():
            maps = task.backbone.pyramid(normalise(image[None], Preprocess()))
            large = torch.nn.functional.interpolate(task.head(maps), size, mode="bilinear")
        assert found.dtype == np.uint8
        assert np.array_equal(found, large.argmax(dim=1)[0].numpy())
    logits = torch.randint(4, (2, 37, 5, 6)).float()  # with ties, and of several parts
    assert torch.equal(most_likely(logits, (5, 6)), logits.argmax(dim=1).to(torch.uint8))


def test_sliding_windows_are_averaged():
    task = task_of(inference="slide", crop=32, stride=24).eval()
    images = torch.randn(1, 3, 64, 81)
    with torch.no_grad():
        found = task(images)
        total, count = torch.zeros_like(found), torch.zeros_like(found)
        for top in (0, 24, 32):
            for left in (0, 24, 48, 49):
                part = images[:, :, top : top + 32, left : left + 32]
                logits = task.head(task.backbone.pyramid(part))
                logits = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
                total[:, :, top : top + 32, left : left + 32] += logits
                count[:, :, top : top + 32, left : left + 32] += 1
        assert torch.allclose(found, total / count, atol=1e-5)
        small = images[:, :, :32, :48]  # lower than one window's side
        task.crop = 48
        assert torch.allclose(task(small), task_of().eval()(small), atol=1e-5)
    pixels = (images[0, :, :64, :64] * 50 + 128).clamp(0, 255).to(torch.uint8)
    (classes,) = task.predict([pixels], [(64, 64)])
    assert np.array_equal(
        classes, task(normalise(pixels[None], Preprocess())).argmax(dim=1)[0].numpy()
    )


def test_measure_is_scikit_learns():
    generator = np.random.default_rng(0)
    measure = SegmentationMeasure([*CLASSES, "absent", "only predicted"])
    truths, predictions = [], []
    for i in range(12):
        truth = generator.integers(0, 5, (20, 30)).astype(np.uint8)
        prediction = np.where(generator.random((20, 30)) < 0.6, truth, 6 * (i == 3)).astype(
            np.uint8
        )
        truth[generator.random((20, 30)) < 0.2] = 255
        measure.update(f"{i}.png", prediction, truth)
        truths.append(truth.ravel()), predictions.append(prediction.ravel())
    truth, prediction = np.concatenate(truths), np.concatenate(predictions)
    known = truth != 255
    matrix = confusion_matrix(truth[known], prediction[known], labels=range(7))
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    iou = 100 * np.diag(matrix)[union > 0] / union[union > 0]
    results, intervals, details = measure.compute()
    assert details["confusion_matrix"] == matrix.tolist()
    assert list(results) == ["miou", "pixel_accuracy", "mean_class_accuracy"]
    assert results["miou"] == pytest.approx(iou.mean())
    score = jaccard_score(
        truth[known], prediction[known], average="macro", labels=[0, 1, 2, 3, 4, 6]
    )
    assert results["miou"] == pytest.approx(100 * score)
    assert results["pixel_accuracy"] == pytest.approx(100 * (truth == prediction)[known].mean())
    recall = 100 * np.diag(matrix)[:5] / matrix.sum(axis=1)[:5]
    assert results["mean_class_accuracy"] == pytest.approx(recall.mean())
    assert details["class_iou"]["absent"] is None
    assert details["class_iou"]["only predicted"] == 0.0
    assert details["class_iou"]["tree"] == pytest.approx(iou[2])
    assert details["worst_images"][0][0] == "3.png"
    for name, (low, high) in intervals.items():
        assert low < results[name] < high, name
    assert measure.compute() == (results, intervals, details)


def test_intervals_cover_the_truth():
    """Images that differ: of 40 samples of 40, about 95 % have the true accuracy inside."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        measure = SegmentationMeasure(["a", "b"])
        for i in range(40):
            truth = generator.integers(0, 2, (8, 8)).astype(np.uint8)
            right = generator.random((8, 8)) < generator.uniform(0.5, 0.9)
            measure.update(str(i), np.where(right, truth, 1 - truth).astype(np.uint8), truth)
        low, high = measure.compute().intervals["pixel_accuracy"]
        covered += low <= 70 <= high
    assert 34 <= covered <= 40


def test_bad_settings_say_what_to_do():
    with pytest.raises(UserError, match="2 numbers, and there are 5 classes"):
        task_of(class_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="pyramid=True"):
        Segmentation(XCiT(16, 2, 2), CLASSES)
    with pytest.raises(UserError, match="1 to 255 classes"):
        Segmentation(XCiT(16, 2, 2, pyramid=True), [str(i) for i in range(256)])
    with pytest.raises(UserError, match="at least 2"):
        task_of(head="upernet").losses(
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8)
        )
    task = task_of(head="upernet", class_weights=[1, 2, 3, 4, 5])
    again = Segmentation(task.backbone, task.class_names, **task.settings)
    assert again.state_dict().keys() == task.state_dict().keys()
