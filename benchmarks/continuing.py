"""Going on with DINO from good features with a fresh head: what k-NN does on the way, with the
recipe's defaults for a run from scratch, and with experiment=continue.

    python benchmarks/continuing.py [--ckpt RUN] [--seeds 3] [--epochs 4]

Without --ckpt a run on the built-in photographs is made first, as long as `make demo`.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "without care": [
        "init.freeze_epochs=0",
        "objective.freeze_epochs=0",
        "optim.warmup_epochs=0",
        "optim.lr=8e-3",  # 1e-3 at batch 32
    ],
    "as from scratch": ["init.freeze_epochs=0"],
    "experiment=continue": ["experiment=[photos,continue]"],
}
DINO = ["objective=dino", "augment.num_local=4", "evaluation=published"]
COMMON = [
    *DINO,
    "report=null", "callbacks.snapshots=null", "callbacks.online.eval_budget=null",
    "callbacks.online.every_steps=10", "callbacks.online.max_images=1000",
    *(f"evaluation.evaluators.{name}=null"
      for name in ("few_shot", "linear", "logistic", "clustering", "retrieval")),
    "evaluation.baselines=null",
]  # fmt: skip


def run(words, folder):
    command = [sys.executable, "-m", "ssl_xcit", "pretrain", f"out={folder}", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def knn_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["knn_k20"]) for row in csv.DictReader(file) if row.get("knn_k20")]


def final(folder):
    return json.loads((folder / "summary.json").read_text())["results"]["pretrained"]["knn_k20"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ckpt = arguments.ckpt
        if ckpt is None:
            run(["name=first", "report=null", "epochs=13", *DINO], folder)
            ckpt = folder / "first"
        print(f"k-NN (20) before: {final(ckpt):.1f}\n")
        print("| from there | seed | lowest on the way | at the end |\n|---|---:|---:|---:|")
        for name, words in WAYS.items():
            for seed in range(arguments.seeds):
                place = f"{name.replace('=', '-').replace(' ', '-')}-{seed}"
                settings = [f"init.ckpt={ckpt.resolve()}", f"epochs={arguments.epochs}"]
                run([*words, *settings, *COMMON, f"seed={seed}", f"name={place}"], folder)
                lowest = min(knn_of(folder / place))
                print(
                    f"| {name} | {seed} | {lowest:.1f} | {final(folder / place):.1f} |", flush=True
                )


if __name__ == "__main__":
    main()
