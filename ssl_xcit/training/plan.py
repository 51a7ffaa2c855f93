"""Derive the numbers of a run from its settings: steps, and what the number of images decides
(prototypes, EMA, the teacher's temperatures).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssl_xcit.errors import UserError
from ssl_xcit.training.settings import PretrainSettings, RunSettings


@dataclass(frozen=True)
class RunPlan:
    """What follows from the settings, the number of images and the number of devices."""

    num_images: int
    steps_per_epoch: float
    total_steps: int
    per_device_batch: int
    lr: float  # peak, for this batch
    warmup_steps: int


@dataclass(frozen=True)
class Plan(RunPlan):
    """Likewise, of DINO."""

    freeze_steps: int
    teacher_temp_epochs: float
    num_prototypes: int
    ema: float
    teacher_temp_start: float
    teacher_temp: float
    backbone_freeze_steps: int = 0  # of a run that starts from weights with a fresh head


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
        raise UserError(
            f"batch_size={batch_size} does not divide among {world_size} devices: "
            f"set batch_size={max(1, batch_size // world_size) * world_size}"
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
) -> Plan:
    """Steps, and what the number of images decides; head and teacher stay as in the plan of a run
    that was `begun`, also with other images.

    Raises:
        UserError: a batch larger than the data, or that the devices do not divide; no epochs.
    """
    check_batch(settings, num_images, world_size)
    batch_size, epochs = settings.batch_size, settings.epochs
    objective, optim, init = settings.objective, settings.optim, settings.init
    fresh = init.ckpt is not None and init.head == "fresh"
    by_size = ("num_prototypes", "ema", "teacher_temp_start", "teacher_temp")
    if any(row.keys() != {"from", *by_size} for row in objective.by_images):
        raise UserError(f"objective.by_images: each row has from, {', '.join(by_size)}")
    rows = [row for row in objective.by_images if row["from"] <= num_images]
    if not rows:
        raise UserError("objective.by_images: a row with `from: 0` is needed")
    row = rows[-1]
    chosen: dict[str, Any] = {
        key: row[key] if getattr(objective, key) is None else getattr(objective, key)
        for key in by_size
    }
    if begun is not None:
        kept = {key: begun[key] for key in chosen if type(begun.get(key)) in (int, float)}
        chosen |= {key: value for key, value in kept.items() if math.isfinite(value)}
    steps_per_epoch = num_images / batch_size
    total_steps = max(1, math.floor(epochs * steps_per_epoch))

    def steps(wanted_epochs: float, max_share: float) -> int:
        return round(min(wanted_epochs * steps_per_epoch, max_share * total_steps))

    return Plan(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        per_device_batch=batch_size // world_size,
        lr=optim.lr * batch_size / 256,
        warmup_steps=steps(optim.warmup_epochs, optim.max_warmup),
        freeze_steps=steps(objective.freeze_epochs, objective.max_warmup),
        backbone_freeze_steps=steps(init.freeze_epochs, init.max_freeze) if fresh else 0,
        teacher_temp_epochs=min(objective.teacher_temp_epochs, objective.max_warmup * epochs),
        **chosen,
    )
