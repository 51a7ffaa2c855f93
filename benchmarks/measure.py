"""What the benchmarks share: two sides in one run, peak memory, one JSON file each."""

import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side, one call of each a round, in turns; the first rounds are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        order = list(sides.items())
        for name, work in reversed(order) if number % 2 else order:
            start = time.perf_counter()
            work()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: Mapping[str, list[float]], ours: str, peer: str) -> dict[str, Any]:
    """Medians, and how many times as fast ours is: median and range over the pairs of one round."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    return {
        "seconds": {name: round(statistics.median(values), 6) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
    }


def line(found: Mapping[str, Any]) -> str:
    """The same in words."""
    times = ", ".join(f"{name} {value:.4g} s" for name, value in found["seconds"].items())
    low, high = found["ratio_range"]
    return f"{times}, ratio {found['ratio']:.2f} ({low:.2f} to {high:.2f}, {found['rounds']} pairs)"


def extra_memory(work: Callable[[], object]) -> int:
    """Bytes at the peak of `work` above what the process held before it; Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    work()
    return max(0, status("VmHWM") - before)


def status(key: str, process: int | str = "self") -> int:
    """Bytes, from what the kernel says of a process."""
    for row in Path(f"/proc/{process}/status").read_text().splitlines():
        if row.startswith(key):
            return int(row.split()[1]) * 1024
    raise KeyError(key)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str, results: Mapping[str, Any]) -> None:
    """Merge into benchmarks/results/NAME.json, so that a part can be measured again by itself."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = {title: {**row, "machine": machine()} for title, row in results.items()}
    path.write_text(json.dumps({**kept, **found}, indent=2) + "\n")
    print(f"written: {path}")
