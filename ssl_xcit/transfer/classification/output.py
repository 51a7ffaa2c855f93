"""Classes of images as a table, and below pictures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.transfer.drawing import UNKNOWN, Label, class_colours, shown, with_legend
from ssl_xcit.transfer.outputs import (
    Add,
    Job,
    Output,
    PredictedImage,
    Presentation,
    named_files,
    table,
)

NEXT = 4  # classes in the table after the likeliest
TOP = 3  # classes below a picture


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


def classes_in(job: Job, image: PredictedImage) -> Mapping[str, float]:
    """1 for the likeliest class, of several labels for all that reach the threshold."""
    names, prediction = job.task.class_names, image.prediction
    if job.task.settings["multi_label"]:
        return {names[k]: 1 for k in np.flatnonzero(prediction >= job.threshold).tolist()}
    return {names[int(prediction.argmax())]: 1}


def draw_probabilities(
    pixels: Pixels,
    probabilities: Float[np.ndarray, " K"],
    class_names: Sequence[str],
    threshold: float,
    largest: int,
) -> Image.Image:
    """Write the likeliest classes below the image, with their probabilities."""
    colours = class_colours(len(class_names))
    order = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    labels = [Label(f"{class_names[k]} {probabilities[k]:.1%}", colours[k]) for k in order]
    return with_legend(shown(pixels, largest), labels)


def draw_classes(
    pixels: Pixels, target: Int[np.ndarray, "*K"], class_names: Sequence[str], largest: int
) -> Image.Image:
    """Write the class below the image, or those that a row of 0 and 1 marks."""
    colours = class_colours(len(class_names))
    classes = np.flatnonzero(target).tolist() if target.ndim else [int(target)]
    labels = [Label(class_names[k], colours[k]) for k in classes]
    return with_legend(shown(pixels, largest), labels or [Label("no class", UNKNOWN)])


PRESENTATION = Presentation(
    tables=(Output(class_table, named_files("predictions.csv")),),
    formats={},
    classes=classes_in,
    mean=False,
    summary="images by class",
    number="{:,.0f}",
    draw_prediction=draw_probabilities,
    draw_target=draw_classes,
)
