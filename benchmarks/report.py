"""Seconds and bytes of each part of a run's report, and of the whole command with Python's start.

    python benchmarks/report.py RUN [--rounds 3]

The first round finds no features kept, for it has a cache of its own; the others find them. Writes
benchmarks/results/report.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import save


def parts(run: Path) -> list[tuple[str, float, int]]:
    """Name, seconds and bytes of each part."""
    from ssl_xcit.eval.report.report import Report
    from ssl_xcit.eval.report.run_features import ReportOptions
    from ssl_xcit.eval.report.run_reader import read_run
    from ssl_xcit.eval.viz.markup import script_json

    started = time.perf_counter()
    report = Report([read_run(run)], ReportOptions())
    text = report.html()
    total = time.perf_counter() - started
    found = [
        (p.title, p.seconds, len((p.html + p.head + p.script + script_json(p.data)).encode()))
        for p in report.parts
    ]
    rest = total - sum(seconds for _, seconds, _ in found)
    size = len(text.encode())
    found.append(("page, style, plotly", rest, size - sum(b for *_, b in found)))
    return [*found, ("all", total, size)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        command = [str(Path(sys.executable).with_name("ssl-xcit")), "report"]
        command += [f"run={given.run}", f"out={out}"]
        seconds = []
        for _ in range(1 + given.rounds):
            started = time.perf_counter()
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            seconds.append(round(time.perf_counter() - started, 2))
        size = out.stat().st_size
        os.environ["XDG_CACHE_HOME"] = folder
        rows = parts(given.run)
    for name, took, count in rows:
        print(f"{name:28} {took:7.2f} s {count / 1e6:7.2f} MB")
    first, *others = seconds
    later = statistics.median(others)
    print(f"the command: {first:.1f} s at first, {later:.1f} s later; {size / 1e6:.2f} MB")
    row = {
        "seconds_first": first,
        "seconds_later": later,
        "bytes": size,
        "parts": {name: {"seconds": round(s, 3), "bytes": b} for name, s, b in rows},
    }
    save("report", {given.run.name: row})


if __name__ == "__main__":
    main()
