"""Datasets and loaders: multi-crops to train on, plain images to evaluate on; checks of both."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.loader import ResilientLoader, loader_options
from ssl_xcit.data.multicrop import Crops, MultiCrop, Replaced, crops_at
from ssl_xcit.data.order import crop_seed, fallback_index, image_at
from ssl_xcit.data.picture import BadImage, DeepRange, dark_images
from ssl_xcit.data.preprocess import Preprocess, resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import UserError
from ssl_xcit.utils.hardware import default_workers

log = logging.getLogger(__name__)
MAX_REPLACEMENTS = 32  # others tried in place of a bad image


@dataclass(eq=False)
class CropDataset(Dataset[Crops]):
    """Crops by position (see `order.py`); a bad image is replaced (see `order.fallback_index`)."""

    source: Source
    augment: MultiCrop
    seed: int
    preprocess: Preprocess
    images_per_step: int = 1  # over all ranks
    total_steps: int = 1

    def __getitem__(self, position: int) -> Crops:
        num_images = len(self.source)
        if self.source.shards is not None:
            self.source.shards.announce(self.seed, position)
        wanted = image_at(self.seed, position, num_images, self.source.shards)
        seed = crop_seed(self.seed, position, num_images)
        share = position // self.images_per_step / self.total_steps
        augment = crops_at(self.augment, share)
        replaced: list[Replaced] = []
        for step in range(MAX_REPLACEMENTS):
            index = fallback_index(self.seed, position, wanted, step, num_images)
            try:
                large, small = augment(open_picture(self.source.read(index), self.preprocess), seed)
            except BadImage as error:
                replaced.append(Replaced(index, self.source.name(index), str(error)))
            else:
                crops = torch.from_numpy(large), torch.from_numpy(small)
                return Crops(*crops, index, tuple(replaced))
        return Crops(torch.empty(0), torch.empty(0), -1, tuple(replaced))


def stack(crops: Sequence[Crops]) -> Crops:
    """Collate a batch; it is empty if no image could be read for one of its positions."""
    replaced = tuple(bad for image in crops for bad in image.replaced)
    if any(image.indices == -1 for image in crops):
        return Crops(torch.empty(0), torch.empty(0), -1, replaced)
    return Crops(
        default_collate([image.global_crops for image in crops]),
        default_collate([image.local_crops for image in crops]),
        torch.tensor([image.indices for image in crops]),
        replaced,
    )


@dataclass(eq=False)
class PlainDataset(Dataset[tuple[UInt8[Tensor, "channels size size"], bool]]):
    """Resized and centre-cropped images, uint8, and whether the image could be read.

    Bad images are not replaced here: another would come under a label that is not its own.
    """

    source: Source
    resize: int
    size: int
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "channels size size"], bool]:
        try:
            image = decode(self.source.read(index), self.preprocess)
            pixels = resize_center_crop(image, self.resize, self.size)
        except BadImage as error:
            log.warning("bad image skipped: %s (%s)", self.source.name(index), error)
            empty = torch.zeros(self.preprocess.channels, self.size, self.size, dtype=torch.uint8)
            return empty, False
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), True


def plain_loader(
    source: Source,
    resize: int,
    size: int,
    batch_size: int,
    num_workers: int | None,
    preprocess: Preprocess,
    timeout: float = 300.0,
) -> ResilientLoader[list[Tensor]]:
    """Return batches of (B, channels, size, size) uint8 and (B,) whether readable, in order."""
    workers = default_workers() if num_workers is None else num_workers
    dataset = PlainDataset(source, resize, size, preprocess)

    def make(first: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size,
            sampler=range(first * batch_size, len(dataset)),
            generator=torch.Generator(),  # else every pass takes a number from the global one
            **loader_options(workers),
        )

    return ResilientLoader(make, -(-len(dataset) // batch_size), timeout=timeout)


def check_labelled(pair: LabelledPair, preprocess: Preprocess) -> None:
    """Check labelled images before anything starts.

    Raises:
        UserError: labels are missing, a part is empty or unreadable, or there is one class only.
    """
    for part, source in (("training", pair.train), ("test", pair.test)):
        if source.labels is None:
            raise UserError(f"{pair.name}: no labels; put the images in one folder a class")
        if not len(source):
            raise UserError(
                f"{pair.name}: no {part} images are left: two of a class are needed to hold one "
                "out, or name others with eval_data.test_root, test_file or test_split"
            )
    for source in dict.fromkeys((pair.train, pair.test)):
        check_images(source, pair.size, preprocess)
    kind = label_kind(pair.train.labels)
    if label_kind(pair.test.labels) != kind:
        raise UserError(f"{pair.name}: training and test labels are of different kinds")
    widths = [np.asarray(source.labels).shape[1:] for source in (pair.train, pair.test)]
    if widths[0] != widths[1]:
        raise UserError(
            f"{pair.name}: training images have {widths[0]} labels each, test images {widths[1]}"
        )
    if kind == "classes":
        check_classes(pair)


def check_classes(pair: LabelledPair) -> None:
    """Check that class ids can be learnt, and log test images of unknown classes.

    Raises:
        UserError: there is one class only.
    """
    train, test = np.asarray(pair.train.labels), np.asarray(pair.test.labels)
    if len(np.unique(train)) < 2:
        raise UserError(f"{pair.name}: one class only; k-NN and linear probe need two")
    unknown = np.setdiff1d(test, train)
    if len(unknown):
        names = [pair.test.class_names[i] if i < len(pair.test.class_names) else i for i in unknown]
        log.warning(
            "%d test images belong to %d classes without training images (%s): they count as wrong",
            np.isin(test, unknown).sum(), len(unknown), ", ".join(map(str, names[:5])),
        )  # fmt: skip


def probes(source: Source, count: int = 16) -> Iterator[int]:
    """Yield indices of a few images, evenly spaced; of shards to be fetched those of the first."""
    shards, num_images = source.shards, len(source)
    if shards is not None and shards.read_ahead is not None:
        num_images = int(shards.sizes[shards.sizes > 0][0])
    yield from np.unique(np.linspace(0, num_images - 1, count).astype(int)).tolist()


def check_images(source: Source, size: int, preprocess: Preprocess) -> None:
    """Read a few images before anything starts; warn if some are smaller than a crop of `size`
    pixels, and so are enlarged, or if those of more than 8 bits are dark.

    Raises:
        UserError: none of them can be read.
    """
    errors, small = [], []
    deep: list[DeepRange] = []
    indices = list(probes(source))
    for index in indices:
        try:
            picture = open_picture(source.read(index), preprocess)
            picture.pixels()
        except BadImage as error:
            errors.append(f"{source.name(index)} ({error})")
            continue
        deep += [picture.deep] if picture.deep is not None else []
        if min(picture.height, picture.width) < size:
            small.append(f"{source.name(index)} is {picture.width} x {picture.height}")
    if len(errors) == len(indices):
        raise UserError(
            f"none of {len(indices)} images tried can be read, starting with {errors[0]}: "
            "are these image files?"
        )
    if small:
        log.warning(
            "%d of %d images tried are smaller than the crop of %d and are enlarged (%s)",
            len(small), len(indices), size, small[0],
        )  # fmt: skip
    if note := dark_images(deep, preprocess):
        log.warning("%s", note)
