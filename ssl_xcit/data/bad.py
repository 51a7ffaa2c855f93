"""The record of images that could not be used: one line each in `bad_samples.jsonl`."""

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.errors import RunFailed

log = logging.getLogger(__name__)
FILE = "bad_samples.jsonl"


class BadSamples:
    """Writes each bad image once, whichever rank or part of a run meets it, and stops a run that
    has too many.

    Args:
        path: the file; None: they are only counted.
        num_images: of the source.
        max_fraction: share of these that may be bad.
    """

    def __init__(self, path: Path | None, num_images: int, max_fraction: float):
        self.path = path
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.known = {r.place: r for r in read(path)} if path else {}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, found: Iterable[Replaced]) -> None:
        """Remember and write what is new.

        Raises:
            RunFailed: more than `max_fraction` of all images are bad, those that were listed before
                included: a run that goes on decides as one that was not stopped.
        """
        met = {r.place: r for r in found}
        new = {place: r for place, r in met.items() if place not in self.known}
        if new and not self.known:
            first = next(iter(new.values()))
            log.warning(
                "bad image: %s (%s); its neighbour stands in for it. This and others are listed "
                "in %s", first.name, first.reason, self.path or FILE,
            )  # fmt: skip
        self.known |= new
        if new and self.path is not None:
            self.known |= append(self.path, new.values())
        if met and len(self.known) > self.max_fraction * self.num_images:
            raise RunFailed(self.verdict())

    def verdict(self) -> str:
        """What is wrong with the data, the worst first."""
        share = 100.0 * len(self.known) / self.num_images
        reasons = Counter(kind_of(r.reason) for r in self.known.values())
        folders = Counter(os.path.dirname(r.name) for r in self.known.values())
        worst = ", ".join(f"{count} in {folder}" for folder, count in folders.most_common(3))
        examples = ", ".join(r.name for r in list(self.known.values())[:3])
        kinds = ", ".join(f"{count} {kind}" for kind, count in reasons.most_common(5))
        return (
            f"{len(self.known):,} of {self.num_images:,} images are bad ({share:.1f} %, "
            f"data.max_bad_fraction allows {100.0 * self.max_fraction:g} %): {kinds}; {worst}; such"
            f" as {examples}. All are listed in {self.path or FILE}; ssl-xcit check looks at every "
            "image beforehand"
        )


def kind_of(reason: str) -> str:
    """A reason without its numbers and names, to be counted by."""
    known = {
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
    return next((kind for mark, kind in known.items() if mark in reason.lower()), "corrupt")


def read(path: Path) -> list[Replaced]:
    """What is listed already; a line cut short is passed over."""
    found = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                found.append(Replaced(int(row["place"]), str(row["name"]), str(row["reason"])))
            except (ValueError, KeyError, TypeError):
                continue
    return found


def append(path: Path, rows: Iterable[Replaced]) -> dict[int, Replaced]:
    """Add what is not listed yet, and return what was; ranks take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        listed = {r.place: r for r in read(path)}
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # behind a line that was cut short
        file.writelines(json.dumps(r._asdict()) + "\n" for r in rows if r.place not in listed)
    return listed
