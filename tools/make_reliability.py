"""Write the table of docs/reliability.md from the results of `make test-reliability`.

make test-reliability && python tools/make_reliability.py
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    1: ("SIGKILL at any step, rerun", "every later record equals that of an uninterrupted run"),
    2: ("SIGKILL during a write, other file system", "the newest complete checkpoint loads; 0 of 20 corrupt"),
    3: ("left-over temporary files", "this run's are removed at the next start, nobody else's; the system's temporary folder stays empty"),
    4: ("SIGTERM", "saved at the end of the step, exit 75"),
    5: ("SIGTERM to one of two ranks, to the other, to both", "both save the same step, exit 75, in under 10 s"),
    6: ("a second SIGTERM while saving", "ignored; exit 75, checkpoint sound"),
    7: ("SIGUSR1 under SLURM", "saved, then requeued once, exit 75"),
    8: ("Ctrl-C once, twice", "once: saved, exit 130; twice: leaves immediately, exit 130"),
    9: ("newest checkpoint truncated", "named, renamed to .corrupt, and the previous one is used"),
    10: ("newest checkpoint with one flipped bit", "as row 9"),
    11: ("all checkpoints corrupt", "exit 1; never silently from scratch"),
    12: ("disk full while saving", "old checkpoints intact, training continues; the third failure in a row exits 1"),
    13: ("keep the last few and milestones", "exactly those are kept; nothing is deleted before the new one is verified"),
    14: ("resumed with another number of workers", "bit-identical"),
    15: ("resumed with another world size", "the same images at each step; losses and weights equal within rounding; said not to be bit-exact"),
    16: ("resumed with changed settings", "refused with a list of differences, exit 2"),
    17: ("resumed around an epoch boundary and an online evaluation, with accumulation", "bit-identical"),
    18: ("images used across a crash", "the same multiset of images"),
    19: ("NaN in one rank's images", "skipped on all ranks before optimizer, EMA and center; several in a row exit 1"),
    20: ("NaN in a gradient only", "as row 19"),
    21: ("corrupt images", "replaced deterministically, counted, listed once; too many exit 1"),
    22: ("decompression bomb", "refused from its header, in under 500 MB"),
    23: ("16-bit, RGBA, palette, GIF, EXIF, CMYK", "golden pixels"),
    24: ("a loader process is killed", "reported with a hint and restarted at the same batch, bit-identical; three times exit 1"),
    25: ("a loader process hangs", "as row 24, after worker_timeout"),
    26: ("a rank is stopped or killed", "the other exits 1 within collective_timeout, no process is left; torchrun starts all again, bit-identical"),
    27: ("wandb unreachable", "training unaffected, metrics complete, one warning"),
    28: ("hostile checkpoint, hostile tar", "no code runs, nothing is written outside; exit 2"),
    29: ("two processes in one run folder", "the second exits 2; the lock of a dead process is free"),
    30: ("rerun after completion", "exit 0, nothing rewritten"),
    31: ("five SIGKILLs at random moments of fine-tuning, for each task", "weights, moments and average bit-identical, and every later record"),
    32: ("SIGKILLs, two ranks and collapse, for each objective", "weights, moments and state bit-identical; ranks hold the same; collapse named within 200 steps"),
}  # fmt: skip


def main() -> None:
    seconds: dict[int, float] = defaultdict(float)
    tests: dict[int, int] = defaultdict(int)
    cases = ET.parse(ROOT / "benchmarks/results/reliability.xml").getroot().iter("testcase")
    for case in cases:
        name = case.get("name", "")
        if any(child.tag in ("failure", "error", "skipped") for child in case):
            raise SystemExit(f"{name} did not pass, so no table was written")
        numbers = re.search(r"row_((?:\d\d_)+)", name.partition("[")[0] + "_")
        inner = re.search(r"\[row_(\d\d)", name)
        rows = [inner[1]] if inner else numbers[1].rstrip("_").split("_") if numbers else []
        for row in map(int, rows):
            seconds[row] += float(case.get("time", 0))
            tests[row] += 1
    missing = set(ROWS) - set(tests)
    if missing:
        raise SystemExit(f"no tests for rows {sorted(missing)}, so no table was written")
    lines = ["| # | accident | result | tests | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {row} | {accident} | {result} | {tests[row]} | {seconds[row]:.0f} |"
        for row, (accident, result) in ROWS.items()
    ]
    page = ROOT / "docs/reliability.md"
    text = page.read_text()
    start, end = "<!-- table -->\n", "<!-- end -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    page.write_text(before + start + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    main()
