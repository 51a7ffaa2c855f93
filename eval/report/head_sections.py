"""Content of the report's sections about a run of `ssl-xcit finetune`: what it gets right and wrong
by class, and its predictions beside the truth.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_xcit.data.decode import decode
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.dataset import AnnotatedSubset
from ssl_xcit.transfer.evaluate import Prediction, predictions
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.task import AnnotatedSource, Task

from ..viz.markup import jpeg_uri
from ..viz.pictures import thumbnail, visible
from . import head_figures as figures
from .page import Table
from .run_features import RunFeatures
from .run_reader import Run, is_number

Content = dict[str, Any]  # of a section, by the arguments of its macro
NUM_IMAGES = 8  # of evenly spaced ones, and of the worst
SIDE = 320  # long side of a picture
CONFIDENT = 0.5  # score from which objects are drawn
TOP = 3  # classes below an image
MAX_LEFT_OUT = 200
DETAILS = "evaluation.json"
TITLES = {
    "accuracy": "Accuracy",
    "average_precision": "Average precision",
    "box_AP": "AP of boxes",
    "mask_AP": "AP of masks",
}


def classes_section(features: RunFeatures) -> Content:
    """Values by class, what is taken for what, calibration; raises UserError where the run has not
    been measured.
    """
    run = features.run
    if not run.details:
        raise UserError(f"{DETAILS}, which a run writes at its end, is not there or damaged")
    names = known_names(features)
    found = figures.class_values_in(run.details)
    confusion = figures.confusion_in(run.details, names)
    plots: list[tuple[str, str, Any]] = []
    if found:
        shown = min(len(found[0].values), figures.MAX_CLASSES)
        more = (
            f"the worst {shown} of {len(found[0].values)}" if shown < len(found[0].values) else ""
        )
        title = " and ".join(TITLES.get(each.metric, each.metric) for each in found)
        plots.append((f"{title} by class", more, figures.class_figure(found)))
    if confusion and (figure := figures.confusion_figure(confusion)):
        plots.append(("What is taken for what", "in % of the true class", figure))
    if figure := figures.calibration_figure(run.details):
        plots.append(("Calibration", "accuracy of predictions by their confidence", figure))
    for kind, words in (("box", "boxes"), ("mask", "masks")):
        if figure := figures.recall_figure(run.details, kind):
            plots.append((f"Precision by recall, {words}", "at IoU 0.5", figure))
    return {"plots": plots, "pairs": confusion and figures.confused_pairs(confusion)}


def known_names(features: RunFeatures) -> Sequence[str]:
    """The classes of the newest checkpoint; none where it cannot be read."""
    try:
        return features.task.class_names
    except Exception:  # the parts that need the task say why
        return []


def predictions_section(features: RunFeatures) -> Content:
    """Predictions beside the truth, of evenly spaced test images and of the worst. Raises
    UserError where there is no checkpoint, or the images are gone.
    """
    task, annotated = features.task, features.transfer_data.test
    source = annotated.images
    spaced = evenly_spaced(len(source), NUM_IMAGES)
    worst = worst_images(features.run)
    rows = {source.name(i): i for i in range(len(source))} if worst else {}
    known = [(rows[name], words) for name, words in worst if name in rows][:NUM_IMAGES]
    chosen = [*spaced, *(row for row, _ in known)]
    drawn = drawn_predictions(task, annotated, chosen, features)
    groups = [("Evenly spaced test images", [drawn[i] for i in spaced if i in drawn])]
    shown = [drawn[row] | {"words": words} for row, words in known if row in drawn]
    if shown:
        groups.append(("The worst test images", shown))
    return {"groups": groups, "words": WORDS[task.kind]}


WORDS: Mapping[str, str] = {
    "classification": "Below each image its class and the likeliest ones; wrong ones are outlined.",
    "segmentation": "The truth is on the left, the prediction on the right.",
    "detection": "The truth is on the left, on the right the predictions with a score of 0.5 and "
    "more.",
}


def drawn_predictions(
    task: Task, annotated: AnnotatedSource, chosen: Sequence[int], features: RunFeatures
) -> dict[int, Content]:
    """Pictures of test images by their index, without those that cannot be read."""
    order = sorted(set(chosen))
    rows = {annotated.images.name(i): i for i in order}
    subset = AnnotatedSubset(annotated, np.array(order, np.int64))
    preprocess = features.test_preprocess
    made = predictions(
        task, subset.images, subset, num_workers=0, device=features.task_device,
        max_pixels=preprocess.max_pixels,
    )  # fmt: skip
    return {
        rows[each.name]: picture(task, annotated, rows[each.name], each, preprocess)
        for each in made
    }


def picture(
    task: Task, annotated: AnnotatedSource, row: int, made: Prediction, preprocess: Preprocess
) -> Content:
    """Truth and prediction as pictures, of classification the latter alone."""
    pixels = decode(annotated.images.read(row), preprocess)
    names = task.class_names
    assert made.target is not None
    content: Content = {"name": made.name, "words": os.path.basename(made.name), "more": ""}
    if task.kind == "classification":
        shown = jpeg_uri(thumbnail(visible(pixels), SIDE))
        return content | {"uris": [shown], **class_words(made, names)}
    presentation = KINDS[task.kind].presentation
    truth = presentation.draw_target(pixels, made.target, names, SIDE)
    drawn = presentation.draw_prediction(pixels, made.prediction, names, CONFIDENT, SIDE)
    return content | {"uris": [jpeg_uri(np.asarray(p)) for p in (truth, drawn)], "wrong": False}


def class_words(made: Prediction, names: Sequence[str]) -> Content:
    """The true class or classes, the likeliest ones, and whether these are wrong."""
    likeliest: list[int] = np.argsort(-made.prediction, kind="stable")[:TOP].tolist()
    more = ", ".join(f"{names[k]} {made.prediction[k]:.0%}" for k in likeliest)
    target = np.asarray(made.target)
    if target.ndim:
        true = ", ".join(names[k] for k in np.flatnonzero(target).tolist()) or "no class"
        wrong = bool(((made.prediction >= 0.5) != target.astype(bool)).any())
    else:
        true, wrong = names[int(target)], likeliest[0] != int(target)
    return {"words": f"true: {true}", "more": more, "wrong": wrong}


def worst_images(run: Run) -> list[tuple[str, str]]:
    """The worst test images by name, the worst first, and what is wrong with them in words."""
    found = run.details.get("worst")
    if isinstance(found, list):
        return [
            (str(each["image"]), worst_words(each))
            for each in found
            if isinstance(each, dict) and "image" in each
        ]
    found = run.details.get("worst_images")
    return [
        (str(each[0]), f"mIoU {each[1]:.1f} %")
        for each in (found if isinstance(found, list) else [])
        if isinstance(each, list) and len(each) == 2 and is_number(each[1])
    ]


def worst_words(each: Mapping[str, Any]) -> str:
    """What is wrong with an image."""
    if "missed" in each:
        return f"{each['missed']} missed, {each.get('false')} false"
    if "class" in each:
        return f"{each['class']}: {'true' if each.get('true') else 'not true'}"
    return f"true: {each.get('true')}"


def left_out(features: RunFeatures) -> Content | None:
    """Test images that could not be read, and annotations that were not usable; None where there
    are none, or the data are gone.
    """
    if features.run.transfer is None:
        return None
    sentences, rows = bad_test_images(features.run)
    lines = unusable_annotations(features)
    if lines:
        sentences.append(f"{len(lines):,} annotations could not be used.")
        rows += [[line, "annotation"] for line in lines]
    if not sentences:
        return None
    more = f" (the first {MAX_LEFT_OUT})" if len(rows) > MAX_LEFT_OUT else ""
    return {
        "words": " ".join(sentences),
        "title": f"which{more}",
        "table": Table(["left out", ""], rows[:MAX_LEFT_OUT], code=1),
    }


def bad_test_images(run: Run) -> tuple[list[str], list[list[str]]]:
    """Test images that could not be read at the end of a run, as a sentence and rows; both empty
    where there are none.
    """
    found = run.details.get("left_out")
    record = found if isinstance(found, dict) else {}
    count, examples = record.get("count"), record.get("examples")
    if not is_number(count) or not count:
        return [], []
    rows = [
        [f"{each.get('image')}: {each.get('reason')}", "test image"]
        for each in (examples if isinstance(examples, list) else [])
        if isinstance(each, dict)
    ]
    return [f"{count} of {record.get('of')} test images could not be read."], rows


def unusable_annotations(features: RunFeatures) -> list[str]:
    """A line for each; none where the data are gone."""
    try:
        data = features.transfer_data
    except Exception:  # the parts that show images say why
        return []
    return list(dict.fromkeys([*data.train.left_out, *data.test.left_out]))
