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


def main() -> None:
    from ssl_xcit.eval.report.report import write_report
    from ssl_xcit.eval.report.run_features import ReportOptions
    from ssl_xcit.eval.report.run_reader import read_run

    arguments = argparse.ArgumentParser()
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        os.environ["XDG_CACHE_HOME"] = folder
        command = [str(Path(sys.executable).with_name("ssl-xcit")), "report"]
        command += [f"run={given.run}", f"out={out}"]
        seconds = []
        for _ in range(1 + given.rounds):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(round(time.perf_counter() - started, 2))
        parts = write_report([read_run(given.run)], ReportOptions(), out)
        size = out.stat().st_size
    rows = [(part.title, round(part.seconds, 3), len(part.html.encode())) for part in parts]
    rows.append(("page, style, plotly", 0.0, size - sum(count for *_, count in rows)))
    for name, took, count in rows:
        print(f"{name:28} {took:7.2f} s {count / 1e6:7.2f} MB")
    first, later = seconds[0], statistics.median(seconds[1:])
    print(f"the command: {first:.1f} s at first, {later:.1f} s later; {size / 1e6:.2f} MB")
    row = {
        "seconds_first": first,
        "seconds_later": later,
        "bytes": size,
        "parts": {name: {"seconds": took, "bytes": count} for name, took, count in rows},
    }
    save("report", {given.run.name: row})


if __name__ == "__main__":
    main()
