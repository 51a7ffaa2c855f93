"""Ctrl-C and SIGTERM end a run at the end of a step, saved, so that the same command goes on from
there.
"""

import signal
import threading
from types import FrameType

import lightning

from ssl_xcit.training.checkpoint import SaveCheckpoints

EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 75,
}  # interrupted and saved; preempted and resumable


class Stopped(Exception):
    """The run was asked to end and has been saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.exit_code = EXIT_CODES[signal.Signals(signal_number)]
        self.step = step


class StopOnSignal(lightning.Callback):
    """The handler only sets a flag; the step's end saves and raises `Stopped`. A second Ctrl-C
    leaves at once.
    """

    def __init__(self, checkpoints: SaveCheckpoints):
        self.checkpoints = checkpoints
        self.received: int | None = None

    def on_train_start(self, trainer: lightning.Trainer, *_: object) -> None:
        """Install the handlers, after Lightning's own."""
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        if number == signal.SIGINT:
            if self.received == number:
                raise KeyboardInterrupt
            print("\nstopping after this step (Ctrl-C again leaves at once, unsaved)", flush=True)
        self.received = number

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save and leave when any rank was asked to."""
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            self.checkpoints.save(trainer)
            raise Stopped(self.received or signal.SIGTERM, trainer.global_step)
