"""The loaders: multi-crops to train on, plain images to evaluate on."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ssl_xcit.data.bad import FILE, BadSamples
from ssl_xcit.data.decode import BadImage, Deep, dark_images, decode, open_picture
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.loader import Restarting, default_workers, loader_options
from ssl_xcit.data.multicrop import Crops, MultiCrop, Replaced
from ssl_xcit.data.order import Positions, crop_seed, image_at, instead_of
from ssl_xcit.data.preprocess import Preprocess, resize_center_crop, to_views
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import RunFailed, UserError

log = logging.getLogger(__name__)
MAX_REPLACEMENTS = 32  # others tried in place of a bad image


class CropDataset(Dataset[Crops]):
    """Crops by position of the run (see `order.py`).

    In place of a bad image stands the next good one, see `order.instead_of`.
    """

    def __init__(self, source: Source, augment: MultiCrop, seed: int, how: Preprocess):
        self.source = source
        self.augment = augment
        self.seed = seed
        self.how = how

    def __getitem__(self, position: int) -> Crops:
        num_images = len(self.source)
        wanted = image_at(self.seed, position, num_images, self.source.shards)
        seed = crop_seed(self.seed, position, num_images)
        replaced: list[Replaced] = []
        for step in range(MAX_REPLACEMENTS):
            index = instead_of(self.seed, position, wanted, step, num_images)
            try:
                large, small = self.augment(open_picture(self.source.read(index), self.how), seed)
            except BadImage as error:
                replaced.append(Replaced(index, self.source.name(index), str(error)))
            else:
                crops = torch.from_numpy(large), torch.from_numpy(small)
                return Crops(*crops, index, tuple(replaced))
        return Crops(torch.empty(0), torch.empty(0), -1, tuple(replaced))


def stack(crops: Sequence[Crops]) -> Crops:
    """A batch; empty when for one position no image was found."""
    replaced = tuple(bad for one in crops for bad in one.replaced)
    if any(one.indices == -1 for one in crops):
        return Crops(torch.empty(0), torch.empty(0), -1, replaced)
    return Crops(
        default_collate([one.global_crops for one in crops]),
        default_collate([one.local_crops for one in crops]),
        torch.tensor([one.indices for one in crops]),
        replaced,
    )


class PlainDataset(Dataset[tuple[UInt8[Tensor, "channels size size"], bool]]):
    """Resized and centre-cropped images, uint8, and whether the image could be read.

    No neighbour stands in for a bad one here: it would come under a label that is not its own.
    """

    def __init__(self, source: Source, resize: int, size: int, how: Preprocess):
        self.source = source
        self.resize = resize
        self.size = size
        self.how = how

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "channels size size"], bool]:
        try:
            image = decode(self.source.read(index), self.how)
            pixels = resize_center_crop(image, self.resize, self.size)
        except BadImage as error:
            log.warning("bad image left out: %s (%s)", self.source.name(index), error)
            empty = torch.zeros(self.how.channels, self.size, self.size, dtype=torch.uint8)
            return empty, False
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), True


def plain_loader(
    source: Source,
    resize: int,
    size: int,
    batch_size: int,
    num_workers: int | None,
    how: Preprocess,
    timeout: float = 300.0,
) -> Restarting[list[Tensor]]:
    """Batches of (B, channels, size, size) uint8 and (B,) whether readable, in the source's
    order.
    """
    workers = default_workers() if num_workers is None else num_workers
    dataset = PlainDataset(source, resize, size, how)

    def make(first: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size,
            sampler=range(first * batch_size, len(dataset)),
            generator=torch.Generator(),  # else every pass takes a number from the global one
            **loader_options(workers),
        )

    return Restarting(make, -(-len(dataset) // batch_size), timeout=timeout)


class MultiCropData(lightning.LightningDataModule):
    """Multi-crop batches of one source over a whole run.

    Args:
        source: the images.
        augment: picture and seed to crops.
        batch_size: images a step on each rank.
        total_steps: optimizer steps of the run.
        seed: of order and crops.
        how: from files to pixels to the network's input.
        num_workers: loader processes; None: one a core, less one.
        eval_data: labelled images for online evaluation, if there are any.
        run_dir: where bad images are listed; None: nowhere.
        max_bad_fraction: share of bad images that a run bears.
        timeout: seconds after which a loader that gives nothing is started again.
    """

    def __init__(
        self,
        source: Source,
        augment: MultiCrop,
        batch_size: int,
        total_steps: int,
        seed: int,
        how: Preprocess,
        num_workers: int | None = None,
        eval_data: LabelledPair | None = None,
        run_dir: Path | None = None,
        max_bad_fraction: float = 0.01,
        timeout: float = 300.0,
    ):
        super().__init__()
        self.dataset = CropDataset(source, augment, seed, how)
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.eval_data = eval_data
        self.start_step = 0
        self.timeout = timeout
        self.loader: Restarting[Crops] | None = None
        self.indices: Tensor | int = -1  # of the batch at hand
        file = None if run_dir is None else run_dir / FILE
        self.bad = BadSamples(file, len(source), max_bad_fraction)

    def passes(self, step: int) -> float:
        """How many times the images have been seen after so many steps."""
        world_size = self.trainer.world_size if self.trainer else 1
        return step * self.batch_size * world_size / len(self.dataset.source)

    def train_dataloader(self) -> Restarting[Crops]:
        """The rest of the run as one epoch of Lightning's: passes over the data are counted from
        the step.
        """
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )

        def make(step: int) -> DataLoader:
            return DataLoader(
                self.dataset,
                batch_size=self.batch_size,
                sampler=Positions(step, self.total_steps, self.batch_size, rank, world_size),
                collate_fn=stack,
                pin_memory=torch.cuda.is_available(),
                prefetch_factor=4 if self.num_workers else None,
                generator=torch.Generator(),
                **loader_options(self.num_workers),
            )

        self.loader = Restarting(make, self.total_steps, self.start_step, self.timeout)
        return self.loader

    def on_before_batch_transfer(self, batch: Crops, dataloader_idx: int) -> Crops:
        """List what was bad.

        Raises:
            RunFailed: too much was.
        """
        self.indices = batch.indices
        self.bad.add(batch.replaced)
        if isinstance(batch.indices, int):
            bad = batch.replaced[-1]
            raise RunFailed(
                f"none of {MAX_REPLACEMENTS} images tried one after another can be read, the last "
                f"{bad.name} ({bad.reason}): is the disk still there?"
            )
        return batch

    def batch_names(self) -> list[str]:
        """Of the images in the batch at hand."""
        if not isinstance(self.indices, Tensor):
            return []
        return [self.dataset.source.name(i) for i in self.indices.tolist()]

    def on_after_batch_transfer(self, batch: Crops, dataloader_idx: int) -> list[Tensor]:
        """One (V, B, channels, h, w) tensor a resolution, normalised: global views, then local ones
        if there are any.
        """
        parts = (batch.global_crops, batch.local_crops)
        return [to_views(part, self.dataset.how) for part in parts if part.shape[1]]

    def state_dict(self) -> dict[str, Any]:
        """The only state of the data: how many steps are done."""
        return {"step": self.trainer.global_step if self.trainer else self.start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the steps that are done."""
        self.start_step = int(state_dict["step"])


def check_labelled(pair: LabelledPair, how: Preprocess) -> None:
    """Look at labelled images before anything starts.

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
        check_images(source, pair.size, how)
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
    """Class ids can be learnt and tested.

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
    """A few images, evenly spaced."""
    yield from np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()


def check_images(source: Source, size: int, how: Preprocess) -> None:
    """Read a few images before anything starts.

    Says once when images are smaller than a crop of `size` pixels, and so are enlarged, or when
    those of more than 8 bits are dark.

    Raises:
        UserError: none of them can be read.
    """
    errors, small, tried = [], [], 0
    deep: list[Deep] = []
    for index in probes(source):
        tried += 1
        try:
            picture = open_picture(source.read(index), how)
            picture.pixels()
        except BadImage as error:
            errors.append(f"{source.name(index)} ({error})")
            continue
        deep += [picture.deep] if picture.deep is not None else []
        if min(picture.height, picture.width) < size:
            small.append(f"{source.name(index)} is {picture.width} x {picture.height}")
    if len(errors) == tried:
        raise UserError(
            f"none of {tried} images tried can be read, starting with {errors[0]}: "
            "are these image files?"
        )
    if small:
        log.warning(
            "%d of %d images tried are smaller than the crop of %d and are enlarged (%s)",
            len(small), tried, size, small[0],
        )  # fmt: skip
    if note := dark_images(deep, how):
        log.warning("%s", note)
