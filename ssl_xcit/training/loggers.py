"""Loggers beside `metrics.csv` never stop training: one that fails is said once and left out."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)
Image = UInt8[np.ndarray, "height width 3"]


def takes_images(logger: Any) -> bool:
    """Whether `give_images` has somewhere to put them; a tolerant logger finds out by itself."""
    return hasattr(logger, "log_image") or hasattr(board_of(logger), "add_image")


def give_images(logger: Any, key: str, images: Sequence[Image], step: int | None = None) -> None:
    """To wandb (`log_image`) or TensorBoard (`experiment.add_image`); others get none."""
    if hasattr(logger, "log_image"):
        logger.log_image(key, list(images), step=step)
    elif hasattr(board := board_of(logger), "add_image"):
        for number, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{number}"
            board.add_image(name, image, step, dataformats="HWC")


def board_of(logger: Any) -> Any:
    """What TensorBoard's logger writes to; None of others."""
    return getattr(logger, "experiment", None)


class FailsafeLogger(Logger):
    """The first of several ways to make a logger that works, such as on line and then off line;
    without any, nothing is logged. `label` is what the settings call it.
    """

    version = ""

    def __init__(self, label: str, ways: Sequence[Callable[[], Logger]]):
        super().__init__()
        self.label = label
        self.ways = list(ways)
        self.inner: Logger | None = None
        self.warned = False

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return self.label

    @property
    def experiment(self) -> Any:
        """Of the logger inside, which begins here; None without one."""
        self.begin()
        return None

    @rank_zero_only
    def begin(self) -> None:
        """Once, before the first step."""
        failed: list[Exception] = []
        while self.inner is None and self.ways:
            make = self.ways.pop(0)
            try:
                made = make()
                _ = getattr(made, "experiment", None)
            except Exception as error:
                failed.append(error)
            else:
                self.inner = made
        if failed:
            works = "it goes on off line" if self.inner else "the run goes on without it"
            self.warn(failed[0], works)

    def warn(self, error: Exception, what_now: str) -> None:
        """Once a run."""
        if not self.warned:
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("logger %s: %s; %s; metrics.csv is complete", self.label, reason, what_now)
        self.warned = True

    def call(self, method: str, *args: Any) -> None:
        """A method of the logger inside."""
        self.attempt(lambda inner: getattr(inner, method)(*args))

    def attempt(self, work: Callable[[Logger], object]) -> None:
        """Something with the logger inside; it is left out when that fails."""
        if self.inner is not None:
            try:
                work(self.inner)
            except Exception as error:
                self.warn(error, "the run goes on without it")
                self.inner = None
                self.ways.clear()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hand on."""
        self.begin()
        self.call("log_metrics", metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image], step: int | None = None) -> None:
        """Hand on, as Lightning's loggers take them; those that take no images get none."""
        self.begin()
        self.attempt(lambda inner: give_images(inner, key, images, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on."""
        self.call("log_hyperparams", params)

    @rank_zero_only
    def save(self) -> None:
        """Hand on."""
        self.call("save")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Hand on."""
        self.call("finalize", status)

    @rank_zero_only
    def conclude(self, run_dir: Path) -> None:
        """Hand on what a finished run has left, where that is wanted."""
        self.begin()
        if hasattr(self.inner, "conclude"):
            self.call("conclude", run_dir)

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """wandb's run ends here, not with the process."""
        experiment: Any = getattr(self.inner, "experiment", None)
        if hasattr(experiment, "finish"):
            try:
                experiment.finish(exit_code=exit_code)
            except Exception as error:
                self.warn(error, "its record may end early")
