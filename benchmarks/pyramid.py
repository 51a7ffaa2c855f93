"""The pyramid for dense tasks, forward with backward of one image: time and memory against pixels.

    python benchmarks/pyramid.py [--model small_12_p16] [--height 800] [--width 1333] [--threads 2]

Each size runs in a process of its own, whose peak memory the kernel counts; what it takes to have
the network and one small image is in `idle_mb`. Fits time = a * pixels^b, and the same of the
memory above idle, over sizes of one shape. Writes benchmarks/results/pyramid.json.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from measure import save

from ssl_xcit import create_model

SCALES = (0.25, 0.35, 0.5, 0.7, 1.0)  # of both sides


def peak_mb() -> float:
    """Most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_size(height: int, width: int) -> dict[str, Any]:
    """Seconds and memory of one size, in a fresh process."""
    torch.manual_seed(0)
    torch.set_num_threads(ARGS.threads)
    model = create_model(f"xcit_{ARGS.model}", pyramid=True).train()
    model.checkpoint_blocks = ARGS.checkpoint_blocks

    def work(image: torch.Tensor) -> tuple[float, float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        loss = torch.stack([m.square().mean() for m in model.pyramid(image)]).sum()
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle, time.process_time() - cpu

    work(torch.randn(1, 3, 64, 64))  # gradients of the weights are there from now on
    idle = peak_mb()
    image = torch.randn(1, 3, height, width)
    times = [work(image) for _ in range(ARGS.rounds + 1)][1:]
    forward, backward, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "height": height,
        "width": width,
        "forward_s": round(forward, 3),
        "backward_s": round(backward, 3),
        "both_s": round(forward + backward, 3),
        "cpu_s": round(cpu, 3),  # of all threads; other programs on the machine matter less to it
        "peak_mb": round(peak_mb()),
        "idle_mb": round(idle),
    }


def exponent(pixels: list[int], values: list[float]) -> float:
    """b of value = a * pixels^b."""
    return round(float(np.polyfit(np.log(pixels), np.log(values), 1)[0]), 3)


def main() -> None:
    """Measure all sizes, in turns with the largest last."""
    rows = []
    for scale in SCALES:
        height, width = (math.ceil(side * scale) for side in (ARGS.height, ARGS.width))
        child = [sys.executable, __file__, *sys.argv[1:], "--one", f"{height}x{width}"]
        output = subprocess.run(child, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print("{height} x {width}: forward {forward_s} s, backward {backward_s} s, CPU {cpu_s} s, "
              "peak {peak_mb} MB ({idle_mb} MB idle)".format(**rows[-1]), flush=True)  # fmt: skip
    pixels = [row["height"] * row["width"] for row in rows]
    fits = {
        "time": exponent(pixels, [row["both_s"] for row in rows]),
        "cpu_time": exponent(pixels, [row["cpu_s"] for row in rows]),
        "memory": exponent(pixels, [row["peak_mb"] - row["idle_mb"] for row in rows]),
    }
    print(
        f"with pixels grow: time to the power {fits['time']} (of the CPU {fits['cpu_time']}), "
        f"memory {fits['memory']}"
    )
    title = f"{ARGS.model}, {ARGS.height} x {ARGS.width}" + ", recomputed" * ARGS.checkpoint_blocks
    save("pyramid", {title: {"sizes": rows, "exponent": fits, "threads": ARGS.threads}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_12_p16")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint-blocks", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    if ARGS.one:
        print(json.dumps(measure_size(*map(int, ARGS.one.split("x")))))
    else:
        main()
