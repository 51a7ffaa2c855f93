"""Checkpoints: flushed to the disk, verified, then renamed, so that a name stands for a whole file;
the newest by step is what a run goes on from.
"""

import io
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.checkpoint_files import checkpoints_of, read_checkpoint
from ssl_xcit.models.checkpoint_manifest import Entry, add_entry, drop_lost_entries, verify
from ssl_xcit.utils.files import HashingWriter, replacing, sha256_of
from ssl_xcit.utils.validation import Count

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # in a row end the run
CHUNK = 1 << 20  # bytes that are hashed and written at a time


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints: tensors and plain containers only, in files with
    a checksum. A thread writes and verifies them, one after another, while training goes on.

    Attributes:
        last: what becomes of the last file on this rank; None: another rank writes it.
    """

    def __init__(self) -> None:
        self.writer = ThreadPoolExecutor(1, "checkpoint")  # ends its work before the process
        self.last: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Take a copy as it is now, to be written."""
        self.last = self.writer.submit(write_checkpoint, serialized(checkpoint), Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """On the CPU, verified."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Gone."""
        Path(path).unlink(missing_ok=True)


def failure_of(writing: "Future[None] | None") -> BaseException | None:
    """Wait for a file to be written; why it could not be, or None. Nothing is raised, for other
    ranks wait.
    """
    return None if writing is None else writing.exception()


def serialized(content: dict[str, Any]) -> memoryview:
    """A checkpoint as the bytes of its file.

    Raises:
        RunFailed: a callback's state is not plain data, and could not be loaded safely.
    """
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(stream):
        raise RunFailed(
            f"checkpoints hold tensors and plain containers only, and some callback's state has"
            f" {', '.join(unsafe)}"
        )
    return stream.getbuffer()


def write_checkpoint(content: memoryview, path: Path) -> None:
    """The file and its entry in the manifest, which comes first: a file with a name has one.

    Raises:
        OSError: the disk is full, or gives back something else than was written.
    """
    with replacing(path) as part:
        with part.open("wb") as file:
            hashing = HashingWriter(file)
            for start in range(0, len(content), CHUNK):
                hashing.write(content[start : start + CHUNK])
            file.flush()
            os.fsync(file.fileno())
            size, digest = file.tell(), hashing.sha256.hexdigest()
        if sha256_of(part) != digest:
            raise OSError(f"{path} reads back differently from what was written: a failing disk?")
        match = re.search(r"\d+", path.stem)
        add_entry(path, Entry(int(match[0]) if match else 0, size, digest))


def newest_valid(run_dir: Path, may_rename: bool = True) -> Path | None:
    """The checkpoint to go on from; a damaged one is put aside as `.corrupt` for the one before.

    One rank may rename, and all come to the same answer.

    Raises:
        RunFailed: there are checkpoints, and none is valid: never silently from the start.
    """
    checkpoints = checkpoints_of(run_dir)
    for path in reversed(checkpoints):
        try:
            if not verify(path):
                read_checkpoint(path)
        except FileNotFoundError:  # another rank has put it aside
            continue
        except OSError as error:  # says nothing about what is on the disk
            raise RunFailed(f"{path} cannot be read now ({error}): try again") from error
        except UserError as error:
            log.warning("%s; put aside as .corrupt, going on from the one before", error)
            if may_rename:
                with suppress(OSError):
                    path.replace(path.with_suffix(".corrupt"))
        else:
            return path
    damaged = sorted((run_dir / "checkpoints").glob("step-*.corrupt"))
    if checkpoints or damaged:
        names = ", ".join(p.name for p in damaged or checkpoints)
        raise RunFailed(
            f"no checkpoint of {run_dir} is valid ({names}): to start "
            "again from nothing, remove the folder or choose another name=..."
        )
    return None


class SaveCheckpoints(lightning.Callback):
    """`RUN/checkpoints/step-000100.ckpt` every so many steps and at the end; the newest few are
    kept, and milestones for good.

    A disk that fails ends training at the third time in a row only; what was saved before stays.

    Args:
        every_steps: steps between two checkpoints.
        keep_last: how many stay.
        milestone_every: steps between those that stay for good; None: none do.
    """

    def __init__(
        self, every_steps: Count = 100, keep_last: Count = 2, milestone_every: Count | None = None
    ):
        if milestone_every is not None and milestone_every % every_steps:
            raise UserError(
                f"callbacks.checkpoints.milestone_every={milestone_every}: a multiple of "
                f"every_steps={every_steps}"
            )
        self.every_steps = every_steps
        self.keep_last = keep_last
        self.milestone_every = milestone_every
        self.last_tried = -1
        self.last_saved: int | None = None
        self.failures = 0
        self.writing: tuple[int, Future[None] | None] | None = None  # step, what becomes of it

    def on_train_start(self, trainer: lightning.Trainer, *_: object) -> None:
        """What a run goes on from is saved already.

        Raises:
            RunFailed: ranks go on from different steps.
        """
        if trainer.strategy.broadcast(trainer.global_step) != trainer.global_step:
            raise RunFailed(
                f"rank {trainer.global_rank} would go on from step {trainer.global_step}, and rank "
                "0 from another: do all nodes see the same files?"
            )
        if trainer.global_step:
            self.last_tried = self.last_saved = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save on the grid, but not while steps are skipped: the weights may be unsound."""
        guard = getattr(trainer.lightning_module, "guard", None)
        left_out = guard.in_a_row if guard is not None else 0
        file = None if self.writing is None else self.writing[1]
        if trainer.world_size == 1 and file is not None and file.done():
            self.settle(trainer)  # so that what went wrong is said soon
        if trainer.global_step % self.every_steps == 0 and not left_out:
            self.begin(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save what the run ends with.

        Raises:
            RunFailed: that cannot be written.
        """
        if not self.save(trainer):
            raise RunFailed(
                "the last checkpoint could not be written: make room, and the same command goes on "
                f"from step {self.last_saved or 0}"
            )

    def save(self, trainer: lightning.Trainer) -> bool:
        """Write this step's checkpoint, unless it is written, and wait for it. All ranks call it at
        the same step.

        Returns:
            Whether this step is saved.

        Raises:
            RunFailed: the third failure in a row.
        """
        if self.last_tried != trainer.global_step:  # the same on every rank
            self.begin(trainer)
        self.settle(trainer)
        return self.last_saved == trainer.global_step

    def begin(self, trainer: lightning.Trainer) -> None:
        """Let this step's checkpoint be written, behind the one before. All ranks call it."""
        self.settle(trainer)
        step = self.last_tried = trainer.global_step
        files: Any = trainer.strategy.checkpoint_io
        folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.save_checkpoint(folder / f"step-{step:06d}.ckpt")
        self.writing = step, files.last

    def settle(self, trainer: lightning.Trainer) -> None:
        """Wait for the checkpoint that is being written, if there is one, and drop the oldest ones.
        All ranks call it.

        Raises:
            RunFailed: the third failure in a row.
        """
        if self.writing is None:
            return
        (step, file), self.writing = self.writing, None
        error = failure_of(file)
        failed = error is not None
        if trainer.world_size > 1:
            failed = trainer.strategy.reduce_boolean_decision(failed, all=False)
        if failed:
            self.failures += 1
            since = "nothing is saved yet" if self.last_saved is None else f"step {self.last_saved}"
            trouble = f"the checkpoint of step {step} could not be written ({error})"
            if self.failures >= MAX_FAILURES:
                raise RunFailed(
                    f"{trouble}, the {MAX_FAILURES}rd failure in a row; newest checkpoint: {since}"
                )
            if trainer.is_global_zero:
                log.error("%s; training goes on; newest checkpoint: %s", trouble, since)
            return
        self.failures, self.last_saved = 0, step
        if trainer.is_global_zero:
            self.drop(Path(trainer.default_root_dir))
        trainer.strategy.barrier("checkpoint")

    def leave(self) -> None:
        """Wait for what is still being written when a run ends otherwise than by `save`."""
        file, self.writing = self.writing and self.writing[1], None
        if (error := failure_of(file)) is not None:
            log.error("the last checkpoint could not be written (%s)", error)

    def drop(self, run_dir: Path) -> None:
        """All but the newest few and the milestones; the new one has been verified."""
        try:
            for path in checkpoints_of(run_dir)[: -self.keep_last]:
                step = int(path.stem.partition("-")[2])
                if not self.milestone_every or step % self.milestone_every:
                    path.unlink(missing_ok=True)
            drop_lost_entries(run_dir / "checkpoints")
        except OSError as error:  # the new one is sound, and old entries mean nothing
            log.error("old checkpoints could not be dropped (%s); training goes on", error)
