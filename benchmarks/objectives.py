"""What a training step of each objective costs against DINO's: time, interleaved, and memory.

    python benchmarks/objectives.py [--objectives dino,infonce,...] [--rounds 15]
        [--words "model=xcit_nano_12_p16 augment.global_size=224 ..."] [--threads 2]

The step is the real one, as in the middle of a run, with the recipe of the built-in photographs
(`--words` changes it) and random pixels. The frozen teacher of distillation is as large as the
student. Prints medians, the ratio to DINO by round with its range, and the peak memory of each in a
process of its own above what the imports take. Writes benchmarks/results/objectives.json.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import compared, interleaved, save, status
from real_step import step_of

OBJECTIVES = ["dino", "swav", "infonce", "simdino", "region", "ibot", "dinov2", "distillation"]


def teacher_file(settings: Any, folder: Path) -> Path:
    """A checkpoint to distil from, of the student's architecture."""
    backbone = instantiate(settings.model)
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": {}}
    torch.save(content, folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


def objective_step(objective: str, words: list[str], folder: Path) -> Callable[[], object]:
    """A step of training, without the trainer around it."""
    given = ["experiment=photos", f"objective={objective}", "trainer.precision=32-true", *words]
    if objective == "distillation":
        with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
            cfg = compose("pretrain", given)
        given.append(f"objective.teacher={teacher_file(cfg, folder)}")
    return step_of(given)


def peak_memory(objective: str, words: list[str], folder: Path) -> None:
    """Printed: bytes at the peak of three steps, above those of a process that has imported all."""
    before = status("VmRSS")
    step = objective_step(objective, words, folder)
    for _ in range(3):
        step()
    print(status("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=OBJECTIVES)
    parser.add_argument("--words", default="")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = args.words.split()
    with tempfile.TemporaryDirectory() as folder:
        if args.peak_of:
            peak_memory(args.peak_of, words, Path(folder))
            return
        measured = dict.fromkeys(["dino", *args.objectives])
        steps = {o: objective_step(o, words, Path(folder)) for o in measured}
        seconds = interleaved(steps, args.rounds, warm_up=3)
    results = {}
    print("| objective | ms a step | times dino | peak MB |\n|---|---:|---:|---:|")
    for objective in measured:
        command = [sys.executable, *sys.argv, "--peak-of", objective]
        peak = int(subprocess.run(command, stdout=-1, check=True).stdout) / 2**20
        pair = {name: seconds[name] for name in ("dino", objective)}
        found = {**compared(pair, "dino", objective), "peak_mb": round(peak)}
        results[f"{objective} {args.words}".strip()] = found
        low, high = found["ratio_range"]
        print(
            f"| {objective} | {1000 * found['seconds'][objective]:.0f} | {found['ratio']:.2f} "
            f"({low:.2f}-{high:.2f}) | {peak:.0f} |",
            flush=True,
        )
    save("objectives", results)


if __name__ == "__main__":
    main()
