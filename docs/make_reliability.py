"""The table of docs/reliability.md, from what `make test-reliability` measured.

make test-reliability && python docs/make_reliability.py
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    1: ("SIGKILL at any step, rerun", "every later record equal to an uninterrupted run"),
    2: ("SIGKILL within a write, another file system", "the newest whole checkpoint loads; 0 of 20 corrupt"),
    3: ("left-over temporary files", "swept at the next start, only this run's; the system's folder stays empty"),
    4: ("SIGTERM", "saved at the step's end, 75"),
    5: ("SIGTERM to one of two ranks, to the other, to both", "both save the same step, 75, under 10 s"),
    6: ("a second SIGTERM while saving", "ignored, 75, checkpoint sound"),
    7: ("SIGUSR1 under SLURM", "saved, then one requeue, 75"),
    8: ("Ctrl-C once, twice", "saved, 130; leaves at once, 130"),
    9: ("newest checkpoint truncated", "named, put aside as .corrupt, the one before is used"),
    10: ("one bit flipped in it", "the same"),
    11: ("all checkpoints bad", "exit 1, never silently from scratch"),
    12: ("disk full while saving", "old ones intact, training goes on; third failure in a row exits 1"),
    13: ("keep the last few and milestones", "exactly those; nothing deleted before the new one is verified"),
    14: ("resumed with another worker count", "bit-identical"),
    15: ("resumed with another world size", "the same images a step; said not to be bit-exact"),
    16: ("resumed with changed settings", "refused with a diff, 2"),
    17: ("resumed around a pass's end and an online evaluation, with accumulation", "bit-identical"),
    18: ("coverage over a crash", "the same multiset of images"),
    19: ("NaN in one rank's images", "left out on all ranks before optimizer, EMA, center; several in a row exit 1"),
    20: ("NaN in a gradient only", "the same"),
    21: ("bad images", "replaced deterministically, counted, listed once; too many exit 1"),
    22: ("image bomb", "refused from its header; under 500 MB"),
    23: ("16-bit, RGBA, palette, GIF, EXIF, CMYK", "golden pixels"),
    24: ("a loader process killed", "named with a hint, made again at the place, bit-identical; three times exit 1"),
    25: ("a loader process hangs", "the same, after worker_timeout"),
    26: ("a rank stopped, or killed", "the other exits 1 within collective_timeout; no process is left"),
    27: ("wandb unreachable", "training unaffected, metrics complete, one warning"),
    28: ("hostile checkpoint, hostile tar", "no code runs, nothing is written outside; 2"),
    29: ("two processes in one run folder", "the second exits 2; a dead one's lock is free"),
    30: ("rerun after completion", "0, nothing rewritten"),
}  # fmt: skip


def main() -> None:
    seconds: dict[int, float] = defaultdict(float)
    tests: dict[int, int] = defaultdict(int)
    cases = ET.parse(ROOT / "benchmarks/results/reliability.xml").getroot().iter("testcase")
    for case in cases:
        name = case.get("name", "")
        if any(child.tag in ("failure", "error", "skipped") for child in case):
            raise SystemExit(f"{name} has not passed: no table")
        numbers = re.search(r"row_((?:\d\d_)+)", name.partition("[")[0] + "_")
        inner = re.search(r"\[row_(\d\d)", name)
        rows = [inner[1]] if inner else numbers[1].rstrip("_").split("_") if numbers else []
        for row in map(int, rows):
            seconds[row] += float(case.get("time", 0))
            tests[row] += 1
    missing = set(ROWS) - set(tests)
    if missing:
        raise SystemExit(f"no test for {sorted(missing)}")
    lines = ["| # | accident | what holds | tests | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {row} | {what} | {holds} | {tests[row]} | {seconds[row]:.0f} |"
        for row, (what, holds) in ROWS.items()
    ]
    page = ROOT / "docs/reliability.md"
    text = page.read_text()
    start, end = "<!-- table -->\n", "<!-- end -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    page.write_text(before + start + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    main()
