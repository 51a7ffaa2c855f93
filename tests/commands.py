"""Commands as a person types them, in this process; `SMALL` keeps a run at seconds."""

import csv
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_xcit import cli

EVALUATION = [  # k-NN and a short linear probe
    "evaluation.evaluators.linear.epochs=2", "evaluation.evaluators.few_shot=null",
    "evaluation.evaluators.logistic=null", "evaluation.evaluators.clustering=null",
    "evaluation.evaluators.retrieval=null",
]  # fmt: skip
SMALL = [
    "epochs=0.05", "batch_size=8", "num_workers=0", "model.embed_dim=32", "model.depth=1",
    "model.num_heads=2", "augment.global_size=32", "augment.local_size=16",
    "augment.num_local=4", "objective=dino", "objective.num_prototypes=32",
    "objective.head.hidden_dim=16",
    "objective.head.bottleneck_dim=8", "callbacks.metrics.every_steps=2",
    "callbacks.online.every_steps=4", "callbacks.online.max_images=100",
    "callbacks.checkpoints.every_steps=3", "callbacks.online.eval_budget=null",
    "callbacks.snapshots=null", "report=null", *EVALUATION,
]  # fmt: skip
NO_ONLINE = [o for o in SMALL if not o.startswith("callbacks.online")]


def run(*words):
    """(exit code, nothing is raised)."""
    try:
        cli.main(words)
    except SystemExit as end:
        return end.code or 0
    return 0


def metrics(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_state(folder):
    """Networks and optimizer of the last checkpoint of a run."""
    newest = max(Path(folder, "checkpoints").glob("step-*.ckpt"))
    content = torch.load(newest, weights_only=True)
    return content["state_dict"], content["optimizer_states"]


def images(folder, count, size=(48, 48)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")


HOLD = """
import sys, time
from pathlib import Path
from ssl_xcit.utils.locks import exclusive
with exclusive(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another(lock):
    """The number of a process that holds this lock meanwhile, and is killed with it."""
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def same(one, two):
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two
