"""Write what a task says of images: tables, pictures, and files for other tools.

Each kind of file is a context that gives a function of one image; its files are made whole at the
end, or not at all.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ssl_xcit.data.decode import decode, read_file
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import Files
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.training.memory import is_out_of_memory
from ssl_xcit.transfer.detection.masks import runs_of, runs_to_text
from ssl_xcit.transfer.drawing import contact_sheet, draw_prediction
from ssl_xcit.transfer.evaluate import predictions
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.files import plain_names, read_json, replacing, write_json

RECORD = "predict.json"
NEXT = 4  # classes in the table after the likeliest
IN_OVERVIEW = 24  # pictures
QUALITY = 90  # of JPEG


class PredictedImage(NamedTuple):
    """What a task says of an image."""

    number: int  # from 0, in the order of the files
    path: Path
    size: tuple[int, int]  # (height, width) as decoded
    prediction: Any


class Outcome(NamedTuple):
    """What came of all images."""

    num_read: int
    bad: dict[str, str]  # reasons by path
    classes: dict[str, float]  # images, objects or the mean share of the pixels, by class
    files: list[str]  # all that were written, in the folder


@dataclass(frozen=True)
class Job:
    """Images to predict, and how results are written."""

    task: Task  # in eval mode, on its device
    images: Sequence[Path]
    root: Path | None  # COCO's file names are relative to it
    out: Path
    threshold: float  # of scores, of several labels of probabilities
    max_pixels: int
    max_pictures: int
    largest: int  # long side of a picture in pixels

    @cached_property
    def names(self) -> list[str]:
        """A name for files of its own, without an ending, by number of the image."""
        return plain_names([path.stem for path in self.images])

    @cached_property
    def pictured(self) -> set[int]:
        """Numbers of the images that are drawn."""
        return set(evenly_spaced(len(self.images), self.max_pictures))


Add = Callable[[PredictedImage], None]
Output = Callable[[Job], AbstractContextManager[Add]]


def confident(job: Job, image: PredictedImage) -> int:
    """How many of the detections of an image reach the threshold; they are the first ones."""
    return int((image.prediction.scores >= job.threshold).sum())


@contextmanager
def table(path: Path, header: Sequence[str]) -> Iterator[Callable[[Sequence[Any]], Any]]:
    """A CSV file, as a function that writes a row."""
    with (
        replacing(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        yield writer.writerow


@contextmanager
def class_table(job: Job) -> Iterator[Add]:
    """`predictions.csv`: the likeliest classes of each image, and of several labels all that reach
    the threshold.
    """
    names = job.task.class_names
    several = bool(job.task.settings["multi_label"])
    numbers = ["", *(f"_{i + 2}" for i in range(min(NEXT, len(names) - 1)))]
    header = ["path", *(f"{word}{i}" for i in numbers for word in ("class", "probability"))]
    with table(job.out / "predictions.csv", header + ["classes"] * several) as write:

        def add(image: PredictedImage) -> None:
            order = np.argsort(-image.prediction, kind="stable").tolist()
            row: list[Any] = [image.path]
            for k in order[: len(numbers)]:
                row += [names[k], f"{image.prediction[k]:.6f}"]
            if several:
                chosen = [names[k] for k in order if image.prediction[k] >= job.threshold]
                row.append(";".join(chosen))
            write(row)

        yield add


@contextmanager
def share_table(job: Job) -> Iterator[Add]:
    """`predictions.csv`: the share of each class in the pixels of each image."""
    names = job.task.class_names
    with table(job.out / "predictions.csv", ["path", *names]) as write:
        yield lambda image: write(
            [image.path, *(f"{s:.6f}" for s in shares(image.prediction, len(names)))]
        )


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
                pixels = "" if found.masks is None else int(found.masks[i].sum())
                name, score = job.task.class_names[found.labels[i]], f"{found.scores[i]:.4f}"
                write([image.path, i + 1, name, score, *box, pixels])

        yield add


@contextmanager
def pictures(job: Job) -> Iterator[Add]:
    """`pictures/NAME.jpg`, and `overview.jpg` with a few of them."""
    task, preprocess = job.task, of_weights(job.task.backbone.preprocess, job.max_pixels)
    drawn = sorted(job.pictured)
    in_overview = {drawn[i] for i in evenly_spaced(len(drawn), IN_OVERVIEW)}
    overview: list[tuple[str, Image.Image]] = []

    def add(image: PredictedImage) -> None:
        if image.number not in job.pictured:
            return
        pixels = decode(read_file(image.path), preprocess)
        picture = draw_prediction(
            pixels, image.prediction, task.class_names, task.kind, job.threshold, job.largest
        )
        save(picture, job.out / "pictures" / f"{job.names[image.number]}.jpg")
        if image.number in in_overview:
            overview.append((image.path.name, picture))

    yield add
    if overview:
        save(contact_sheet(overview), job.out / "overview.jpg")


@contextmanager
def class_masks(job: Job) -> Iterator[Add]:
    """`masks/NAME.png` of class ids, whose names are the lines of `classes.txt`."""
    with replacing(job.out / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in job.task.class_names), encoding="utf-8")
    yield lambda image: save(
        Image.fromarray(image.prediction), job.out / "masks" / f"{job.names[image.number]}.png"
    )


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
            images.append(
                {
                    "id": image.number + 1,
                    "file_name": str(file_name(image.path, job.root)),
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
            text = runs_to_text(runs_of(found.masks[i]))
            result["segmentation"] = {"size": list(image.size), "counts": text}
        yield result


TABLES: Mapping[str, Sequence[Output]] = {
    "classification": (class_table,),
    "segmentation": (share_table,),
    "detection": (count_table, object_table),
}
FORMATS: Mapping[str, Mapping[str, Output]] = {  # by kind of task
    "coco": {"detection": coco_results},
    "masks": {"segmentation": class_masks, "detection": instance_masks},
}


def outputs_of(task: Task, formats: Sequence[str]) -> list[Output]:
    """What is written for a task.

    Raises:
        UserError: a format that the task has no results for.
    """
    outputs = [*TABLES[task.kind], pictures]
    for word in formats:
        fitting = FORMATS[word].get(task.kind)
        boxes_only = word == "masks" and task.settings.get("masks") is False
        if fitting is None or boxes_only:
            what = "boxes alone" if boxes_only else task.kind
            raise UserError(
                f"formats={word}: the network does {what}, which has no such results: leave it out"
            )
        outputs.append(fitting)
    return outputs


def predict(
    job: Job,
    outputs: Sequence[Output],
    about: Mapping[str, Any],
    batch_size: int | None,
    num_workers: int | None,
    device: torch.device,
    show: bool,
) -> Outcome:
    """Predict all images and write what `outputs` make of it, and `predict.json`; files of an
    earlier call that this one does not write are removed.

    Args:
        job: the images.
        outputs: see `outputs_of`.
        about: what `predict.json` begins with.
        batch_size: images at once; None: see `evaluate.predictions`.
        num_workers: loader processes; None: one a core, less one.
        device: of the task.
        show: whether there is a progress bar.

    Raises:
        RunFailed: no image can be read, or memory has run out.
    """
    task, bad = job.task, dict[str, str]()
    before = set(read_json(job.out / RECORD).get("files", []))
    before = {name for name in before if lies_in(job.out, name)}
    planned = set(planned_files(job, outputs))
    write_json({**about, "files": sorted(before | planned)}, job.out / RECORD)
    numbers = {str(path): number for number, path in enumerate(job.images)}
    classes = Counter[str]()
    source = Files([str(path) for path in job.images])
    made = predictions(
        task, source, None, batch_size, num_workers, device,
        job.max_pixels, "predicting" if show else None, bad.__setitem__,
    )  # fmt: skip
    with ExitStack() as stack:
        adds = [stack.enter_context(output(job)) for output in outputs]
        try:
            for each in made:
                number = numbers[each.name]
                image = PredictedImage(number, job.images[number], each.size, each.prediction)
                for add in adds:
                    add(image)
                classes.update(present(job, image))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailed(
                "out of memory: a smaller batch_size takes less, and so does a smaller max_pixels, "
                "above which images are left out"
            ) from error
        num_read = len(job.images) - len(bad)
        if num_read == 0:
            name, reason = next(iter(bad.items()))
            raise RunFailed(f"none of {len(bad):,} images can be read, such as {name} ({reason})")
    if task.kind == "segmentation":
        classes = Counter({name: round(share / num_read, 6) for name, share in classes.items()})
    files = sorted(name for name in planned if (job.out / name).is_file())
    for name in before - set(files):
        (job.out / name).unlink(missing_ok=True)
    outcome = Outcome(num_read, bad, dict(classes.most_common()), files)
    write_json({**about, **outcome._asdict()}, job.out / RECORD)
    return outcome


def planned_files(job: Job, outputs: Sequence[Output]) -> Iterator[str]:
    """Yield the names of files that may be written, in the folder."""
    yield "predictions.csv"
    yield "overview.jpg"
    yield from (f"pictures/{job.names[i]}.jpg" for i in job.pictured)
    if object_table in outputs:
        yield "detections.csv"
    if coco_results in outputs:
        yield from ("predictions.json", "images.json")
    if class_masks in outputs:
        yield "classes.txt"
    if class_masks in outputs or instance_masks in outputs:
        yield from (f"masks/{name}.png" for name in job.names)


def present(job: Job, image: PredictedImage) -> Mapping[str, float]:
    """The classes of an image: how many objects, or which share of its pixels, or 1 for those that
    it is of.
    """
    names, prediction = job.task.class_names, image.prediction
    if job.task.kind == "segmentation":
        values: Sequence[float] = shares(prediction, len(names))
        return {name: value for name, value in zip(names, values, strict=True) if value}
    if job.task.kind == "detection":
        return Counter(names[k] for k in prediction.labels[: confident(job, image)].tolist())
    if job.task.settings["multi_label"]:
        return {names[k]: 1 for k in np.flatnonzero(prediction >= job.threshold).tolist()}
    return {names[int(prediction.argmax())]: 1}


def shares(mask: np.ndarray, num_classes: int) -> list[float]:
    """The share of each class in the pixels."""
    counts = np.bincount(mask.reshape(-1), minlength=num_classes)
    return (counts / mask.size).tolist()


def lies_in(folder: Path, name: Any) -> bool:
    """Whether this is the name of something in the folder."""
    place = (folder / str(name)).resolve()
    return place != folder.resolve() and place.is_relative_to(folder.resolve())


def file_name(path: Path, root: Path | None) -> Path:
    """A path as COCO has it: relative to the folder of the images where there is one."""
    return path if root is None else path.relative_to(root)


def save(picture: Image.Image, path: Path) -> None:
    """Write a JPEG or PNG file, whole or not at all."""
    with replacing(path) as part:
        if path.suffix == ".jpg":
            picture.save(part, "JPEG", quality=QUALITY)
        else:
            picture.save(part, "PNG")
