"""Does pretraining help? The three tasks on the built-in images, from scratch, from the weights of
`make demo`, and on its frozen backbone, at equal steps and with few labels.

python benchmarks/transfer.py --ckpt runs/demo [--task classification,segmentation,detection]
    [--fractions 0.05,0.2,1.0] [--seeds 0,1,2] [--out runs/transfer] [--table]

Each run is `ssl-xcit finetune` with the built-in recipe of the task (segmentation with the images'
own 128 pixels instead of 96), cut to a number of steps; one that is finished is not run again, so
several processes may share the work (--seeds 0, --seeds 1). `--table` prints the mean over the
seeds, and the lowest and highest, of what is finished.
"""

import argparse
import json
import statistics
from pathlib import Path

from ssl_xcit import cli

IMAGES = {"classification": 1494, "segmentation": 1200, "detection": 1200}
STEPS = {"classification": 150, "segmentation": 150, "detection": 200}
BATCH = {"classification": 32, "segmentation": 8, "detection": 8}
WORDS = {  # besides the recipe
    "classification": [], "segmentation": ["augment.size=128", "augment.crop=128"], "detection": []
}  # fmt: skip
NUMBERS = {
    "classification": ["top1"], "segmentation": ["miou"], "detection": ["box_AP50", "mask_AP50"]
}  # fmt: skip
ARMS = ("scratch", "pretrained", "frozen")


def folder(out: Path, task: str, arm: str, fraction: float, seed: int) -> Path:
    return out / f"{task}-{arm}-{fraction:g}-{seed}"


def words(args: argparse.Namespace, task: str, arm: str, fraction: float, seed: int) -> list[str]:
    images = max(1, round(IMAGES[task] * fraction))
    start = {
        "scratch": ["model=xcit_micro_4_p8"],
        "pretrained": [f"ckpt={args.ckpt}"],
        "frozen": [f"ckpt={args.ckpt}", "freeze=head"],
    }
    return [
        "finetune", f"transfer={task}", *start[arm], f"label_fraction={fraction}", f"seed={seed}",
        # a little more, so that rounding down gives these steps
        f"epochs={STEPS[task] * BATCH[task] / images + 0.001}", f"batch_size={BATCH[task]}",
        f"out={args.out}", f"name={folder(args.out, task, arm, fraction, seed).name}",
        "report=null", "callbacks.online=null", "callbacks.checkpoints.every_steps=1000",
        "trainer=cpu", "trainer.precision=32-true", "num_workers=0",
        *WORDS[task],
    ]  # fmt: skip


def table(args: argparse.Namespace) -> None:
    print("| task, number | labels | " + " | ".join(ARMS) + " |")
    print("|---|---|" + "---|" * len(ARMS))
    for task in args.task:
        for number in NUMBERS[task]:
            for fraction in args.fractions:
                cells = []
                for arm in ARMS:
                    files = [
                        folder(args.out, task, arm, fraction, seed) / "summary.json"
                        for seed in args.seeds
                    ]
                    found = [json.loads(f.read_text())["results"] for f in files if f.is_file()]
                    values = [result[task][number] for result in found]
                    mean = f"{statistics.mean(values):.1f}" if values else "-"
                    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
                    cells.append(mean + spread)
                print(f"| {task}, {number} | {100 * fraction:g} % | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="runs/demo")
    parser.add_argument("--task", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument(
        "--fractions", type=lambda text: [float(w) for w in text.split(",")], default=[0.05, 0.2, 1]
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(w) for w in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table(args)
        return
    for task in args.task:
        for seed in args.seeds:
            for fraction in args.fractions:
                for arm in ARMS:
                    cli.main(words(args, task, arm, fraction, seed))


if __name__ == "__main__":
    main()
