"""Classes by pixel as a table of shares, as masks and as coloured pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.transfer.drawing import (
    PAPER,
    UNKNOWN,
    Label,
    class_colours,
    shown,
    with_legend,
    with_masks,
)
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
from ssl_xcit.transfer.task import IGNORED
from ssl_xcit.utils.files import replacing

BACKGROUND = "background"  # pixels of a class of this name stay as they are


@contextmanager
def share_table(job: Job) -> Iterator[Add]:
    """`predictions.csv`: the share of each class in the pixels of each image."""
    names = job.task.class_names
    with table(job.out / "predictions.csv", ["path", *names]) as write:
        yield lambda image: write(
            [image.path, *(f"{s:.6f}" for s in shares(image.prediction, len(names)))]
        )


@contextmanager
def class_masks(job: Job) -> Iterator[Add]:
    """`masks/NAME.png` of class ids, whose names are the lines of `classes.txt`."""
    with replacing(job.out / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in job.task.class_names), encoding="utf-8")
    yield lambda image: save(
        Image.fromarray(image.prediction), job.out / "masks" / f"{job.names[image.number]}.png"
    )


def mask_and_class_files(job: Job) -> Iterable[str]:
    """Names of what `class_masks` writes."""
    return ["classes.txt", *mask_files(job)]


def classes_in(job: Job, image: PredictedImage) -> Mapping[str, float]:
    """The share of each class in the pixels, of those that are there."""
    names = job.task.class_names
    values = shares(image.prediction, len(names))
    return {name: value for name, value in zip(names, values, strict=True) if value}


def shares(mask: np.ndarray, num_classes: int) -> list[float]:
    """The share of each class in the pixels."""
    counts = np.bincount(mask.reshape(-1), minlength=num_classes)
    return (counts / mask.size).tolist()


def draw_class_mask(
    pixels: Pixels, mask: UInt8[np.ndarray, "h w"], class_names: Sequence[str], largest: int
) -> Image.Image:
    """Colour the pixels by their class, with a legend of the classes by their share; pixels without
    a class are grey, those of a class `background` as they were.
    """
    picture = shown(pixels, largest)
    counts = np.bincount(mask.reshape(-1), minlength=IGNORED + 1)
    colours = class_colours(len(class_names))
    present = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
    small = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    labels, masks, fills = [], [], []
    for k in present:
        known = k < len(class_names)
        name = class_names[k] if known else "no class"
        plain = name.casefold() == BACKGROUND
        colour = colours[k] if known else UNKNOWN
        labels.append(Label(f"{name} {counts[k] / mask.size:.1%}", PAPER if plain else colour))
        if not plain:
            masks.append(small == k)
            fills.append(colour)
    coloured = with_masks(picture, np.stack(masks), fills) if masks else picture
    return with_legend(coloured, labels)


def draw_predicted_mask(
    pixels: Pixels,
    mask: UInt8[np.ndarray, "h w"],
    class_names: Sequence[str],
    threshold: float,
    largest: int,
) -> Image.Image:
    """As `draw_class_mask`: every pixel has a class."""
    return draw_class_mask(pixels, mask, class_names, largest)


PRESENTATION = Presentation(
    tables=(Output(share_table, named_files("predictions.csv")),),
    formats={"masks": Output(class_masks, mask_and_class_files)},
    classes=classes_in,
    mean=True,
    summary="share of the pixels",
    number="{:.1%}",
    draw_prediction=draw_predicted_mask,
    draw_target=draw_class_mask,
)
