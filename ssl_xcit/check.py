"""The command `check`: every image of a data set looked at, before a run stumbles over it."""

import json
import logging
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from ssl_xcit.data.bad import FILE, kind_of
from ssl_xcit.data.decode import BadImage, Deep, dark_images, open_picture
from ssl_xcit.data.loader import NoWorkers, look_at_all
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source, digest_of
from ssl_xcit.errors import RunFailed
from ssl_xcit.files import writable_folder, write_json
from ssl_xcit.plan import check_numbers
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say, track

log = logging.getLogger(__name__)
CHUNK = 16
NUMBERS = (
    ("num_workers", True, 0),
    ("worker_timeout", False, None),
    ("min_side", True, 1),
    ("data.max_bad_fraction", False, 0),
)


class Look(NamedTuple):
    """What one image is."""

    kind: str  # format and mode
    width: int
    height: int
    digest: bytes  # of the file's content, 16 bytes; empty: it could not be read
    reason: str  # why it is bad; empty: it is not
    deep: Deep | None = None  # of an image of more than 8 bits


def look_at(source: Source, how: Preprocess, index: int) -> Look:
    """Read and decode it."""
    digest = b""
    try:
        stored = source.read(index)
        digest = digest_of(stored)
        picture = open_picture(stored, how)
        picture.pixels()
    except BadImage as error:
        return Look("", 0, 0, digest, str(error))
    return Look(picture.kind, picture.width, picture.height, digest, "", picture.deep)


def look_alone(source: Source, how: Preprocess, index: int) -> Look:
    """In a process of its own, which a crashing decoder may end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(look_at(source, how, index)))
    process.start()
    sender.close()
    process.join(60.0)
    if process.is_alive():
        process.kill()
        return Look("", 0, 0, b"", "decoding it takes more than a minute")
    if process.exitcode:
        code = process.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Look("", 0, 0, b"", f"decoding it ends the process ({name})")
    look: Look = receiver.recv()
    return look


def looks(
    source: Source, how: Preprocess, num_workers: int | None, timeout: float
) -> Iterator[Look]:
    """At every image in order; one that ends its process is found and named."""
    look = partial(look_at, source, how)
    start = 0
    while start * CHUNK < len(source):
        chunks = look_at_all(look, len(source), num_workers, start, timeout, CHUNK)
        try:
            for chunk in chunks:
                yield from chunk
            return
        except NoWorkers:  # no image is to blame
            raise
        except RunFailed:
            first = chunks.done * CHUNK
            for index in range(first, min(first + CHUNK, len(source))):
                yield look_alone(source, how, index)
            start = chunks.done + 1


def main(cfg: DictConfig) -> None:
    """`ssl-xcit check`: prints a summary, writes what is bad and what is there twice.

    Raises:
        RunFailed: more than `data.max_bad_fraction` are bad; everything is written by then.
    """
    check_numbers(cfg, NUMBERS)
    source: Source = instantiate(cfg.data.source)
    how: Preprocess = instantiate(cfg.preprocess)
    out, count, began = Path(str(cfg.out)), len(source), time.perf_counter()
    shown = shown_in_terminal()
    writable_folder(out)
    each = looks(source, how, cfg.num_workers, cfg.worker_timeout)
    kinds: Counter[str] = Counter()
    sizes = np.zeros((count, 2), np.int64)
    digests = np.zeros(count, "S16")
    bad: list[dict[str, Any]] = []
    deep: list[Deep] = []
    for i, look in enumerate(track(each, "looking", count, shown)):
        digests[i] = look.digest
        if look.reason:
            bad.append({"place": i, "name": source.name(i), "reason": look.reason})
        else:
            kinds[look.kind] += 1
            sizes[i] = look.width, look.height
            deep += [look.deep] if look.deep is not None else []

    twice = duplicates(source, digests)
    report = {
        "images": count,
        "good": count - len(bad),
        "bad": len(bad),
        "bad_by_reason": dict(Counter(kind_of(row["reason"]) for row in bad).most_common()),
        "kinds": dict(kinds.most_common()),
        **size_summary(sizes[sizes[:, 0] > 0], cfg.min_side),
        "duplicate_images": sum(len(group) - 1 for group in twice),
        "duplicate_groups": len(twice),
        "dark_images": dark_images(deep, how),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(report, out / "report.json")
    (out / FILE).write_text("".join(json.dumps(row) + "\n" for row in bad))
    (out / "duplicates.jsonl").write_text("".join(json.dumps(group) + "\n" for group in twice))
    show(report, cfg.min_side)
    if report["dark_images"]:
        log.warning("%s", report["dark_images"])
    say(f"written: {out}/report.json, {FILE}, duplicates.jsonl")
    if len(bad) > cfg.data.max_bad_fraction * count:
        raise RunFailed(
            f"{len(bad):,} of {count:,} images are bad, more than data.max_bad_fraction="
            f"{cfg.data.max_bad_fraction:g} allows: mend or remove what {out / FILE} lists"
        )


def duplicates(source: Source, digests: np.ndarray) -> list[list[str]]:
    """Names of the files with the same content, a list each."""
    known = np.flatnonzero(digests != b"")
    _, inverse, counts = np.unique(digests[known], return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for place in np.flatnonzero(counts[inverse] > 1):
        groups.setdefault(int(inverse[place]), []).append(source.name(int(known[place])))
    return list(groups.values())


def size_summary(sizes: np.ndarray, min_side: int) -> dict[str, Any]:
    """Smallest, median and largest (width, height), by area."""
    if not len(sizes):
        return {}
    order = sizes.prod(axis=1).argsort(kind="stable")
    picked = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    return {
        **{f"{name}_size": sizes[i].tolist() for name, i in picked.items()},
        "small_images": int((sizes.min(axis=1) < min_side).sum()),
    }


def show(report: dict[str, Any], min_side: int) -> None:
    """For people."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"

    say(f"{report['images']:,} images in {report['seconds']} s")
    say(f"  good        {report['good']:,}: {listed(report['kinds'])}")
    share = 100.0 * report["bad"] / max(report["images"], 1)
    say(f"  bad         {report['bad']:,} ({share:.2g} %): {listed(report['bad_by_reason'])}")
    if "median_size" in report:
        small, median, large = (
            "{} x {}".format(*report[f"{which}_size"])
            for which in ("smallest", "median", "largest")
        )
        say(f"  sizes       {small} to {large}, median {median}")
        say(f"  small       {report['small_images']:,} have a side under {min_side} pixels")
    say(
        f"  duplicates  {report['duplicate_images']:,} images repeat another "
        f"({report['duplicate_groups']:,} groups)"
    )
