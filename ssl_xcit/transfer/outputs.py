"""What files of predictions are: images with what a task says of them, and contexts that write it.

Each kind of file is a context that gives a function of one image; its files are made whole at the
end, or not at all.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.files import plain_names, replacing

QUALITY = 90  # of JPEG


class PredictedImage(NamedTuple):
    """What a task says of an image."""

    number: int  # from 0, in the order of the files
    path: Path
    size: tuple[int, int]  # (height, width) as decoded
    prediction: Any


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


Add: TypeAlias = Callable[[PredictedImage], None]


class Output(NamedTuple):
    """A kind of file."""

    write: Callable[[Job], AbstractContextManager[Add]]
    files: Callable[[Job], Iterable[str]]  # names of all that may be written, in the folder
    # what the task does in place of what is written, in words; None: it has this
    instead: Callable[[Task], str | None] = lambda task: None


@dataclass(frozen=True)
class Presentation:
    """How the predictions of a kind of task are written, counted and drawn."""

    tables: Sequence[Output]  # that are always written
    formats: Mapping[str, Output]  # more, by the word of `formats`
    classes: Callable[[Job, PredictedImage], Mapping[str, float]]  # how much of each is in an image
    mean: bool  # whether that is averaged over the images, or else summed
    summary: str  # what it is then, in words with the `threshold`
    number: str  # how it is printed
    draw_prediction: Callable[..., Image.Image]  # pixels, prediction, names, threshold, largest
    draw_target: Callable[..., Image.Image]  # pixels, target, names, largest
    # lets a task give what is above a threshold, where it would not of itself
    lower_threshold_: Callable[[Task, float], None] = lambda task, threshold: None


def named_files(*names: str) -> Callable[[Job], Iterable[str]]:
    """The same files whatever the images."""
    return lambda job: names


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


def mask_files(job: Job) -> Iterator[str]:
    """Names of a mask for each image."""
    return (f"masks/{name}.png" for name in job.names)


def save(picture: Image.Image, path: Path) -> None:
    """Write a JPEG or PNG file, whole or not at all."""
    with replacing(path) as part:
        if path.suffix == ".jpg":
            picture.save(part, "JPEG", quality=QUALITY)
        else:
            picture.save(part, "PNG")
