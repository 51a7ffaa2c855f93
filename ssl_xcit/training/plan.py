"""Derive the numbers of a run from its settings: steps, learning rate, and what these and the
number of images decide for its objective.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hydra.utils import instantiate

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.objective import Objective, RunLength
from ssl_xcit.training.settings import PretrainSettings, RunSettings

PROVISIONAL = 500  # steps of a run whose budget is not yet turned into steps


@dataclass(frozen=True)
class RunPlan:
    """What follows from the settings, the number of images and the number of devices."""

    num_images: int
    steps_per_epoch: float
    total_steps: int
    per_device_batch: int
    lr: float  # peak, for this batch; nan: a range test is to find it
    warmup_steps: int

    def record(self) -> dict[str, Any]:
        """All numbers by name, as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Plan(RunPlan):
    """Likewise, of pretraining."""

    objective: Objective  # for a run of this length
    backbone_freeze_steps: int = 0  # of a run that starts from weights with a fresh head

    def epochs(self, settings: PretrainSettings) -> float:
        """Passes over the images, as given or as the steps come to."""
        given = settings.budget is None and settings.max_steps is None
        return settings.epochs if given else self.total_steps / self.steps_per_epoch

    def record(self) -> dict[str, Any]:
        """All numbers by name, those of the objective among them, as plain data."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objective"}
        return own | self.objective.derived()


def check_batch(settings: RunSettings, num_images: int, world_size: int) -> None:
    """Check that the images fill a batch, and the devices share it.

    Raises:
        UserError: a batch larger than the data, or that the devices do not divide.
    """
    batch_size = settings.batch_size
    if world_size > num_images:
        raise UserError(
            f"the {num_images} images of the data are fewer than the {world_size} devices: set "
            "trainer.devices=1"
        )
    if batch_size > num_images:
        each = num_images // world_size
        fitting = f"batch_size={each * world_size} or less"
        if world_size > 1:
            fitting += f", a multiple of the {world_size} devices"
        if settings.trainer.accumulate > each:
            fitting += f", and trainer.accumulate={each} or less"
        raise UserError(
            f"batch_size={batch_size} is larger than the data, which has {num_images:,} images: "
            f"set {fitting}"
        )
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        raise UserError(
            f"batch_size={batch_size} does not divide among {world_size} devices: set "
            + " or ".join(f"batch_size={n}" for n in (lower, lower + world_size) if n)
        )
    if settings.trainer.accumulate > batch_size // world_size:
        raise UserError(
            f"trainer.accumulate={settings.trainer.accumulate}: a device has "
            f"{batch_size // world_size} images a step, which cannot be taken in more parts"
        )


def make_plan(
    settings: PretrainSettings,
    num_images: int,
    world_size: int,
    begun: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> Plan:
    """Steps, and the objective for a run of this length, which stays as in the plan of a run that
    was `begun`, also with other images. `steps` are those that the budget allows, once known.

    Raises:
        UserError: a batch larger than the data, or that the devices do not divide; an objective
            that its settings or the batch do not fit.
    """
    check_batch(settings, num_images, world_size)
    batch_size, epochs = settings.batch_size, settings.epochs
    optim, init = settings.optim, settings.init
    steps_per_epoch = num_images / batch_size
    total_steps = max(1, math.floor(epochs * steps_per_epoch))
    if settings.budget is not None:
        before = begun or {}  # whose total may have been revised
        steps = before.get("planned_steps") or before.get("total_steps") or steps or PROVISIONAL
    if wanted := settings.max_steps or steps:
        total_steps, epochs = wanted, wanted / steps_per_epoch
    length = RunLength(
        num_images,
        batch_size,
        steps_per_epoch,
        total_steps,
        epochs,
        settings.trainer.accumulate,
        begun=dict(begun or {}),
        devices=world_size,
    )
    fresh = init.ckpt is not None and init.head == "fresh"
    if optim.lr == "auto":
        lr = length.begun.get("lr", math.nan)
    else:
        lr = optim.lr * scaled_rate(batch_size, optim.lr_scaling)
    return Plan(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        per_device_batch=batch_size // world_size,
        lr=lr,
        warmup_steps=length.steps(optim.warmup_epochs, optim.max_warmup),
        objective=instantiate(settings.objective)(length),
        backbone_freeze_steps=length.steps(init.freeze_epochs, init.max_freeze) if fresh else 0,
    )


def check_one_device(world_size: int, setting: str, instead: str) -> None:
    """Check that what a setting measures before a run can be measured.

    Raises:
        UserError: there are several devices; says what to do `instead`.
    """
    if world_size > 1:
        raise UserError(
            f"{setting} tries steps on one device, and here are {world_size}: {instead}"
        )


def scaled_rate(batch_size: int, scaling: str) -> float:
    """The factor of a learning rate for a batch: batch / 256 (`linear`, as DINO), or the square
    root of batch / 1024 (`sqrt`, as DINOv2).
    """
    return batch_size / 256 if scaling == "linear" else math.sqrt(batch_size / 1024)
