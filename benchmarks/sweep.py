"""Optuna with pruning against a grid on the built-in photographs, with a small network and small
crops: the best k-NN of each, and the steps that all trials have taken.

    python benchmarks/sweep.py [--epochs 3] [--trials 10] [--seeds 1]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from ssl_xcit.sweeps import trial as trials

GRID = ["optim.lr=1e-4,1e-3,1e-2,1e-1", "objective.teacher_temp=0.04,0.07"]
SPACE = ["optim.lr=tag(log,interval(1e-4,1e-1))", "objective.teacher_temp=0.04,0.07"]
COMMON = [
    "objective=dino",
    "model.embed_dim=64", "model.depth=2", "model.num_heads=2", "augment.global_size=32",
    "augment.local_size=16", "augment.num_local=2", "trainer.precision=32-true",
    "callbacks.snapshots=null", "callbacks.online.eval_budget=null", "evaluation.baselines=null",
    "callbacks.online.every_steps=11", "callbacks.online.max_images=500",
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
    parser.add_argument("--seeds", type=int, default=1, help="of Optuna's draws")
    arguments = parser.parse_args()
    epochs = f"epochs={arguments.epochs}"
    search = ["sweep=optuna", f"sweep.num_trials={arguments.trials}",
              "sweep.sampler.n_startup_trials=5", "sweep.pruner.min_resource=12"]  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        best, steps, _ = swept(Path(folder) / "grid", [epochs, *GRID])
        for seed in range(arguments.seeds):
            draws = [*SPACE, *search, f"sweep.seed={seed}"]
            rows.append((seed, *swept(Path(folder) / f"optuna-{seed}", [epochs, *draws])))
    print("\n| | best k-NN 20 | steps | of the grid's | ended early |\n|---|---:|---:|---:|---:|")
    print(f"| grid of 8 | {best:.1f} | {steps:,} | | |")
    for seed, found, taken, pruned in rows:
        name = f"Optuna, {arguments.trials} trials, seed {seed}"
        print(f"| {name} | {found:.1f} | {taken:,} | {taken / steps:.2f} | {pruned} |")


if __name__ == "__main__":
    main()
