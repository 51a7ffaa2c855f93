"""A peak learning rate by a range test: it rises from step to step, and the loss tells how far it
may (Smith, arXiv:1506.01186, section 3.3).
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning

from ssl_xcit.errors import RunFailed
from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.progress import ProgressBar
from ssl_xcit.training.run_dir import disk_trouble
from ssl_xcit.training.settings import TrainerSettings
from ssl_xcit.training.trainer import trial_trainer
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.terminal import say

FILE = "lr_range.csv"
MOST_STEPS, FEWEST_STEPS = 100, 10  # of a test; in between, those of the run
LOWEST, HIGHEST = 1e-6, 1e-1  # tried: far too low, far too high
MEMORY = 0.9  # of the running mean of the losses


@dataclass(frozen=True)
class Rising:
    """From `LOWEST` to `HIGHEST` in equal factors."""

    steps: int

    def __call__(self, step: float) -> float:
        """Value at `step`, counted from 0."""
        share = step / max(1, self.steps - 1)
        return float(LOWEST * (HIGHEST / LOWEST) ** share)


class Losses(lightning.Callback):
    """The loss of each step; ends the test when it is not finite."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Take the loss of the step."""
        loss = math.inf if module.output is None else float(module.output.loss)
        self.losses.append(loss)
        trainer.should_stop = not math.isfinite(loss)


def range_test(
    settings: TrainerSettings, module: Pretraining, data: TrainingData[Any], run_dir: Path
) -> float:
    """The learning rate that a range test proposes; `RUN/lr_range.csv` has its losses.

    Args:
        settings: of the trainer.
        module: a fresh one; it is of no use afterwards.
        data: of as many steps as are to be taken.
        run_dir: of the run.

    Raises:
        RunFailed: the loss falls at no rate.
    """
    losses, rate = Losses(), Rising(data.total_steps)
    module.guard.max_skipped = data.total_steps + 1  # as rates rise they may well not be finite
    schedules = module.schedules
    module.schedules = replace(
        schedules, lr=rate, weight_decay=at_start(schedules.weight_decay),
        ema=at_start(schedules.ema), backbone=None if schedules.backbone is None else at_end,
    )  # fmt: skip
    trainer = trial_trainer(settings, [losses, ProgressBar(lines=5)], data.total_steps, run_dir)
    say(f"lr=auto: {data.total_steps} steps with rates from {LOWEST:g} to {HIGHEST:g}")
    trainer.fit(module, datamodule=data)
    rates = [rate(step) for step in range(len(losses.losses))]
    with disk_trouble(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with replacing(run_dir / FILE) as part, part.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["lr", "loss", "running_mean"])
            rows.writerows(zip(rates, losses.losses, running_means(losses.losses), strict=True))
    return proposed(rates, losses.losses)


def at_start(schedule: Callable[[float], float]) -> Callable[[float], float]:
    """What a schedule begins with, all the time."""
    value = schedule(0)
    return lambda step: value


def at_end(step: float) -> float:
    """A backbone that is trained from the first step."""
    return 1.0


def running_means(losses: list[float]) -> list[float]:
    """Exponential means, corrected for their start."""
    means, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = MEMORY * mean + (1 - MEMORY) * loss, MEMORY * weight + 1 - MEMORY
        means.append(mean / weight)
    return means


def proposed(rates: list[float], losses: list[float]) -> float:
    """The middle of the longest valley: of the longest run of steps, others between them, along
    which the running mean of the losses falls; halfway between the logarithms of its ends.

    Raises:
        RunFailed: it never falls.
    """
    means = running_means(losses)
    length, before = [1] * len(means), list(range(len(means)))  # of the longest that ends here
    for end in range(len(means)):
        for start in range(end):
            if means[start] > means[end] and length[start] >= length[end]:
                length[end], before[end] = length[start] + 1, start
    first = last = max(range(len(means)), key=length.__getitem__)
    if length[last] == 1:
        raise RunFailed(
            "optim.lr=auto: the loss falls at none of the rates that were tried "
            f"({rates[0]:.0e} to {rates[-1]:.0e}): give a number, such as optim.lr=5e-4"
        )
    while before[first] != first:
        first = before[first]
    return math.sqrt(rates[first] * rates[last])
