"""The loaders: multi-crops to train on, plain images to evaluate on."""

import logging
import os
import signal
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_xcit.data.decode import BadImage, Pixels
from ssl_xcit.data.multicrop import Crops, MultiCrop, resize_center_crop, to_views
from ssl_xcit.data.order import Positions, crop_seed, image_at
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import UserError

log = logging.getLogger(__name__)
MAX_REPLACEMENTS = 16  # neighbours tried in place of a bad image


def default_workers() -> int:
    """One a core that this process may use, less one for training, at most 12."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(12, max(0, (cores or 1) - 1))


def read_or_neighbour(source: Source, index: int) -> Pixels:
    """The image, or in place of a bad one the next good one in the source's order; said in the log.

    Raises:
        BadImage: so many in a row are bad that the data set must be.
    """
    for step in range(MAX_REPLACEMENTS):
        at = (index + step) % len(source)
        try:
            return source.read(at)
        except BadImage as error:
            log.warning("bad image replaced by its neighbour: %s (%s)", source.name(at), error)
    raise BadImage(
        f"{MAX_REPLACEMENTS} images in a row cannot be read, starting with {source.name(index)}"
    )


class CropDataset(Dataset[Crops]):
    """Crops by position of the run (see `order.py`)."""

    def __init__(self, source: Source, augment: MultiCrop, seed: int):
        self.source = source
        self.augment = augment
        self.seed = seed

    def __getitem__(self, position: int) -> Crops:
        num_images = len(self.source)
        index = image_at(self.seed, position, num_images)
        image = read_or_neighbour(self.source, index)
        large, small = self.augment(image, crop_seed(self.seed, position, num_images))
        return Crops(torch.from_numpy(large), torch.from_numpy(small), index)


class PlainDataset(Dataset[tuple[UInt8[Tensor, "3 size size"], bool]]):
    """Resized and centre-cropped images, uint8, and whether the image could be read.

    No neighbour stands in for a bad one here: it would come under a label that is not its own.
    """

    def __init__(self, source: Source, resize: int, size: int):
        self.source = source
        self.resize = resize
        self.size = size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 size size"], bool]:
        try:
            image = self.source.read(index)
        except BadImage as error:
            log.warning("bad image left out: %s (%s)", self.source.name(index), error)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        pixels = resize_center_crop(image, self.resize, self.size)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), True


def ignore_interrupt(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; the loaders' must outlive it until the step is
    saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def plain_loader(
    source: Source, resize: int, size: int, batch_size: int, num_workers: int | None
) -> DataLoader:
    """Batches of (B, 3, size, size) uint8 and (B,) whether readable, in the source's order."""
    workers = default_workers() if num_workers is None else num_workers
    return DataLoader(
        PlainDataset(source, resize, size),
        batch_size,
        num_workers=workers,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # else every pass takes a number from the global one
    )


class MultiCropData(lightning.LightningDataModule):
    """Multi-crop batches of one source over a whole run.

    Args:
        source: the images.
        augment: image and seed to crops.
        batch_size: images a step on each rank.
        total_steps: optimizer steps of the run.
        seed: of order and crops.
        num_workers: loader processes; None: one a core, less one.
        eval_data: labelled images for online evaluation, if there are any.
    """

    def __init__(
        self,
        source: Source,
        augment: MultiCrop,
        batch_size: int,
        total_steps: int,
        seed: int,
        num_workers: int | None = None,
        eval_data: LabelledPair | None = None,
    ):
        super().__init__()
        self.dataset = CropDataset(source, augment, seed)
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.eval_data = eval_data
        self.start_step = 0

    def passes(self, step: int) -> float:
        """How many times the images have been seen after so many steps."""
        world_size = self.trainer.world_size if self.trainer else 1
        return step * self.batch_size * world_size / len(self.dataset.source)

    def train_dataloader(self) -> DataLoader:
        """The rest of the run as one epoch of Lightning's: passes over the data are counted from
        the step.
        """
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        positions = Positions(self.start_step, self.total_steps, self.batch_size, rank, world_size)
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=positions,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=ignore_interrupt,
            generator=torch.Generator(),
        )

    def on_after_batch_transfer(self, batch: Crops, dataloader_idx: int) -> list[Tensor]:
        """One (V, B, 3, h, w) tensor a resolution, normalised: global views, then local ones if
        there are any.
        """
        return [to_views(part) for part in (batch.global_crops, batch.local_crops) if part.shape[1]]

    def state_dict(self) -> dict[str, Any]:
        """The only state of the data: how many steps are done."""
        return {"step": self.trainer.global_step if self.trainer else self.start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the steps that are done."""
        self.start_step = int(state_dict["step"])


def check_labelled(pair: LabelledPair) -> None:
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
                "out, or name others with eval_data.test_root=DIR"
            )
    assert pair.train.labels is not None
    assert pair.test.labels is not None
    if len(np.unique(pair.train.labels)) < 2:
        raise UserError(f"{pair.name}: one class only; k-NN and linear probe need two")
    for source in (pair.train, pair.test):
        check_images(source, pair.size)
    unknown = np.setdiff1d(pair.test.labels, pair.train.labels)
    if len(unknown):
        log.warning(
            "%d test images belong to %d classes without training images (%s): they count as wrong",
            np.isin(pair.test.labels, unknown).sum(), len(unknown),
            ", ".join(pair.test.class_names[i] for i in unknown[:5]),
        )  # fmt: skip


def check_images(source: Source, size: int, probes: int = 16) -> None:
    """Read a few images before anything starts.

    Says once when images are smaller than a crop of `size` pixels, and so are enlarged.

    Raises:
        UserError: none of them can be read.
    """
    places = np.unique(np.linspace(0, len(source) - 1, probes).astype(int))
    errors, small = [], []
    for index in places:
        try:
            height, width, _ = source.read(int(index)).shape
        except BadImage as error:
            errors.append(f"{source.name(int(index))} ({error})")
            continue
        if min(height, width) < size:
            small.append(f"{source.name(int(index))} is {width} x {height}")
    if len(errors) == len(places):
        raise UserError(
            f"none of {len(places)} images tried can be read, starting with {errors[0]}: "
            "are these image files?"
        )
    if small:
        log.warning(
            "%d of %d images tried are smaller than the crop of %d and are enlarged (%s)",
            len(small), len(places), size, small[0],
        )  # fmt: skip
