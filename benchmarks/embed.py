"""`ssl-xcit embed` of a few and of many images: seconds, and the most memory of its own (pages of
files that are mapped belong to the system, which takes them back).

    python benchmarks/embed.py [--counts 2000 20000]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from measure import status

from ssl_xcit import create_model

SIDE = 16  # pixels: reading and computing play little part


def embedded(folder: Path, count: int, ending: str) -> tuple[float, int]:
    """(seconds, bytes at the peak)."""
    images = np.lib.format.open_memmap(
        folder / f"{count}.npy", "w+", np.uint8, (count, SIDE, SIDE, 3)
    )
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        part = images[start : start + 10_000]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    images.flush()
    command = [
        sys.executable, "-m", "ssl_xcit", "embed", "ckpt=w.pth", "data=arrays",
        f"data.file={count}.npy", f"resize={SIDE}", f"size={SIDE}", "num_workers=0", "device=cpu",
        "batch_size=256", f"out=feats-{count}{ending}",
    ]  # fmt: skip
    started, most = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError, KeyError):  # it has just ended
            most = max(most, status("RssAnon", process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - started, most


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[2_000, 20_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(create_model("xcit_nano_12_p8").state_dict(), folder / "w.pth")
        print("| file | images | seconds | memory, MB |\n|---|---:|---:|---:|")
        for ending in (".parquet", ".npy", ".faiss"):
            for count in arguments.counts:
                seconds, most = embedded(folder, count, ending)
                print(f"| {ending} | {count:,} | {seconds:.1f} | {most / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
