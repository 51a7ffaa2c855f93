"""Optuna with pruning against a grid on the built-in photographs: the best k-NN of each, and the
steps that all trials have taken.

    python benchmarks/sweep.py [--epochs 3] [--trials 10]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from ssl_xcit.sweeps import trial as trials

GRID = ["optim.lr=5e-4,1e-3,2.5e-3,8e-3", "objective.teacher_temp=0.04,0.07"]
SPACE = ["optim.lr=tag(log,interval(5e-4,8e-3))", "objective.teacher_temp=0.04,0.07"]
COMMON = [
    "callbacks.snapshots=null", "callbacks.online.eval_budget=null", "evaluation.baselines=null",
    "callbacks.online.every_steps=15", "callbacks.online.max_images=1000",
    *(f"evaluation.evaluators.{name}=null"
      for name in ("few_shot", "linear", "logistic", "clustering", "retrieval")),
]  # fmt: skip


def swept(folder, words):
    """(best k-NN, steps of all trials, trials that ended early)."""
    command = [sys.executable, "-m", "ssl_xcit", "pretrain", "-m", f"out={folder}", *COMMON, *words]
    subprocess.run(command, check=True)
    (sweep,) = (p.parent for p in folder.glob("*/sweep.json"))
    runs = [p.parent for p in sweep.glob("*/trial.json")]
    values = [trials.final_value(r, "knn_k20") for r in runs if (r / "summary.json").is_file()]
    pruned = sum(trials.state_of(run) == trials.PRUNED for run in runs)
    return max(values), sum(trials.steps_done(run) for run in runs), pruned


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    epochs = f"epochs={arguments.epochs}"
    search = ["sweep=optuna", f"sweep.search.num_trials={arguments.trials}",
              "sweep.search.startup_trials=5", "sweep.search.pruning.first=0.125"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        best, steps, _ = swept(Path(folder) / "grid", [epochs, *GRID])
        found, taken, pruned = swept(Path(folder) / "optuna", [epochs, *SPACE, *search])
    print("\n| | best k-NN 20 | steps | ended early |\n|---|---:|---:|---:|")
    print(f"| grid of 8 | {best:.1f} | {steps:,} | |")
    print(f"| Optuna, {arguments.trials} trials | {found:.1f} | {taken:,} | {pruned} |")
    print(f"\n{taken / steps:.2f} of the grid's steps")


if __name__ == "__main__":
    main()
