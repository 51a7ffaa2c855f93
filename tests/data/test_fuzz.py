"""Two thousand damaged files, other ones each time; the seed is printed and can be given."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path


def test_damaged_files_are_bad_images_and_nothing_else():
    seed = os.environ.get("FUZZ_SEED") or str(time.time_ns() % 10**9)
    print(f"FUZZ_SEED={seed}")
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "2000", seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"FUZZ_SEED={seed}: exit {done.returncode}: {done.stderr[-2000:]}"
    count, good, bad = map(
        int, re.search(r"(\d+) files, (\d+) .*, (\d+) bad", done.stdout).groups()
    )
    assert count == good + bad == 2000
    assert bad > 500
    assert good > 100
