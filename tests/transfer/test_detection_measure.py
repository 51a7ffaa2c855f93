"""Average precision against pycocotools, and what a report shows beside it."""

import contextlib
import io
import sys

import numpy as np
import pytest

from ssl_xcit.errors import UserError
from ssl_xcit.transfer.detection.masks import RunMasks
from ssl_xcit.transfer.detection.measure import (
    THRESHOLDS,
    ClassMatches,
    DetectionMeasure,
    Detections,
    match,
)
from ssl_xcit.transfer.task import Instances

SIZE = 200
NAMES = ("a", "b", "c", "never there")


def ellipse(box):
    """The pixels of the ellipse in a box."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    sides = max(x1 - x0, 1), max(y1 - y0, 1)
    return ((2 * x - x0 - x1) / sides[0]) ** 2 + ((2 * y - y0 - y1) / sides[1]) ** 2 < 1


def some_objects(generator, crowds):
    """0 to 6 objects, small to large, some of them crowd regions."""
    M = int(generator.integers(0, 7))
    start = generator.uniform(0, 60, (M, 2))
    side = generator.choice([20, 60, 140], (M, 1)) * generator.uniform(0.8, 1.0, (M, 2))
    boxes = np.concatenate((start, start + side), axis=1).astype(np.float32)
    masks = np.stack([ellipse(b) for b in boxes]) if M else np.zeros((0, SIZE, SIZE), bool)
    crowd = generator.uniform(size=M) < (0.25 if crowds else 0)
    return Instances(boxes, generator.integers(0, 3, M), masks, crowd)


def some_detections(generator, objects):
    """Objects found with errors, some of them twice or as another class, and inventions."""
    boxes, labels = [], []
    for box, label in zip(objects.boxes, objects.labels, strict=True):
        for _ in range(int(generator.integers(0, 3))):
            shift = generator.normal(0, 0.06, 4) * np.tile(box[2:] - box[:2], 2)
            boxes.append(box + shift)
            labels.append(label if generator.uniform() < 0.8 else generator.integers(0, 3))
    for _ in range(int(generator.integers(0, 4))):
        start = generator.uniform(0, 150, 2)
        boxes.append(np.concatenate((start, start + generator.uniform(8, 50, 2))))
        labels.append(generator.integers(0, 3))
    made = np.array(boxes, np.float32).reshape(-1, 4)
    made[:, 2:] = np.maximum(made[:, 2:], made[:, :2] + 4)
    scores = -np.sort(-generator.choice(np.linspace(0.05, 1, 40), len(made)))  # ties as well
    masks = RunMasks.of(map(ellipse, made), (SIZE, SIZE))
    return Detections(made, np.array(labels, np.int64), scores.astype(np.float32), masks)


def set_of_images(num_images=30, crowds=True):
    """Images with objects and what was found in them."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(num_images):
        objects = some_objects(generator, crowds)
        images.append((some_detections(generator, objects), objects))
    assert any(not len(objects.boxes) for _, objects in images)
    assert any(not len(found.boxes) for found, _ in images)
    return images


def measured(images, masks=True):
    """Our measure of all images."""
    measure = DetectionMeasure(NAMES, masks)
    for i, (found, objects) in enumerate(images):
        measure.update(f"{i}.png", found, objects)
    return measure


def pycocotools_results(images, iou_type):
    """AP, AP50, AP75, small, medium, large in percent, and the evaluator."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(objects, i, image):
        x0, y0, x1, y1 = objects.boxes[i].astype(np.float64).tolist()
        return {
            "image_id": image,
            "category_id": int(objects.labels[i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": rle.encode(np.asfortranarray(objects.masks[i].astype(np.uint8))),
        }

    truth, found = [], []
    for image, (detections, objects) in enumerate(images):
        for i in range(len(objects.boxes)):
            truth.append({
                **entry(objects, i, image),
                "id": len(truth) + 1,
                "area": int(objects.masks[i].sum()) if objects.areas is None else objects.areas[i],
                "iscrowd": int(objects.crowd[i]),
            })  # fmt: skip
        for i in range(len(detections.boxes)):
            one = {**entry(detections, i, image), "score": float(detections.scores[i])}
            if iou_type == "segm":
                del one["bbox"]  # or areas would be the boxes'
            found.append(one)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(images))],
            "annotations": truth,
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(found), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return 100 * evaluator.stats[:6], evaluator


def with_areas(images):
    """The same objects, annotated with areas that are not those of their masks."""
    generator = np.random.default_rng(1)
    return [
        (found, objects._replace(areas=10 ** generator.uniform(2, 5, len(objects.boxes))))
        for found, objects in images
    ]


SIZES = ("AP_small", "AP_medium", "AP_large")


@pytest.mark.parametrize("crowds", [False, True])
def test_objects_are_as_large_as_they_are_annotated(crowds):
    """As pycocotools has it, also for boxes, and not as their masks are."""
    images = set_of_images(crowds=crowds)
    of_masks, annotated = measured(images).compute().results, with_areas(images)
    results = measured(annotated).compute().results
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        reference, _ = pycocotools_results(annotated, iou_type)
        for name, value in zip(("AP", "AP50", "AP75", *SIZES), reference, strict=True):
            assert results[f"{kind}_{name}"] / 100 == pytest.approx(value / 100, abs=1e-6)
        assert results[f"{kind}_AP"] == of_masks[f"{kind}_AP"]
        assert all(results[f"{kind}_{n}"] != of_masks[f"{kind}_{n}"] for n in SIZES)


def test_areas_that_are_not_known_are_the_masks():
    images = set_of_images(12)
    unknown = [(found, o._replace(areas=np.zeros(len(o.boxes)))) for found, o in images]
    assert measured(unknown).compute().results == measured(images).compute().results


def test_areas_count_for_boxes_alone():
    images = [
        (
            found._replace(masks=None),
            objects._replace(masks=None, areas=np.full(len(objects.boxes), 5e3)),
        )
        for found, objects in set_of_images(12)
    ]
    results = measured(images, masks=False).compute().results
    assert set(results) == {"box_AP", "box_AP50", "box_AP75", "box_AP_medium"}


def percent_by_class(evaluator, k):
    """AP of a class in percent."""
    return 100 * evaluator.eval["precision"][:, :, k, 0, 2].mean()


@pytest.mark.parametrize("crowds", [False, True])
def test_average_precision_is_pycocotools(crowds):
    images = set_of_images(crowds=crowds)
    results, intervals, details = measured(images).compute()
    assert next(iter(results)) == "box_AP"
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        reference, evaluator = pycocotools_results(images, iou_type)
        for name, value in zip(
            ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), reference, strict=True
        ):
            assert 2 < value < 98
            assert results[f"{kind}_{name}"] / 100 == pytest.approx(value / 100, abs=1e-6)
        by_class = details[f"{kind}_AP_by_class"]
        assert list(by_class) == ["a", "b", "c"]  # the fourth has no objects
        for k, value in enumerate(by_class.values()):
            assert value / 100 == pytest.approx(percent_by_class(evaluator, k) / 100, abs=1e-6)
        for k, curve in enumerate(details[f"{kind}_precision_at_recall"].values()):
            assert np.allclose(curve, evaluator.eval["precision"][0, :, k, 0, 2], atol=1e-6)
        for name in ("AP", "AP50"):
            low, high = intervals[f"{kind}_{name}"]
            assert low < results[f"{kind}_{name}"] < high


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_own_matches_give_the_same(kind):
    """Intervals rest on our matching, so it gives pycocotools' AP of all thresholds and classes."""
    images = set_of_images()
    _, evaluator = pycocotools_results(images, {"box": "bbox", "mask": "segm"}[kind])
    matches = measured(images).matches[kind]
    for k in range(3):
        of_class = ClassMatches(list(matches[k]), list(matches[k].values()), len(images))
        ours = of_class.average_precision(np.ones(len(images)))
        expected = evaluator.eval["precision"][:, :, k, 0, 2].mean(axis=1)
        assert np.allclose(ours, expected, atol=1e-9)


def test_weights_repeat_images():
    """An image of weight 2 counts as two."""
    images = set_of_images(12)
    twice = measured([*images, *images[:5]], masks=False).matches["box"]
    once = measured(images, masks=False).matches["box"]
    weights = np.ones(12)
    weights[:5] = 2
    for k in range(3):
        repeated = ClassMatches(list(twice[k]), list(twice[k].values()), 17)
        weighted = ClassMatches(list(once[k]), list(once[k].values()), 12)
        expected = repeated.average_precision(np.ones(17))
        # equal scores of different images stand in another order
        assert np.allclose(weighted.average_precision(weights), expected, atol=0.02)


def test_a_match_takes_an_object_once_and_a_crowd_often():
    ious = np.array([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.0, 0.6]])
    found = match(ious, np.array([False, True]), THRESHOLDS[:3])
    assert found.tolist() == [[0, -1, 1, 1], [0, -1, 1, 1], [0, -1, 1, 1]]


def test_boxes_alone_and_no_detection():
    """Boxes without masks: sizes are by the boxes; nothing found is AP 0."""
    images = [
        (found._replace(masks=None), objects._replace(masks=None))
        for found, objects in set_of_images(10)
    ]
    results = measured(images, masks=False).compute().results
    assert set(results) == {
        "box_AP", "box_AP50", "box_AP75", "box_AP_small", "box_AP_medium", "box_AP_large",
    }  # fmt: skip
    nothing = Detections(*(part[:0] for part in images[0][0][:3]), None)
    results = measured([(nothing, objects) for _, objects in images], masks=False).compute()
    assert results.results["box_AP"] == 0


def test_one_class_alone():
    """Of which torchmetrics says a number where it says lists of several."""
    images = [
        (found._replace(labels=0 * found.labels), objects._replace(labels=0 * objects.labels))
        for found, objects in set_of_images(10)
    ]
    one_class = measured(images).compute()
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        ap = pycocotools_results(images, iou_type)[0][0]
        assert one_class.results[f"{kind}_AP"] == pytest.approx(ap, abs=1e-4)
        assert one_class.details[f"{kind}_AP_by_class"] == {"a": pytest.approx(ap, abs=1e-4)}


def one_image():
    """Two objects and a crowd region; found: one right, one as another class, one invention, one in
    the crowd, and an unsure one.
    """
    boxes = np.array([[0, 0, 40, 40], [50, 50, 90, 90], [100, 100, 190, 190]], np.float32)
    truth = Instances(boxes, np.array([0, 1, 2]), None, np.array([False, False, True]))
    found = np.array(
        [[0, 0, 40, 38], [50, 50, 90, 92], [0, 100, 30, 130], [110, 110, 130, 130], [0, 0, 40, 40]],
        np.float32,
    )
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.3], np.float32)
    return Detections(found, np.array([0, 2, 1, 2, 0]), scores, None), truth


def test_mistakes():
    measure = DetectionMeasure(NAMES[:3], False)
    found, truth = one_image()
    measure.update("bad.png", found, truth)
    measure.update("good.png", Detections(*(part[:1] for part in found[:3]), None), Instances(
        truth.boxes[:1], truth.labels[:1], None, truth.crowd[:1]
    ))  # fmt: skip
    details = measure.compute().details
    table = details["confusion"]
    assert table["truth"] == ["a", "b", "c", "background"]
    assert table["prediction"] == ["a", "b", "c", "missed"]
    assert table["counts"] == [[2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert details["worst"] == [{"image": "bad.png", "missed": 1, "false": 2}]


def test_what_cannot_be_measured():
    found, truth = one_image()
    with pytest.raises(UserError, match="masks=false"):
        DetectionMeasure(NAMES, True).update("a.png", found, truth)
    measure = DetectionMeasure(NAMES, False)
    measure.update("a.png", found, Instances(*(p[:0] for p in truth[:2]), None, truth.crowd[:0]))
    with pytest.raises(UserError, match="no test image has an object"):
        measure.compute()


def test_without_faster_coco_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-xcit\[detection\]'"):
        DetectionMeasure(NAMES, False)
