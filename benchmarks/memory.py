"""Peak memory of a training step: computed from fake tensors, and measured.

    python benchmarks/memory.py [--rows nano_12_p16,small_12_p16] [--threads 1]

Each row measures the real step in a process of its own: the resident set at the peak of three
steps, above what it was after a step of a toy network, which has loaded all libraries and kernels;
and, by torch's profiler, the most that torch had asked the allocator for at a time. The difference
of the two is the allocator's gaps, and what libraries take for themselves.
Writes benchmarks/results/memory.json.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import extra_memory, save
from real_step import expected, step_of
from torch.profiler import ProfilerActivity, profile

PLAIN = ["experiment=none", "objective=dino", "trainer=cpu"]
DEMO = ["experiment=photos", "trainer=cpu"]
FLOAT, LOW = "trainer.precision=32-true", "trainer.precision=bf16-mixed"
TOY = [*DEMO, "model=xcit_micro_4_p8", "batch_size=4"]
ROWS = {
    "nano_12_p16, batch 16": [*PLAIN, "model=xcit_nano_12_p16", "batch_size=16", FLOAT],
    "nano_12_p16, batch 16, bfloat16": [*PLAIN, "model=xcit_nano_12_p16", "batch_size=16", LOW],
    "nano_12_p8, demo's crops, batch 32": [*DEMO, "model=xcit_nano_12_p8", "batch_size=32", FLOAT],
    "nano_12_p8, demo's crops, batch 128, bfloat16": [
        *DEMO, "model=xcit_nano_12_p8", "batch_size=128", LOW,
    ],
    "tiny_12_p16, batch 8": [*PLAIN, "model=xcit_tiny_12_p16", "batch_size=8", FLOAT],
    "tiny_12_p16, batch 16, in 2 parts": [
        *PLAIN, "model=xcit_tiny_12_p16", "batch_size=16", "trainer.accumulate=2", FLOAT,
    ],
    "tiny_12_p16, batch 8, checkpoint_blocks": [
        *PLAIN, "model=xcit_tiny_12_p16", "batch_size=8", "checkpoint_blocks=true", FLOAT,
    ],
    "small_12_p16, batch 4, K 65,536": [
        *PLAIN, "model=xcit_small_12_p16", "batch_size=4", "objective.num_prototypes=65536", FLOAT,
    ],
    "small_12_p16, batch 4, K 65,536, bfloat16": [
        *PLAIN, "model=xcit_small_12_p16", "batch_size=4", "objective.num_prototypes=65536", LOW,
    ],
    "nano_12_p8, batch 4, objective=dinov2": [
        "experiment=none", "objective=dinov2", "trainer=cpu", "model=xcit_nano_12_p8",
        "batch_size=4", FLOAT,
    ],
}  # fmt: skip


def measured(words: list[str]) -> dict[str, int]:
    """Bytes at the peak, of the process and of torch's allocator."""
    step_of([*TOY, next(w for w in words if w.startswith("trainer.precision"))])()

    def steps(count: int) -> None:
        step = step_of(words)
        for _ in range(count):
            step()

    resident = extra_memory(lambda: steps(3))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps(2)
    return {"resident": resident, "allocated": peak_of(profiler)}


def peak_of(profiler: profile) -> int:
    """The most bytes that the allocator had handed out at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    return max(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="parts of their names, joined by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measured(ROWS[args.measure])))
        return
    results = {}
    print("| | computed | asked for by torch | | resident | |\n|---|---:|---:|---:|---:|---:|")
    for title, words in ROWS.items():
        if not any(part in title for part in args.rows.split(",")):
            continue
        total = expected(words).total
        command = [sys.executable, *sys.argv, "--measure", title]
        found = json.loads(subprocess.run(command, stdout=-1, check=True).stdout.splitlines()[-1])
        off = {name: round(total / number - 1, 3) for name, number in found.items()}
        results[title] = {"computed": total, **found, "difference": off}
        cells = [f"{found[k] / 1e9:.2f} GB | {off[k]:+.1%}" for k in ("allocated", "resident")]
        print(f"| {title} | {total / 1e9:.2f} GB | {' | '.join(cells)} |", flush=True)
    save("memory", results)


if __name__ == "__main__":
    main()
