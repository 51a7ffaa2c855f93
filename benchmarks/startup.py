"""Seconds from typing a command to its first work, each in a process of its own.

    python benchmarks/startup.py [--rounds 5]

`pretrain` is the demo on the built-in photographs, up to the end of its first step. `eval` measures
k-NN on features that are in the cache, from beginning to end, of a run of seconds.
Rows take turns; printed are the smallest and the median wall time, and the smallest time that the
processor spent, which other programs hardly change. Writes benchmarks/results/startup.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
from measure import save

from ssl_xcit.utils.hardware import processor

HERE = Path(__file__).parent
KNN = [
    f"evaluation.evaluators.{name}=null"
    for name in ("few_shot", "linear", "logistic", "clustering", "retrieval", "several_labels")
]
KNN += ["evaluation.evaluators.regression=null"]
KNN += [f"evaluation.baselines.{name}=null" for name in ("random_weights", "colour_histogram")]
SHORT = ["epochs=0.1", "callbacks.online=null", "callbacks.snapshots=null", "report=null"]


class EndAtFirstStep(lightning.Callback):
    """Ends the process behind its first step."""

    def on_train_batch_end(self, *_: object) -> None:
        os._exit(0)


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a command, its loader processes left out."""
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{HERE}"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_xcit", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output.decode(errors='replace')}")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = f"out={folder}"
        seconds_of(["pretrain", out, "name=run", "num_workers=0", *SHORT, *KNN])
        evaluate = ["eval", f"ckpt={folder}/run", "device=cpu", *KNN]
        seconds_of(evaluate)  # which fills the cache
        commands = {"--help": ["--help"], "pretrain --help": ["pretrain", "--help"]}
        commands |= {"pretrain, first step": ["pretrain", out], "eval, ready features": evaluate}
        seconds: dict[str, list[tuple[float, float]]] = {row: [] for row in commands}
        for number in range(ARGS.rounds):
            for row, command in commands.items():
                own = [f"name=first-{number}", "num_workers=0"] if "first" in row else []
                own += ["+callbacks.end._target_=startup.EndAtFirstStep"] if own else []
                seconds[row].append(seconds_of([*command, *own]))
    print(f"{processor()}, {os.cpu_count()} cores, {ARGS.rounds} rounds")
    print(f"{'':<24}{'smallest':>10}{'median':>10}{'processor':>11}")
    results: dict[str, Any] = {}
    for row, pairs in seconds.items():
        walls, used = zip(*pairs, strict=True)
        low, middle, cpu = min(walls), statistics.median(walls), min(used)
        print(f"{row:<24}{low:>8.2f} s{middle:>8.2f} s{cpu:>9.2f} s")
        results[row] = {"smallest": low, "median": middle, "processor": cpu, "cpu": processor()}
    save("startup", results)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=5)

if __name__ == "__main__":
    ARGS = parser.parse_args()
    main()
