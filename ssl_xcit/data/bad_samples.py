"""Log images that `decode.py` found bad: one line each in `bad_samples.jsonl`."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.errors import RunFailed
from ssl_xcit.utils.locks import exclusive

log = logging.getLogger(__name__)
FILE = "bad_samples.jsonl"


class BadSamples:
    """Logs each bad image once, whichever rank or part of a run meets it (without `path` it counts
    them), and stops a run where they are more than `max_fraction` of all images.
    """

    def __init__(self, path: Path | None, num_images: int, max_fraction: float):
        self.path = path
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.known = {r.place: r for r in read(path)} if path else {}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, images: Iterable[Replaced]) -> None:
        """Remember and write those that are new.

        Raises:
            RunFailed: more than `max_fraction` of all images are bad, those that were listed before
                included: a run that goes on decides as one that was not stopped.
        """
        met = {r.place: r for r in images}
        new = {place: r for place, r in met.items() if place not in self.known}
        if new and not self.known:
            first = next(iter(new.values()))
            log.warning(
                "bad image: %s (%s); it is skipped, and a neighbour takes its place. This and "
                "others are listed in %s", first.name, first.reason, self.path or FILE,
            )  # fmt: skip
        self.known |= new
        if new and self.path is not None:
            self.known |= append(self.path, new.values())
        if met and len(self.known) > self.max_fraction * self.num_images:
            raise RunFailed(self.verdict())

    def verdict(self) -> str:
        """Say what is wrong with the data, the most frequent first."""
        share = 100.0 * len(self.known) / self.num_images
        reasons = Counter(kind_of(r.reason) for r in self.known.values())
        folders = Counter(os.path.dirname(r.name) for r in self.known.values())
        worst = ", ".join(f"{count} in {folder}" for folder, count in folders.most_common(3))
        examples = ", ".join(r.name for r in list(self.known.values())[:3])
        kinds = ", ".join(f"{count} {kind}" for kind, count in reasons.most_common(5))
        return (
            f"{len(self.known):,} of {self.num_images:,} images are bad ({share:.1f} %, "
            f"data.max_bad_fraction allows {100.0 * self.max_fraction:g} %): {kinds}; {worst}; such"
            f" as {examples}. All are listed in {self.path or FILE}; ssl-xcit check finds all "
            "bad images beforehand"
        )


def kind_of(reason: str) -> str:
    """Return a reason without its numbers and names, to count by."""
    kinds = {
        "empty": "empty files",
        "truncated": "truncated",
        "end of": "truncated",
        "ends within": "truncated",
        "pixels": "too many pixels",
        "cannot identify": "not images",
        "no such file": "missing files",
        "permission": "unreadable files",
        "channels": "other channels",
    }
    return next((kind for mark, kind in kinds.items() if mark in reason.lower()), "corrupt")


def read(path: Path) -> list[Replaced]:
    """Read what is listed already; a line cut short is skipped."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                rows.append(Replaced(int(row["place"]), str(row["name"]), str(row["reason"])))
            except (ValueError, KeyError, TypeError):
                continue
    return rows


def append(path: Path, rows: Iterable[Replaced]) -> dict[int, Replaced]:
    """Add rows that are not listed yet, and return those that were; ranks take turns."""
    lock = exclusive(path.with_name(f".{path.name}.lock"), str(path), wait=True)
    with lock, path.open("a+") as file:
        listed = {r.place: r for r in read(path)}
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # behind a line that was cut short
        file.writelines(json.dumps(r._asdict()) + "\n" for r in rows if r.place not in listed)
    return listed
