"""Checkpoints: written beside their final name and renamed, so that a name stands for a whole
file.
"""

from pathlib import Path

import lightning

from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import checkpoints_of


class SaveCheckpoints(lightning.Callback):
    """`RUN/checkpoints/step-000100.ckpt` every so many steps and at the end; the newest few are
    kept.

    Args:
        every_steps: steps between two checkpoints.
        keep_last: how many stay.
    """

    def __init__(self, every_steps: int = 100, keep_last: int = 2):
        if every_steps < 1 or keep_last < 1:
            raise UserError(f"every_steps={every_steps}, keep_last={keep_last}: both start at 1")
        self.every_steps = every_steps
        self.keep_last = keep_last
        self.saved_step = -1

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save on the grid."""
        if trainer.global_step % self.every_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save what the run ends with."""
        self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Write this step's checkpoint, unless it is written, and drop the oldest ones.

        All ranks call it at the same step.
        """
        if self.saved_step == trainer.global_step:
            return
        self.saved_step = trainer.global_step  # the same on every rank, which the disk need not be
        run_dir = Path(trainer.default_root_dir)
        path = run_dir / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
        part = path.with_name(f".{path.name}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(path)
            for old in checkpoints_of(run_dir)[: -self.keep_last]:
                old.unlink()
        trainer.strategy.barrier("checkpoint")
