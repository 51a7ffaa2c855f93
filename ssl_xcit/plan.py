"""From settings to the numbers of a run: steps, and what the number of images decides."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_xcit.errors import UserError

# Hydra does not check types: (setting, whole number, lowest value; None: it must be above 0)
NUMBERS: tuple[tuple[str, bool, float | None], ...] = (
    ("seed", True, 0),
    ("batch_size", True, 1),
    ("epochs", False, None),
    ("num_workers", True, 0),
    ("worker_timeout", False, None),
    ("collective_timeout", False, None),
    ("max_skipped", True, 1),
    ("trainer.accumulate", True, 1),
    ("callbacks.health.queue", True, 2),
    ("callbacks.health.patience", True, 1),
    ("callbacks.metrics.every_steps", True, 1),
    ("callbacks.checkpoints.every_steps", True, 1),
    ("callbacks.checkpoints.keep_last", True, 1),
    ("callbacks.checkpoints.milestone_every", True, 1),
    ("callbacks.online.every_steps", True, 1),
    ("callbacks.online.max_images", True, 2),
    ("data.max_bad_fraction", False, 0),
    ("optim.lr", False, None),
    ("optim.min_lr", False, 0),
    ("optim.warmup_start", False, 0),
    ("optim.warmup_epochs", False, 0),
    ("optim.max_warmup", False, 0),
    ("optim.weight_decay", False, 0),
    ("optim.weight_decay_end", False, 0),
    ("objective.student_temp", False, None),
    ("objective.clip_norm", False, None),
    ("objective.freeze_epochs", False, 0),
    ("objective.teacher_temp_epochs", False, 0),
    ("objective.max_warmup", False, 0),
    ("init.freeze_epochs", False, 0),
    ("init.max_freeze", False, 0),
    ("objective.num_prototypes", True, 2),
    ("objective.ema", False, 0),
    ("objective.teacher_temp_start", False, None),
    ("objective.teacher_temp", False, None),
    ("objective.head.hidden_dim", True, 1),
    ("objective.head.bottleneck_dim", True, 1),
)
MAY_BE_NULL = (  # or left out, as callbacks may be
    "num_workers",
    "callbacks.health.queue",
    "callbacks.health.patience",
    "callbacks.metrics.every_steps",
    "callbacks.checkpoints.every_steps",
    "callbacks.checkpoints.keep_last",
    "callbacks.checkpoints.milestone_every",
    "callbacks.online.every_steps",
    "callbacks.online.max_images",
    "objective.num_prototypes",
    "objective.ema",
    "objective.teacher_temp_start",
    "objective.teacher_temp",
)


SWITCHES = ("compile", "checkpoint_blocks")


def check_switches(cfg: DictConfig) -> None:
    """Each is true or false, and they go together.

    Raises:
        UserError: the first that is not, or two that exclude each other.
    """
    for key in SWITCHES:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            raise UserError(f"{key}={value}: true or false")
    if cfg.compile and cfg.checkpoint_blocks:
        raise UserError(
            "compile=true and checkpoint_blocks=true: a compiled program decides by itself what it "
            "computes again; set one of them"
        )


def check_numbers(
    cfg: DictConfig, numbers: Sequence[tuple[str, bool, float | None]] = NUMBERS
) -> None:
    """Every number of the settings is one, and in its range.

    Raises:
        UserError: the first that is not.
    """
    for key, whole, low in numbers:
        value = OmegaConf.select(cfg, key)
        if value is None and key in MAY_BE_NULL:
            continue
        kind = int if whole else int | float
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or not (value > 0 if low is None else value >= low):
            what = "a whole number" if whole else "a number"
            raise UserError(f"{key}={value}: {what} {'above 0' if low is None else f'from {low}'}")


@dataclass(frozen=True)
class Plan:
    """What follows from the configuration, the number of images and the number of devices."""

    num_images: int
    steps_per_epoch: float
    total_steps: int
    per_device_batch: int
    lr: float  # peak, for this batch
    warmup_steps: int
    freeze_steps: int
    teacher_temp_epochs: float
    num_prototypes: int
    ema: float
    teacher_temp_start: float
    teacher_temp: float
    backbone_freeze_steps: int = 0  # of a run that starts from weights with a fresh head


def make_plan(
    cfg: DictConfig, num_images: int, world_size: int, begun: Mapping[str, Any] | None = None
) -> Plan:
    """Steps, and the settings that the number of images decides.

    Args:
        cfg: the settings.
        num_images: of the source.
        world_size: devices.
        begun: the plan of a run that goes on, whose head and teacher stay, also with other images.

    Raises:
        UserError: a batch larger than the data, or that the devices do not divide; no epochs.
    """
    batch_size, epochs = cfg.batch_size, cfg.epochs
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
        if cfg.trainer.accumulate > each:
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
    if cfg.trainer.accumulate > batch_size // world_size:
        raise UserError(
            f"trainer.accumulate={cfg.trainer.accumulate}: a device has {batch_size // world_size} "
            "images a step, which cannot be taken in more parts"
        )
    objective, optim, init = cfg.objective, cfg.optim, cfg.init
    fresh = init.ckpt is not None and init.head == "fresh"
    rows = [row for row in objective.by_images if row["from"] <= num_images]
    if not rows:
        raise UserError("objective.by_images: a row with `from: 0` is needed")
    row = rows[-1]
    chosen = {
        key: row[key] if objective[key] is None else objective[key]
        for key in ("num_prototypes", "ema", "teacher_temp_start", "teacher_temp")
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
