"""Ctrl-C, SIGTERM and SLURM's SIGUSR1 save and end a run after a step; a rerun goes on."""

import logging
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_xcit.training.checkpoint import SaveCheckpoints
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.utils.ranks import LateSum

log = logging.getLogger(__name__)
# interrupted and saved; preempted and resumable
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}

# the last in this order that any rank has received counts
ORDER: list[int | None] = [None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


class Stopped(BaseException):
    """The run was asked to end; what it has learned is saved, unless the disk failed or there was
    no time. No error, so nothing that mends errors stops it.
    """

    def __init__(self, signal_number: int, step: int | None = None, saved: bool = True):
        where = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{where}")
        self.signal = signal.Signals(signal_number)
        self.exit_code = EXIT_CODES[self.signal]
        self.step = step
        self.saved = saved


class StopOnSignal(lightning.Callback):
    """While a step runs the handler only sets a flag; the step's end saves and raises `Stopped`. So
    does, with one process, the wait for the next step's images, which a file system that hangs may
    make long. Before and after training, when there is nothing to save, it raises at once. A second
    Ctrl-C leaves at once, unsaved; a second SIGTERM changes nothing.

    Handlers stay when a run has been stopped, until the process ends: a scheduler may ask twice.
    """

    def __init__(self, checkpoints: SaveCheckpoints):
        self.checkpoints = checkpoints
        self.received: int | None = None
        self.interrupted = False
        self.stopping = False
        self.training = False
        self.before: dict[int, Any] = {}
        self.ranks: Any = None  # a process group
        self.told: LateSum | None = None  # what ranks told each other at the end of the last step

    def signals(self) -> list[int]:
        """SIGUSR1 is SLURM's word for a time limit that is near; elsewhere it has other users."""
        under_slurm = "SLURM_JOB_ID" in os.environ
        return [s for s in EXIT_CODES if s != signal.SIGUSR1 or under_slurm]

    def install(self) -> None:
        """Take the signals, here and again where Lightning may have taken them."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals():
                before = signal.signal(number, self.receive)
                self.before.setdefault(number, before)

    def restore(self) -> None:
        """Give them back."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self.before.items():
                signal.signal(number, before)

    def setup(self, trainer: lightning.Trainer, *_: object, **__: object) -> None:
        """One rank must not leave while others wait for it: it takes a step with them first."""
        self.training = trainer.world_size > 1
        if trainer.world_size > 1:  # signals are on the host, where no device is waited for
            timeout = getattr(trainer.strategy, "_timeout", None)
            self.ranks = dist.new_group(backend="gloo", timeout=timeout)

    def on_train_start(self, trainer: lightning.Trainer, *_: object) -> None:
        """From here on there is something to save."""
        self.install()
        self.training = True
        if trainer.world_size == 1:
            data_of(trainer).running_loader.while_waiting = partial(self.between_steps, trainer)

    def between_steps(self, trainer: lightning.Trainer) -> None:
        """Leave if asked to, as at a step's end; before the first there is nothing to save."""
        if self.received is not None:
            if trainer.global_step == 0:
                self.stopping = True
                raise Stopped(self.received)
            self.leave(trainer, self.received)

    def on_train_end(self, *_: object) -> None:
        """Everything is saved."""
        self.training = False

    def after_training(self) -> None:
        """A signal between the last step and here is not lost."""
        self.training = False
        if self.received is not None:
            self.stopping = True
            raise Stopped(self.received)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        if self.stopping:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        again = number == signal.SIGINT and self.interrupted
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.received = ORDER[max(ORDER.index(number), ORDER.index(self.received))]
        if not self.training:
            self.stopping = True
            raise Stopped(number)
        if number == signal.SIGINT:
            if again:
                self.stopping = True
                raise Stopped(number, saved=False)
            with suppress(OSError):  # it may have ended what we are piped to
                os.write(1, b"\nstopping in a moment (Ctrl-C again leaves at once, unsaved)\n")

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save and leave when any rank was asked to; of several, when it was a step before, so that
        they agree on the signal and no step waits for that.
        """
        number = self.received
        if trainer.world_size > 1:
            told, self.told = self.told, self.tell()
            number = None if told is None else strongest(told.result())
        if number is not None:
            self.leave(trainer, number)

    def tell(self) -> LateSum:
        """Begin to count the ranks that each signal has reached."""
        reached = torch.zeros(len(ORDER), dtype=torch.int64)
        reached[ORDER.index(self.received)] = 1
        return LateSum(reached, self.ranks)

    def leave(self, trainer: lightning.Trainer, number: int) -> None:
        """Save this step and end the run."""
        saved = self.checkpoints.save(trainer)
        self.stopping = True
        raise Stopped(number, trainer.global_step, saved)


def strongest(reached: Tensor) -> int | None:
    """The last signal of `ORDER` that has reached a rank."""
    return ORDER[int(reached.nonzero().max())]


def requeue() -> None:
    """Have SLURM start this job again; what keeps it from that is logged."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise ValueError(f"SLURM_JOB_ID={job} is not a job's number")
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.error("the job could not be queued again: %s", error)
