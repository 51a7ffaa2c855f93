"""Objects as tables, as COCO's results, as masks and in pictures."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.transfer.detection.masks import runs_to_text
from ssl_xcit.transfer.detection.measure import Detections
from ssl_xcit.transfer.drawing import UNKNOWN, Label, class_colours, with_objects
from ssl_xcit.transfer.outputs import (
    Add,
    Job,
    Output,
    PredictedImage,
    Presentation,
    mask_files,
    named_files,
    save,
    table,
)
from ssl_xcit.transfer.task import Instances, Task
from ssl_xcit.utils.files import replacing, write_json


def confident(job: Job, image: PredictedImage) -> int:
    """How many of the detections of an image reach the threshold; they are the first ones."""
    return int((image.prediction.scores >= job.threshold).sum())


@contextmanager
def count_table(job: Job) -> Iterator[Add]:
    """`predictions.csv`: how many objects of each class are in each image."""
    names = job.task.class_names
    with table(job.out / "predictions.csv", ["path", "objects", *names]) as write:

        def add(image: PredictedImage) -> None:
            count = confident(job, image)
            labels = image.prediction.labels[:count]
            write([image.path, count, *np.bincount(labels, minlength=len(names)).tolist()])

        yield add


@contextmanager
def object_table(job: Job) -> Iterator[Add]:
    """`detections.csv`: each object with its box in pixels, and how many pixels its mask has."""
    header = ["path", "object", "class", "score", "left", "top", "right", "bottom", "pixels"]
    with table(job.out / "detections.csv", header) as write:

        def add(image: PredictedImage) -> None:
            found = image.prediction
            for i in range(confident(job, image)):
                box = [f"{side:.2f}" for side in found.boxes[i].tolist()]
                pixels = "" if found.masks is None else found.masks.num_pixels(i)
                name, score = job.task.class_names[found.labels[i]], f"{found.scores[i]:.4f}"
                write([image.path, i + 1, name, score, *box, pixels])

        yield add


@contextmanager
def instance_masks(job: Job) -> Iterator[Add]:
    """`masks/NAME.png`: by pixel 0, or the number in `detections.csv` of the object that has the
    highest score there.
    """

    def add(image: PredictedImage) -> None:
        count = confident(job, image)
        ids = np.zeros(image.size, np.uint8 if count < 256 else np.uint16)
        for i in reversed(range(count)):
            ids[image.prediction.masks[i]] = i + 1
        save(Image.fromarray(ids), job.out / "masks" / f"{job.names[image.number]}.png")

    yield add


def boxes_alone(task: Task) -> str | None:
    """What a network without masks does, in words."""
    return None if task.settings["masks"] else "boxes alone"


@contextmanager
def coco_results(job: Job) -> Iterator[Add]:
    """`predictions.json`: all detections, whatever their score, as COCO's results with compressed
    RLE; and `images.json`: the images and categories that their ids mean.
    """
    images: list[dict[str, Any]] = []
    with (
        replacing(job.out / "predictions.json") as part,
        part.open("w", encoding="utf-8") as file,
    ):
        written = 0

        def add(image: PredictedImage) -> None:
            nonlocal written
            height, width = image.size
            path = image.path if job.root is None else image.path.relative_to(job.root)
            images.append(
                {
                    "id": image.number + 1,
                    "file_name": str(path),
                    "height": height,
                    "width": width,
                }
            )
            for result in coco_of(image):
                file.write(("[\n" if written == 0 else ",\n") + json.dumps(result))
                written += 1

        yield add
        file.write("\n]\n" if written else "[]\n")
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(job.task.class_names)]
    content = {"images": images, "categories": categories, "annotations": []}
    write_json(content, job.out / "images.json")


def coco_of(image: PredictedImage) -> Iterator[dict[str, Any]]:
    """Yield the detections of an image as results of COCO."""
    found = image.prediction
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        result = {
            "image_id": image.number + 1,
            "category_id": int(found.labels[i]) + 1,
            "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
            "score": round(float(found.scores[i]), 5),
        }
        if found.masks is not None:
            text = runs_to_text(found.masks.runs[i].tolist())
            result["segmentation"] = {"size": list(image.size), "counts": text}
        yield result


def classes_in(job: Job, image: PredictedImage) -> Mapping[str, float]:
    """How many objects of each class reach the threshold."""
    labels = image.prediction.labels[: confident(job, image)].tolist()
    return Counter(job.task.class_names[k] for k in labels)


def lower_threshold_(task: Any, threshold: float) -> None:
    """Make a detector give the detections from this score on; one that gives more stays as it is,
    and so do its settings, which are those of the run.
    """
    heads = task.network.roi_heads
    heads.score_thresh = min(heads.score_thresh, threshold)


def draw_detections(
    pixels: Pixels,
    detections: Detections,
    class_names: Sequence[str],
    threshold: float,
    largest: int,
) -> Image.Image:
    """Draw boxes with class and score, and the objects' pixels; the highest score on top."""
    colours = class_colours(len(class_names))
    chosen = np.flatnonzero(detections.scores >= threshold)[::-1]
    labels = [
        Label(f"{class_names[k]} {score:.2f}", colours[k])
        for k, score in zip(
            detections.labels[chosen].tolist(), detections.scores[chosen].tolist(), strict=True
        )
    ]
    masks = None if detections.masks is None else detections.masks[chosen]
    return with_objects(pixels, detections.boxes[chosen], labels, masks, largest)


def draw_instances(
    pixels: Pixels, instances: Instances, class_names: Sequence[str], largest: int
) -> Image.Image:
    """Draw boxes with class, and the objects' pixels; crowd regions are grey."""
    colours = class_colours(len(class_names))
    labels = [
        Label(f"{class_names[k]} (crowd)", UNKNOWN) if crowd else Label(class_names[k], colours[k])
        for k, crowd in zip(instances.labels.tolist(), instances.crowd.tolist(), strict=True)
    ]
    return with_objects(pixels, instances.boxes, labels, instances.masks, largest)


PRESENTATION = Presentation(
    tables=(
        Output(count_table, named_files("predictions.csv")),
        Output(object_table, named_files("detections.csv")),
    ),
    formats={
        "coco": Output(coco_results, named_files("predictions.json", "images.json")),
        "masks": Output(instance_masks, mask_files, boxes_alone),
    },
    classes=classes_in,
    mean=False,
    summary="objects of score {threshold:g} and above",
    number="{:,.0f}",
    draw_prediction=draw_detections,
    draw_target=draw_instances,
    lower_threshold_=lower_threshold_,
)
