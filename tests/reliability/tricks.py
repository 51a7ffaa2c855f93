"""What happens to runs: a record of each step, and accidents at a step or a byte, as callbacks and
as functions of no argument that the zygote calls first.
"""

import json
import os
import signal
import time
from hashlib import blake2b
from pathlib import Path

import lightning
import torch

from ssl_xcit.commands import pretrain
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.dino import Center
from ssl_xcit.training import checkpoint, preemption, session
from ssl_xcit.utils import files


def bytes_of(tensor):
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(states):
    """Of the tensors of several states, bit by bit."""
    found = blake2b(digest_size=8)
    for state in states:
        for name in sorted(state):
            found.update(bytes_of(state[name]))
    return found.hexdigest()


def digest_of_networks(module):
    return digest(network.state_dict() for network in module.children())


class Record(lightning.Callback):
    """`RUN/record-RANK.jsonl`: sample ids, loss as a hex float, hashes of weights and center."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = digest_of_networks(module)

    def on_train_start(self, trainer, module):
        train = module.training_step

        def recorded(views, batch_idx):
            outputs = train(views, batch_idx)
            self.write(trainer, module)  # before the step's checkpoint, so that none is lost
            return outputs

        module.training_step = recorded

    def write(self, trainer, module):
        row = {
            "step": trainer.global_step,
            "images": trainer.datamodule.indices.tolist(),
            "loss": float(module.output.loss).hex(),
            "before": self.before,
            "hash": digest_of_networks(module),
            "state": digest(trainer.optimizers[0].state.values()),
            "pid": os.getpid(),
        }
        path = Path(trainer.default_root_dir) / f"record-{trainer.global_rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Poison(lightning.Callback):
    """NaN in the images, or in one gradient, at some steps (counted from 1) on one rank."""

    def __init__(self, steps, rank=0, what="images"):
        self.steps, self.rank, self.what = set(steps), rank, what

    def on_train_start(self, trainer, module):
        if self.what == "gradient":
            parameter = module.student.backbone.blocks[0].attn.proj.weight
            here = trainer.global_rank == self.rank

            def spoil(gradient):
                now = trainer.global_step + 1 in self.steps and here
                return gradient * float("nan") if now else gradient

            parameter.register_hook(spoil)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        here = trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank
        if here and self.what == "images":
            batch[0].fill_(float("nan"))


class Slow(lightning.Callback):
    """Sleeps a while at each step."""

    def __init__(self, seconds=0.1):
        self.seconds = seconds

    def on_train_batch_start(self, *_):
        time.sleep(self.seconds)


class Hold(lightning.Callback):
    """At a step (counted from 1) on one rank: says so in `RUN/holding-RANK`, and waits until the
    file is gone.
    """

    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            path = Path(trainer.default_root_dir) / f"holding-{self.rank}"
            path.write_text(str(os.getpid()))
            while path.exists():
                time.sleep(0.01)


def die_within_a_write():
    """SIGKILL after WRITE_BYTES bytes of the WRITE_NUMBER-th checkpoint, or before its rename."""
    number, limit = int(os.environ["WRITE_NUMBER"]), int(os.environ["WRITE_BYTES"])
    counts = {"files": 0, "bytes": 0}

    class Deadly(files.HashingWriter):
        def __init__(self, file):
            super().__init__(file)
            counts["files"] += 1
            counts["bytes"] = 0

        def write(self, data):
            counts["bytes"] += len(data)
            if counts["files"] == number and counts["bytes"] > limit:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    checkpoint.HashingWriter = Deadly
    enter = checkpoint.add_entry

    def deadly(*args):
        enter(*args)
        if counts["files"] == number and limit < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.add_entry = deadly


def die_behind_a_write():
    """SIGKILL when the WRITE_NUMBER-th checkpoint has its name."""
    write, count = checkpoint.write_checkpoint, []

    def deadly(content, path):
        write(content, path)
        count.append(path)
        if len(count) == int(os.environ["WRITE_NUMBER"]):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_checkpoint = deadly


def no_space(*_):
    raise OSError(28, "No space left on device")


def full_when_dropping():
    """Room for the new checkpoint, none for the manifest without the old ones."""
    checkpoint.drop_lost_entries = no_space


def slow_writes():
    """Each checkpoint takes half a second and says when it begins."""
    write = checkpoint.write_checkpoint

    def slowly(content, path):
        Path(os.environ["WRITING"]).write_text("now")
        time.sleep(0.5)
        write(content, path)

    checkpoint.write_checkpoint = slowly


def lying_disk():
    """From LIE_FROM on, what is flushed comes back with a bit flipped."""
    sha256_of, read = checkpoint.sha256_of, []

    def flipped(path):
        read.append(path)
        if len(read) >= int(os.environ["LIE_FROM"]):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        return sha256_of(path)

    checkpoint.sha256_of = flipped


def signal_before_training():
    """SIGTERM while the images are being looked at."""
    make = pretrain.multi_crop_data

    def interrupted(*args):
        made = make(*args)
        install = preemption.StopOnSignal.install

        def then(self):
            install(self)
            os.kill(os.getpid(), signal.SIGTERM)

        preemption.StopOnSignal.install = then
        return made

    pretrain.multi_crop_data = interrupted


def small_memory():
    """A device that holds the crops of ten images at a time, and says so as CUDA does."""
    forward = XCiT.forward

    def limited(self, x):
        if len(x) > 2 * 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x)

    XCiT.forward = limited


def no_centering():
    """The center stays where it is."""
    Center.update_ = lambda self, logits: None


def signal_after_training():
    """SIGTERM when the features are to be measured."""

    def interrupted(*args):
        os.kill(os.getpid(), signal.Signals[os.environ.get("THE_SIGNAL", "SIGTERM")])

    pretrain.conclude = interrupted


def no_room():
    """The settings cannot be written."""
    session.write_settings = no_space
