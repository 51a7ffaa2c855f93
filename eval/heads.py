"""Measure what has a head for a task: runs of `ssl-xcit finetune`, and published classifiers by
their own logits.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Float

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import MAX_PIXELS
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.devices import placed
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification.data import of_pair
from ssl_xcit.transfer.classification.measure import AccuracyMeasure, MultiLabelMeasure
from ssl_xcit.transfer.classification.task import Classification, CropRatio
from ssl_xcit.transfer.detection.measure import DetectionMeasure
from ssl_xcit.transfer.evaluate import evaluate
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.segmentation.measure import SegmentationMeasure, summaries
from ssl_xcit.transfer.task import AnnotatedSource, Measure, Measured, Task
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.validation import Checker, Count, Workers

from .results import ByClass, Evaluation
from .statistics import Estimate

FEW = 5  # classes that are named in a message


def evaluate_tasks(
    tasks: Mapping[str, Task],
    annotated: AnnotatedSource,
    name: str,
    batch_size: Count = 64,
    num_workers: Workers = None,
    device: str = "auto",
    max_pixels: Count = MAX_PIXELS,
) -> Evaluation:
    """Measure tasks with their own heads on annotated images.

    Args:
        tasks: by row, in eval mode; moved to `device`.
        annotated: the images.
        name: of these, for messages.
        batch_size: images at once of classifiers; other tasks take one by one, since padding to one
            size would change what they say.
        num_workers: loader processes; None: one a core, less one.
        device: `auto` takes the first GPU that there is.
        max_pixels: images with more by their header are refused.

    Raises:
        UserError: the images have other classes than a head.
    """
    for row, task in tasks.items():
        check_same_classes(row, task.class_names, annotated.class_names, name)
    evaluation = Evaluation()
    for row, task in tasks.items():
        started = time.perf_counter()
        network: Any = task
        first, *_ = placed(network, device)
        measure = task.measure()
        at_once = batch_size if task.images_at_once > 1 else None
        measured = evaluate(
            task, annotated, at_once, num_workers, first, max_pixels,
            f"testing {row}" if shown_in_terminal() else None, measure,
        )  # fmt: skip
        evaluation.bad_images[row] = measured.details["left_out"]
        evaluation.results[row] = {**measured.results, **estimates(measure)}
        evaluation.bounds[row] = {m: list(bounds) for m, bounds in measured.intervals.items()}
        evaluation.by_class[row] = classes_of(measure, measured)
        evaluation.seconds[row] = {task.kind: round(time.perf_counter() - started, 3)}
    return evaluation


def evaluate_head(
    backbone: XCiT | Mapping[str, XCiT],
    pair: LabelledPair | None,
    size: Count = 224,
    crop_ratio: CropRatio = 1.0,
    batch_size: Count = 64,
    num_workers: Workers = None,
    device: str = "auto",
    max_pixels: Count = MAX_PIXELS,
    ranks: bool = False,
) -> Evaluation:
    """Measure classifiers by their own logits on the test images of a pair.

    Args:
        backbone: with its `head`; several by name.
        pair: labelled images.
        size: side of test images in pixels.
        crop_ratio: images are resized to size / crop_ratio, and their central square is used.
        batch_size: images at once.
        num_workers: loader processes; None: one a core, less one.
        device: `auto` takes the first GPU that there is.
        max_pixels: images with more by their header are refused.
        ranks: all ranks of the process group are here; the first one measures.

    Raises:
        UserError: no labelled images, no head, or one for other classes.
    """
    if pair is None:
        raise UserError(
            "evaluation=head measures labelled images: name some with eval_data=imagenet or "
            "eval_data.root=DIR"
        )
    networks = backbone if isinstance(backbone, Mapping) else {"pretrained": backbone}
    data = of_pair(pair).test
    several = label_kind(np.asarray(data.images.labels)) == "several"
    tasks: dict[str, Task] = {}
    for row, network in networks.items():
        if not (count := network.architecture["num_classes"]):
            raise UserError(
                f"evaluation=head: the {row} weights have no classifier; ssl-xcit finetune "
                "ckpt=... trains one, and evaluation=standard measures their features"
            )
        if count != len(data.class_names):
            raise UserError(
                f"evaluation=head: {pair.name} has {len(data.class_names):,} classes, and the "
                f"classifier of the {row} weights has {count:,}: name images of its classes"
            )
        task: Any = Classification(network, data.class_names, size, crop_ratio, several)
        tasks[row] = task.eval()
    if ranks and dist.get_rank():
        return Evaluation()
    return evaluate_tasks(tasks, data, pair.name, batch_size, num_workers, device, max_pixels)


OF_CLASSES = ("class_names", "ignore", "label_kind")  # settings of data that other images share


def named_test_data(
    task: Task, given: Mapping[str, Any], of_run: Mapping[str, Any]
) -> tuple[AnnotatedSource, str]:
    """Test images that a person names for a task, with its classes, and their name: the test part
    of a folder where it has one, else all of its images.

    Args:
        task: has the classes.
        given: settings of `data` in `conf/transfer/`.
        of_run: those of the run, of which the ones that say what the classes are hold here too.

    Raises:
        UserError: the task's data has no such setting, or the images cannot be used.
    """
    read = KINDS[task.kind].read_test
    known = [name for name in signature(read).parameters if name != "task"]
    if unknown := [key for key in given if key not in known]:
        there = ", ".join(known)
        raise UserError(f"data.{unknown[0]}: {task.kind} has no such setting; there are {there}")
    named = given.get("file", given.get("root"))
    if named is None:
        raise UserError(f"data.{next(iter(given))}: name the images as well, data.root=DIR")
    shared = {k: v for k in OF_CLASSES if k in known and (v := of_run.get(k)) is not None}
    settings = {"_target_": f"{read.__module__}.{read.__name__}", **shared, **given}
    checked: Any = Checker({}).target(settings, "data")
    return read(task, **{k: v for k, v in checked.items() if k != "_target_"}), str(named)


def check_same_classes(row: str, own: Sequence[str], there: Sequence[str], name: str) -> None:
    """Raise UserError where images have other classes than a head."""
    if list(own) == list(there):
        return
    heads, images = (
        f"{len(names):,} ({', '.join(names[:FEW])}{', ...' if len(names) > FEW else ''})"
        for names in (own, there)
    )
    raise UserError(
        f"{name} has other classes than the head of {row}: {images}, and the head {heads}; name "
        "images of its classes with data.root=DIR"
    )


def estimates(measure: Measure) -> dict[str, Estimate]:
    """The numbers that two rows can be compared in image by image."""
    if isinstance(measure, AccuracyMeasure):
        ranks = np.array(measure.ranks)
        known = {"top1": 1, "top5": 5} if len(measure.class_names) > 5 else {"top1": 1}
        return {name: Estimate(ranks < most) for name, most in known.items()}
    if isinstance(measure, SegmentationMeasure):
        counts = np.array(measure.counts, np.float64)
        total = summaries(counts.sum(axis=0, keepdims=True))
        return {
            name: Estimate(counts, partial(of_counts, name))
            for name, (value,) in total.items()
            if np.isfinite(value)
        }
    return {}


def of_counts(name: str, counts: Float[np.ndarray, "Q 3 K"], weights: np.ndarray) -> float:
    """A number of segmentation, of images that count so much each."""
    return float(summaries(np.tensordot(weights, counts, axes=1)[None])[name][0])


def classes_of(measure: Measure, measured: Measured) -> dict[str, ByClass]:
    """By metric, the value of each class and the number of test images that have it."""
    details = measured.details
    if isinstance(measure, AccuracyMeasure):
        rows = details["per_class"]
        return {"top1": {c["class"]: (c["accuracy"], c["images"]) for c in rows}}
    if isinstance(measure, MultiLabelMeasure):
        rows = details["per_class"]
        return {"mAP": {c["class"]: (c["average_precision"], c["images"]) for c in rows}}
    if isinstance(measure, SegmentationMeasure):
        present = (np.array(measure.counts)[:, 1] > 0).sum(axis=0).tolist()
        values = details["class_iou"].items()
        return {
            "miou": {
                name: (value, count)
                for (name, value), count in zip(values, present, strict=True)
                if value is not None
            }
        }
    assert isinstance(measure, DetectionMeasure)
    return {
        f"{kind}_AP": {
            name: (value, images_with(measure, kind, name))
            for name, value in details[f"{kind}_AP_by_class"].items()
        }
        for kind in measure.kinds
    }


def images_with(measure: DetectionMeasure, kind: str, name: str) -> int:
    """How many test images have an object of a class."""
    images = measure.matches[kind][measure.class_names.index(name)].values()
    return sum(matches.num_objects > 0 for matches in images)
