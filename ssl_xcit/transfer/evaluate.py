"""Measure a task on annotated images."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_xcit.data.decode import decode
from ssl_xcit.data.loader import parallel_map
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.task import AnnotatedSource, Measure, Measured, Prepare, Target, Task
from ssl_xcit.utils.hardware import default_workers
from ssl_xcit.utils.terminal import track

log = logging.getLogger(__name__)
MAX_EXAMPLES = 20  # bad images that are listed


class PreparedImage(NamedTuple):
    """A test image as the network takes it."""

    input: Tensor | None  # None: it could not be read
    target: Target | None  # None where the source has none
    size: tuple[int, int]  # (height, width) as decoded
    name: str
    reason: str  # why it could not be read


@dataclass(frozen=True)
class Preparation:
    """Images of a source by index, with their targets if they are `annotated`."""

    source: Source
    prepare: Prepare
    preprocess: Preprocess
    annotated: AnnotatedSource | None

    def __call__(self, index: int) -> PreparedImage:
        """Read and prepare an image; runs in loader processes."""
        name = self.source.name(index)
        try:
            pixels = decode(self.source.read(index), self.preprocess)
            height, width = pixels.shape[:2]
            known = self.annotated
            target = None if known is None else known.read_target(index, height, width)
            return PreparedImage(self.prepare(pixels), target, (height, width), name, "")
        except BadImage as error:
            return PreparedImage(None, None, (0, 0), name, str(error))


def log_bad(name: str, reason: str) -> None:
    """Log an image that is skipped."""
    log.warning("bad image skipped: %s (%s)", name, reason)


@dataclass(frozen=True)
class Prediction:
    """What a task says of an image."""

    name: str
    size: tuple[int, int]  # (height, width)
    prediction: Any
    target: Target | None


def predictions(
    task: Task,
    source: Source,
    annotated: AnnotatedSource | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    max_pixels: int | None = None,
    show: str | None = None,
    on_bad: Callable[[str, str], None] = log_bad,
) -> Iterator[Prediction]:
    """Yield predictions in order; bad images are skipped.

    Args:
        task: in eval mode, on `device`.
        source: the images.
        annotated: the same images with targets, which are read too.
        batch_size: images at once; None: as the task says, for images that are padded to one size
            share their padding in cross-covariance attention.
        num_workers: loader processes; None: one a core, less one.
        device: of the task.
        max_pixels: images with more by their header are refused; None: the usual limit.
        show: title of a progress bar; None: there is none.
        on_bad: gets the name of each bad image, and the reason.
    """
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    preprocess = of_weights(task.backbone.preprocess, **limit)
    prepared = Preparation(source, task.prepare, preprocess, annotated)
    workers = default_workers() if num_workers is None else num_workers
    chunk = batch_size or task.images_at_once
    batches = parallel_map(prepared, len(source), workers, chunk=chunk)
    for batch in track(batches, show or "", show=show is not None):
        read = [image for image in batch if image.input is not None]
        for image in batch:
            if image.input is None:
                on_bad(image.name, image.reason)
        if not read:
            continue
        inputs: Sequence[Tensor] = [i.input.to(device) for i in read if i.input is not None]
        with torch.no_grad():
            made = task.predict(inputs, [image.size for image in read])
        for image, prediction in zip(read, made, strict=True):
            yield Prediction(image.name, image.size, prediction, image.target)


class BadImages:
    """Counts test images that cannot be read, and keeps the first of them with the reasons."""

    def __init__(self, num_images: int):
        self.num_images, self.count = num_images, 0
        self.examples: list[dict[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """Add an image, and log it."""
        log_bad(name, reason)
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"image": name, "reason": reason})

    def record(self) -> dict[str, Any]:
        """Return them as plain data."""
        return {"count": self.count, "of": self.num_images, "examples": self.examples}


def bad_images_words(record: Mapping[str, Any] | None) -> str | None:
    """Say what `BadImages.record` holds; None: all could be read."""
    if not record or not record["count"]:
        return None
    first = record["examples"][0]
    return (
        f"{record['count']:,} of {record['of']:,} test images could not be read and are left out, "
        f"such as {first['image']} ({first['reason']})"
    )


def evaluate(
    task: Task,
    annotated: AnnotatedSource,
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    max_pixels: int | None = None,
    show: str | None = None,
    measure: Measure | None = None,
) -> Measured:
    """Measure a task on images. The task keeps its mode; no random number of torch's generators is
    drawn.

    Args:
        task: on `device`.
        annotated: the images.
        batch_size: see `predictions`, as of `num_workers`, `device`, `max_pixels` and `show`.
        measure: gets the predictions; None: a new one of the task.

    Returns:
        What the measure says, and in the details as `left_out` the images that cannot be read.

    Raises:
        UserError: none of the images can be read, or they cannot be measured.
    """
    network: Any = task
    training = network.training
    modes = {module: module.training for module in network.modules()}
    network.eval()
    measure = task.measure() if measure is None else measure
    bad = BadImages(len(annotated.images))
    try:
        made = predictions(
            task, annotated.images, annotated, batch_size, num_workers, device, max_pixels, show,
            bad.add,
        )  # fmt: skip
        for each in made:
            assert each.target is not None
            measure.update(each.name, each.prediction, each.target)
    finally:
        if training:
            for module, mode in modes.items():
                module.training = mode
    if bad.count == bad.num_images:
        raise UserError("none of the test images can be read: are these image files?")
    measured = measure.compute()
    return measured._replace(details=measured.details | {"left_out": bad.record()})
