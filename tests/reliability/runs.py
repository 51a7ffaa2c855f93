"""Runs of 40 steps with one thread, a checkpoint every 5 and a record of each step, as processes
that may be killed.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path
from tricks import bytes_of

from ssl_xcit.models.checkpoint_files import read_checkpoint

HERE = Path(__file__).resolve().parent
STEPS = 40
TOY = [
    "pretrain", "epochs=0.2145", "batch_size=8", "num_workers=0", "eval_data=none",
    "~callbacks.online", "callbacks.snapshots=null", "report=null", "trainer=cpu",
    "trainer.precision=32-true", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "model.drop_path=0.2", "augment.global_size=32", "augment.local_size=16",
    "augment.num_local=4", "objective=dino", "objective.num_prototypes=32",
    "objective.head.hidden_dim=16",
    "objective.head.bottleneck_dim=8", "callbacks.metrics.every_steps=3",
    "callbacks.checkpoints.every_steps=5", "+callbacks.record._target_=tricks.Record",
]  # fmt: skip
NO_RECORD = [word for word in TOY if "record" not in word]


def trick(name, **options):
    """The words that add one of the callbacks of tricks.py."""
    words = [f"+callbacks.{name.lower()}.{key}={value}" for key, value in options.items()]
    return [f"+callbacks.{name.lower()}._target_=tricks.{name}", *words]


def content_of(checkpoint):
    """Every number and tensor of a file by its path, bit by bit, and the structure that they stand
    in.
    """
    content = read_checkpoint(checkpoint)
    content.pop("loops")  # Lightning counts batches of this process there
    leaves, structure = tree_flatten_with_path(content)
    return structure, {
        keystr(path): bytes_of(leaf) if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in leaves
    }


class Zygote:
    """See zygote.py."""

    def __init__(self, cache):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "XDG_CACHE_HOME": str(cache),
        }
        self.process = subprocess.Popen(
            [sys.executable, HERE / "zygote.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.changed = threading.Condition()
        self.started, self.ended = [], {}
        assert json.loads(self.process.stdout.readline())["ready"]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            news = json.loads(line)
            with self.changed:
                if "status" in news:
                    self.ended[news["pid"]] = news["status"]
                else:
                    self.started.append(news["pid"])
                self.changed.notify_all()

    def spawn(self, job):
        with self.changed:
            count = len(self.started)
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            assert self.changed.wait_for(lambda: len(self.started) > count, timeout=30)
            return self.started[-1]

    def wait(self, pid, timeout):
        with self.changed:
            assert self.changed.wait_for(lambda: pid in self.ended, timeout), "still running"
            return self.ended[pid]


class Run:
    """A command that was started in a folder."""

    def __init__(self, zygote, folder, words, env, call):
        self.zygote, self.folder = zygote, folder
        number = len(list(folder.glob("out-*")))
        self.outputs = folder / f"out-{number}", folder / f"err-{number}"
        out, err = map(str, self.outputs)
        job = {"words": words, "cwd": str(folder), "env": env, "out": out, "err": err, "call": call}
        self.pid = zygote.spawn(job)

    def wait(self, timeout=60):
        """The exit status; negative for a signal."""
        return self.zygote.wait(self.pid, timeout)

    def ends(self, status=0, timeout=60):
        """Check the exit status, and that no traceback stands in what it wrote to stderr."""
        assert self.wait(timeout) == status, self.err
        assert "Traceback" not in self.err
        return self.err

    def over(self):
        return self.pid in self.zygote.ended

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    @property
    def out(self):
        return self.outputs[0].read_text()

    @property
    def err(self):
        return self.outputs[1].read_text()


class Place:
    """A folder to start runs in; `run_dir` is that of the run `x`."""

    def __init__(self, zygote, folder, words=TOY):
        folder.mkdir(exist_ok=True)
        self.zygote, self.folder, self.words = zygote, folder, words
        self.run_dir = folder / "runs/x"
        self.runs = []

    def start(self, *more, words=None, env=(), call=()):
        words = words or self.words
        taken = [w for w in words if w.split("=")[0] not in {m.split("=")[0] for m in more}]
        name = ["name=x"] if words[0] in ("pretrain", "finetune") else []
        run = Run(self.zygote, self.folder, [*taken, *name, *more], dict(env), list(call))
        self.runs.append(run)
        return run

    def __call__(self, *more, status=0, timeout=60, **options):
        """Start, and wait for this exit status; what it wrote to stderr."""
        return self.start(*more, **options).ends(status, timeout)

    def killed_at(self, step, *more):
        run = self.start(*more)
        self.until_step(step, run)
        run.kill()
        return run

    def held_at(self, step, *more, timeout=60, **options):
        """A run that waits at this step until a file is gone; (run, file)."""
        run = self.start(*more, *trick("Hold", step=step), **options)
        holding = self.run_dir / "holding-0"
        self.until(holding.exists, run, timeout)
        return run, holding

    def records(self, rank=0):
        path = self.run_dir / f"record-{rank}.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):  # cut short by SIGKILL
                found.append(json.loads(line))
        return found

    def until_step(self, step, run, timeout=60):
        """Wait until a run, and not one before it, has recorded a step."""

        def there():
            return any(r["pid"] == run.pid and r["step"] >= step for r in self.records())

        self.until(there, run, timeout)

    def until(self, what, run, timeout=60):
        deadline = time.monotonic() + timeout
        while not what():
            assert not run.over(), run.err
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def checkpoints(self):
        return sorted(p.name for p in (self.run_dir / "checkpoints").glob("step-*.ckpt"))

    def metrics(self):
        """Rows without those columns that measure time."""
        with (self.run_dir / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        timed = ("images_per_second", "data_wait", "online_seconds", "online_share")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def facts(record, without=()):
    """What must be equal in two runs."""
    keys = [k for k in ("images", "loss", "before", "hash", "state") if k not in without]
    return {k: record[k] for k in keys}


def assert_equal_runs(place, reference, rank=0, without=()):
    """Every record ever made equals the reference's of that step, every step is there, and the
    metrics are the same.
    """
    expected = {r["step"]: facts(r, without) for r in reference.records(rank)}
    found = place.records(rank)
    for record in found:
        assert facts(record, without) == expected[record["step"]], record["step"]
    assert {r["step"] for r in found} == set(expected)
    assert place.metrics() == reference.metrics()


def assert_goes_on(place, reference):
    """The same command again ends well, and as a run that nothing happened to."""
    place()
    assert_equal_runs(place, reference)
