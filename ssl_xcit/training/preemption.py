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

from ssl_xcit.training.checkpoint import SaveCheckpoints
from ssl_xcit.training.datamodule import data_of

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

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """From here on there is something to save."""
        self.install()
        module.guard.asked = lambda: ORDER.index(self.received)
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

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Everything is saved. What reached a rank since the last losses went round, all learn."""
        if trainer.world_size > 1:
            mine = torch.tensor(ORDER.index(self.received), device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(mine, reduce_op="max"))
            self.received = ORDER[max(agreed, ORDER.index(self.received))]  # one may have come
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
                os.write(1, b"\nstopping after this step (Ctrl-C again leaves at once, unsaved)\n")

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Save and leave when any rank was asked to, as all know since their losses went round."""
        one = trainer.world_size == 1
        number = self.received if one else ORDER[module.guard.agreed]
        if number is not None:
            self.leave(trainer, number)

    def leave(self, trainer: lightning.Trainer, number: int) -> None:
        """Save this step and end the run."""
        saved = self.checkpoints.save(trainer)
        self.stopping = True
        raise Stopped(number, trainer.global_step, saved)


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
