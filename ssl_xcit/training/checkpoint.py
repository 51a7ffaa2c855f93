"""Checkpoints: written beside their final name and renamed, so that a name stands for a whole
file.
"""

import re
from pathlib import Path

import lightning


class SaveCheckpoints(lightning.Callback):
    """`RUN/checkpoints/step-000100.ckpt` every so many steps and at the end; the newest few are
    kept.

    Args:
        every_steps: steps between two checkpoints.
        keep_last: how many stay.
    """

    def __init__(self, every_steps: int = 100, keep_last: int = 2):
        if every_steps < 1 or keep_last < 1:
            raise ValueError(f"every_steps={every_steps}, keep_last={keep_last}: both start at 1")
        self.every_steps = every_steps
        self.keep_last = keep_last

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save on the grid."""
        if trainer.global_step % self.every_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save what the run ends with."""
        self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> Path:
        """Write this step's checkpoint, unless it is there, and drop the oldest beyond
        `keep_last`.
        """
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step-{trainer.global_step:06d}.ckpt"
        if path.exists():
            return path
        part = folder / f".{path.name}.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(path)
            for old in sorted(folder.glob("step-*.ckpt"), key=step_of)[: -self.keep_last]:
                old.unlink()
        return path


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    return int(match[1]) if match else -1
