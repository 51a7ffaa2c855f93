"""Predict images, and write what a task says of them as tables, pictures and other files."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ssl_xcit.data.decode import decode, read_file
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import Files
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.training.memory import is_out_of_memory
from ssl_xcit.transfer.drawing import contact_sheet
from ssl_xcit.transfer.evaluate import predictions
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.outputs import Add, Job, Output, PredictedImage, save
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.files import read_json, write_json

RECORD = "predict.json"
FORMATS = ("coco", "masks")
IN_OVERVIEW = 24  # pictures


class Outcome(NamedTuple):
    """What came of all images."""

    num_read: int
    bad: dict[str, str]  # reasons by path
    classes: dict[str, float]  # images, objects or the mean share of the pixels, by class
    files: list[str]  # all that were written, in the folder


@contextmanager
def pictures(job: Job) -> Iterator[Add]:
    """`pictures/NAME.jpg`, and `overview.jpg` with a few of them."""
    task, preprocess = job.task, of_weights(job.task.backbone.preprocess, job.max_pixels)
    draw_prediction = KINDS[task.kind].presentation.draw_prediction
    drawn = sorted(job.pictured)
    in_overview = {drawn[i] for i in evenly_spaced(len(drawn), IN_OVERVIEW)}
    overview: list[tuple[str, Image.Image]] = []

    def add(image: PredictedImage) -> None:
        if image.number not in job.pictured:
            return
        pixels = decode(read_file(image.path), preprocess)
        picture = draw_prediction(
            pixels, image.prediction, task.class_names, job.threshold, job.largest
        )
        save(picture, job.out / "pictures" / f"{job.names[image.number]}.jpg")
        if image.number in in_overview:
            overview.append((image.path.name, picture))

    yield add
    if overview:
        save(contact_sheet(overview), job.out / "overview.jpg")


def picture_files(job: Job) -> Iterator[str]:
    """Yield the names of what `pictures` writes."""
    yield "overview.jpg"
    yield from (f"pictures/{job.names[i]}.jpg" for i in job.pictured)


def outputs_of(task: Task, formats: Sequence[str]) -> list[Output]:
    """What is written for a task.

    Raises:
        UserError: a format that the task has no results for.
    """
    presentation = KINDS[task.kind].presentation
    outputs = [*presentation.tables, Output(pictures, picture_files)]
    for word in formats:
        output = presentation.formats.get(word)
        instead = task.kind if output is None else output.instead(task)
        if output is None or instead is not None:
            raise UserError(
                f"formats={word}: the network does {instead}, which has no such results: leave it "
                "out"
            )
        outputs.append(output)
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
    presentation = KINDS[task.kind].presentation
    before = set(read_json(job.out / RECORD).get("files", []))
    before = {name for name in before if lies_in(job.out, name)}
    planned = {name for output in outputs for name in output.files(job)}
    write_json({**about, "files": sorted(before | planned)}, job.out / RECORD)
    numbers = {str(path): number for number, path in enumerate(job.images)}
    classes = Counter[str]()
    source = Files([str(path) for path in job.images])
    made = predictions(
        task, source, None, batch_size, num_workers, device,
        job.max_pixels, "predicting" if show else None, bad.__setitem__,
    )  # fmt: skip
    with ExitStack() as stack:
        adds = [stack.enter_context(output.write(job)) for output in outputs]
        try:
            for each in made:
                number = numbers[each.name]
                image = PredictedImage(number, job.images[number], each.size, each.prediction)
                for add in adds:
                    add(image)
                classes.update(presentation.classes(job, image))
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
    if presentation.mean:
        classes = Counter({name: round(share / num_read, 6) for name, share in classes.items()})
    files = sorted(name for name in planned if (job.out / name).is_file())
    for name in before - set(files):
        (job.out / name).unlink(missing_ok=True)
    outcome = Outcome(num_read, bad, dict(classes.most_common()), files)
    write_json({**about, **outcome._asdict()}, job.out / RECORD)
    return outcome


def lies_in(folder: Path, name: Any) -> bool:
    """Whether this is the name of something in the folder."""
    place = (folder / str(name)).resolve()
    return place != folder.resolve() and place.is_relative_to(folder.resolve())
