"""The LightningDataModule: batches of a run, whose only state is a position."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_xcit.data.bad_samples import FILE, BadSamples
from ssl_xcit.data.crop_dataset import MAX_REPLACEMENTS, CropDataset, stack
from ssl_xcit.data.loader import ResilientLoader, loader_options
from ssl_xcit.data.multicrop import Crops, MultiCrop, Replaced
from ssl_xcit.data.order import Positions
from ssl_xcit.data.preprocess import Preprocess, to_views
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import RunFailed
from ssl_xcit.utils.hardware import default_workers


@runtime_checkable
class Batch(Protocol):
    """What a loader gives: images, which they are, and which were bad."""

    @property
    def indices(self) -> Tensor | int:
        """Of the images in their source; -1: one of them could not be read at all."""
        ...

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """Bad images, for which others were taken."""
        ...


@runtime_checkable
class PositionalDataset(Protocol):
    """A sample by its position in the run."""

    preprocess: Preprocess

    @property
    def source(self) -> Source:
        """The images."""
        ...

    def __getitem__(self, position: int) -> Any: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class TrainingData(lightning.LightningDataModule, Generic[AnyBatch]):
    """Batches of one source over a whole run.

    Args:
        dataset: samples by position.
        collate: samples to a batch, in the loader's processes.
        to_inputs: a batch, on its device, to what the training step takes.
        batch_size: images a step on each rank.
        total_steps: optimizer steps of the run.
        num_workers: loader processes; None: one a core, less one.
        eval_data: labelled images for evaluation while training, if there are any.
        run_dir: where bad images are listed; None: nowhere.
        max_bad_fraction: share of bad images that a run bears.
        timeout: seconds after which a loader that gives nothing is started again.
    """

    def __init__(
        self,
        dataset: PositionalDataset,
        collate: Callable[[Sequence[Any]], AnyBatch],
        to_inputs: Callable[[AnyBatch], Any],
        batch_size: int,
        total_steps: int,
        num_workers: int | None = None,
        eval_data: Any = None,
        run_dir: Path | None = None,
        max_bad_fraction: float = 0.01,
        timeout: float = 300.0,
    ):
        super().__init__()
        self.dataset = dataset
        self.collate = collate
        self.to_inputs = to_inputs
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.eval_data = eval_data
        self.start_step = 0
        self.timeout = timeout
        self.loader: ResilientLoader[AnyBatch] | None = None
        self.indices: Tensor | int = -1  # of the batch at hand
        file = None if run_dir is None else run_dir / FILE
        self.bad = BadSamples(file, len(dataset.source), max_bad_fraction)

    def passes(self, step: int) -> float:
        """How many times the images have been seen after so many steps."""
        world_size = self.trainer.world_size if self.trainer else 1
        return step * self.batch_size * world_size / len(self.dataset.source)

    def train_dataloader(self) -> ResilientLoader[AnyBatch]:
        """The rest of the run as one epoch of Lightning's; passes are counted from the step."""
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )

        on_gpu = torch.cuda.is_available() and (
            not self.trainer or self.trainer.strategy.root_device.type == "cuda"
        )

        def make(step: int) -> DataLoader:
            dataset: Any = self.dataset
            return DataLoader(
                dataset,
                batch_size=self.batch_size,
                sampler=Positions(step, self.total_steps, self.batch_size, rank, world_size),
                collate_fn=self.collate,
                pin_memory=on_gpu,
                prefetch_factor=4 if self.num_workers else None,
                generator=torch.Generator(),
                **loader_options(self.num_workers),
            )

        self.loader = ResilientLoader(make, self.total_steps, self.start_step, self.timeout)
        return self.loader

    @property
    def running_loader(self) -> ResilientLoader[AnyBatch]:
        """The loader of a run that has begun."""
        assert self.loader is not None
        return self.loader

    def on_before_batch_transfer(self, batch: AnyBatch, dataloader_idx: int) -> AnyBatch:
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

    def on_after_batch_transfer(self, batch: AnyBatch, dataloader_idx: int) -> Any:
        """What the training step takes."""
        return self.to_inputs(batch)

    def state_dict(self) -> dict[str, Any]:
        """The only state of the data: how many steps are done."""
        return {"step": self.trainer.global_step if self.trainer else self.start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the steps that are done."""
        self.start_step = int(state_dict["step"])


def multi_crop_data(
    source: Source,
    augment: MultiCrop,
    batch_size: int,
    total_steps: int,
    seed: int,
    preprocess: Preprocess,
    num_workers: int | None = None,
    eval_data: LabelledPair | None = None,
    run_dir: Path | None = None,
    max_bad_fraction: float = 0.01,
    timeout: float = 300.0,
    world_size: int = 1,
) -> TrainingData[Crops]:
    """Multi-crop batches: `augment` makes a picture and a seed to crops, `seed` decides order and
    crops; a step takes one normalised (V, B, channels, h, w) a resolution, the global views first.
    """

    def views(batch: Crops) -> list[Tensor]:
        parts = (batch.global_crops, batch.local_crops)
        return [to_views(part, preprocess) for part in parts if part.shape[1]]

    images_per_step = batch_size * world_size
    dataset = CropDataset(source, augment, seed, preprocess, images_per_step, total_steps)
    return TrainingData(
        dataset, stack, views, batch_size, total_steps,
        num_workers, eval_data, run_dir, max_bad_fraction, timeout,
    )  # fmt: skip


def data_of(trainer: lightning.Trainer) -> TrainingData[Any]:
    """The data of a run, typed."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, TrainingData)
    return data


def names_of_batch(trainer: lightning.Trainer) -> list[str]:
    """Names of the images in the batch at hand, where a data module knows them."""
    data = getattr(trainer, "datamodule", None)
    return data.batch_names() if isinstance(data, TrainingData) else []
