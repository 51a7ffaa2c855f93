"""Training samples by position, with repeated augmentation and a share of the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from ssl_xcit.data.crop_dataset import MAX_REPLACEMENTS
from ssl_xcit.data.decode import decode
from ssl_xcit.data.identity import DataIndex, index_of
from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.data.order import crop_seed, fallback_index, image_at
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source, Subset, some_rows, stratified
from ssl_xcit.transfer.task import AnnotatedSource, Augment, Target, TransferData


class Sample(NamedTuple):
    """An augmented image with its target."""

    image: Tensor | None  # None: no image could be read
    target: Any
    place: int  # of the image in its source
    replaced: tuple[Replaced, ...]


class TransferBatch(NamedTuple):
    """B images with their targets; stacked where all have one shape, otherwise lists."""

    images: Tensor | list[Tensor]
    targets: Any
    indices: Tensor | int  # -1: an image could not be read at all
    replaced: tuple[Replaced, ...]

    def parts(self, count: int) -> list[tuple[Any, Any]]:
        """At most so many parts of images and targets, see `part_sizes`."""
        sizes = part_sizes(len(self.images), count)
        starts = [i * sizes[0] for i in range(len(sizes))]
        return [
            (self.images[start : start + size], self.targets[start : start + size])
            for start, size in zip(starts, sizes, strict=True)
        ]


def part_sizes(num_images: int, count: int) -> list[int]:
    """Images in each of at most `count` parts of a batch, as `Tensor.chunk` makes them: all but the
    last, which may be smaller, are of one size.
    """
    size = -(-num_images // count)
    return [min(size, num_images - start) for start in range(0, num_images, size)]


@dataclass(eq=False)
class TransferDataset(Dataset[Sample]):
    """Augmented images by position (see `data/order.py`); a bad image or target is replaced.

    With `repeats`, so many positions that follow one another show the same image, each augmented by
    itself (repeated augmentation, arXiv:1901.09335): an epoch, which is as many positions as there
    are images, then shows that share of them.
    """

    annotated: AnnotatedSource
    augment: Augment
    seed: int
    preprocess: Preprocess
    repeats: int = 1

    @property
    def source(self) -> Source:
        """The images."""
        return self.annotated.images

    def __getitem__(self, position: int) -> Sample:
        num_images = len(self.source)
        if self.source.shards is not None:
            self.source.shards.announce(self.seed, position // self.repeats)
        wanted = image_at(self.seed, position // self.repeats, num_images, self.source.shards)
        replaced: list[Replaced] = []
        for attempt in range(MAX_REPLACEMENTS):
            index = fallback_index(self.seed, position, wanted, attempt, num_images)
            try:
                image, target = self.augmented(index, crop_seed(self.seed, position, num_images))
            except BadImage as error:
                replaced.append(Replaced(index, self.source.name(index), str(error)))
            else:
                return Sample(image, target, index, tuple(replaced))
        return Sample(None, None, -1, tuple(replaced))

    def augmented(self, index: int, seed: int) -> tuple[Tensor, Any]:
        """An image and its target; raises BadImage. Random numbers depend on `seed` alone."""
        pixels = decode(self.source.read(index), self.preprocess)
        target = self.annotated.read_target(index, *pixels.shape[:2])
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.augment(pixels, target)
        finally:
            torch.set_rng_state(before)


def collate(samples: Sequence[Sample]) -> TransferBatch:
    """A batch; it is empty if no image could be read for one of its positions."""
    replaced = tuple(bad for sample in samples for bad in sample.replaced)
    images = [sample.image for sample in samples if sample.image is not None]
    if len(images) < len(samples):
        return TransferBatch([], [], -1, replaced)
    indices = torch.tensor([sample.place for sample in samples])
    return TransferBatch(
        stacked(images), stacked([sample.target for sample in samples]), indices, replaced
    )


def stacked(values: list[Any]) -> Any:
    """Tensors of one shape as one; numbers as a tensor; anything else stays a list."""
    tensors = [torch.as_tensor(v) if isinstance(v, int | float | np.number) else v for v in values]
    if all(isinstance(t, Tensor) and t.shape == tensors[0].shape for t in tensors):
        return torch.stack(tensors)
    return values


@dataclass(frozen=True)
class AnnotatedSubset:
    """The images of an annotated source that have these indices, in their order."""

    annotated: AnnotatedSource
    indices: Int64[np.ndarray, " N"]

    @cached_property
    def images(self) -> Source:
        """Those images."""
        return Subset(self.annotated.images, self.indices)

    @property
    def class_names(self) -> Sequence[str]:
        """All classes, also those without an image here."""
        return self.annotated.class_names

    @property
    def left_out(self) -> Sequence[str]:
        """Of the whole source."""
        return self.annotated.left_out

    @property
    def digest(self) -> str:
        """A hash of the annotations, and of which these are."""
        return sha256(self.annotated.digest.encode() + self.indices.tobytes()).hexdigest()

    def read_target(self, index: int, height: int, width: int) -> Target:
        """See `AnnotatedSource`."""
        return self.annotated.read_target(int(self.indices[index]), height, width)


def with_fraction(annotated: AnnotatedSource, fraction: float, seed: int) -> AnnotatedSource:
    """A share of the images: of each class where images have one, else of all."""
    if fraction == 1.0:
        return annotated
    labels = annotated.images.labels
    if labels is not None and labels.ndim == 1:
        alone = np.bincount(labels)[labels] == 1  # a class keeps its only image
        chosen = stratified(labels, fraction, seed) | alone
    else:
        chosen = some_rows(len(annotated.images), fraction, seed)
    return AnnotatedSubset(annotated, np.flatnonzero(chosen))


def transfer_indices(data: TransferData) -> dict[str, DataIndex]:
    """Identify images and annotations of a run, by the setting that names them."""
    return {"data": annotated_index(data.train), "data.test": annotated_index(data.test)}


def annotated_index(annotated: AnnotatedSource) -> DataIndex:
    """Identify images and annotations."""
    index = index_of(annotated.images)
    return index._replace(content=index.content + annotated.digest)
