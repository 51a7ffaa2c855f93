"""Read and decode every image of a source, and report what is bad, small or a duplicate."""

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ssl_xcit.data.bad_samples import kind_of
from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.loader import TooManyAccidents, one_opencv_thread, parallel_map
from ssl_xcit.data.multicrop import Replaced
from ssl_xcit.data.picture import BadImage, DeepRange, dark_images
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.shards import TarShards
from ssl_xcit.data.sources import Source, digest_of
from ssl_xcit.errors import RunFailed, UserError

CHUNK = 16


class InspectedImage(NamedTuple):
    """Facts about one image."""

    kind: str  # format and mode
    width: int  # in pixels
    height: int  # likewise
    digest: bytes  # 16 bytes of the file's content; empty: it could not be read
    reason: str  # why it is bad; empty: it is good
    deep: DeepRange | None = None  # range of an image of more than 8 bits


class Inspection(NamedTuple):
    """Facts about all images: a report as JSON, the bad ones, and groups of equal files."""

    report: dict[str, Any]
    bad: list[Replaced]
    duplicates: list[list[str]]


def inspect(source: Source, preprocess: Preprocess, index: int) -> InspectedImage:
    """Read and decode an image."""
    digest = b""
    try:
        stored = source.read(index)
        digest = digest_of(stored)
        picture = open_picture(stored, preprocess)
        picture.pixels()
    except BadImage as error:
        return InspectedImage("", 0, 0, digest, str(error))
    return InspectedImage(picture.kind, picture.width, picture.height, digest, "", picture.deep)


def inspect_in_process(source: Source, preprocess: Preprocess, index: int) -> InspectedImage:
    """Read and decode an image in a process of its own, which a crashing decoder may end. Raises
    what is no fault of the image: RunFailed, UserError.
    """

    def work() -> None:
        try:
            sender.send(inspect(source, preprocess, index))
        except (RunFailed, UserError) as error:
            sender.send(error)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work)
    with one_opencv_thread():
        process.start()
    sender.close()
    process.join(60.0)
    if process.is_alive():
        process.kill()
        return InspectedImage("", 0, 0, b"", "decoding it takes more than a minute")
    if process.exitcode:
        code = process.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return InspectedImage("", 0, 0, b"", f"decoding it ends the process ({name})")
    found: InspectedImage | RunFailed | UserError = receiver.recv()
    if isinstance(found, Exception):
        raise found
    return found


def inspect_all(
    source: Source, preprocess: Preprocess, num_workers: int | None, timeout: float
) -> Iterator[InspectedImage]:
    """Yield every image in order; one that ends its process is bad, and named.

    Raises:
        UserError: a server refuses.
        RunFailed: it fails for too long.
    """
    start = 0
    while start * CHUNK < len(source):
        chunks = parallel_map(
            partial(inspect, source, preprocess), len(source), num_workers, start, timeout, CHUNK
        )
        try:
            for chunk in chunks:
                yield from chunk
            return
        except TooManyAccidents:  # other errors are no fault of an image
            first = chunks.done * CHUNK
            for index in range(first, min(first + CHUNK, len(source))):
                if isinstance(source, TarShards):
                    source.fetch(index)  # here: that a server hangs is no fault of the image
                yield inspect_in_process(source, preprocess, index)
            start = chunks.done + 1


def summarize(
    source: Source, images: Iterable[InspectedImage], preprocess: Preprocess, min_side: int
) -> Inspection:
    """Count kinds, sizes, bad images and duplicates; `images` are all of the source, in order."""
    count = len(source)
    kinds: Counter[str] = Counter()
    sizes, digests = np.zeros((count, 2), np.int64), np.zeros(count, "S16")
    bad: list[Replaced] = []
    deep: list[DeepRange] = []
    for i, image in enumerate(images):
        digests[i] = image.digest
        if image.reason:
            bad.append(Replaced(i, source.name(i), image.reason))
        else:
            kinds[image.kind] += 1
            sizes[i] = image.width, image.height
            deep += [image.deep] if image.deep is not None else []
    groups = duplicates(source, digests)
    report = {
        "images": count,
        "good": count - len(bad),
        "bad": len(bad),
        "bad_by_reason": dict(Counter(kind_of(row.reason) for row in bad).most_common()),
        "kinds": dict(kinds.most_common()),
        **size_summary(sizes[sizes[:, 0] > 0], min_side),
        "duplicate_images": sum(len(group) - 1 for group in groups),
        "duplicate_groups": len(groups),
        "dark_images": dark_images(deep, preprocess),
    }
    return Inspection(report, bad, groups)


def duplicates(source: Source, digests: np.ndarray) -> list[list[str]]:
    """Group the names of files with the same content."""
    known = np.flatnonzero(digests != b"")
    _, inverse, counts = np.unique(digests[known], return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for place in np.flatnonzero(counts[inverse] > 1):
        groups.setdefault(int(inverse[place]), []).append(source.name(int(known[place])))
    return list(groups.values())


def size_summary(sizes: np.ndarray, min_side: int) -> dict[str, Any]:
    """Return smallest, median and largest (width, height), by area."""
    if not len(sizes):
        return {}
    order = sizes.prod(axis=1).argsort(kind="stable")
    picked = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    return {
        **{f"{name}_size": sizes[i].tolist() for name, i in picked.items()},
        "small_images": int((sizes.min(axis=1) < min_side).sum()),
    }
