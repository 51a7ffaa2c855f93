"""Identify the images of a data set, wherever it lies: by names relative to its folder and sizes,
and of one large file by its content. With the seed they decide the order of a run, which records
and compares them at every start.
"""

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ssl_xcit.data.cache import load_arrays
from ssl_xcit.data.sets import Arrays, HuggingFace
from ssl_xcit.data.shards import TarShards
from ssl_xcit.data.sources import Files, LabelledPair, Source, Subset
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.utils.files import default_cache, replacing
from ssl_xcit.utils.terminal import track

BLOCK = 65_536  # bytes that are read of a file
SAMPLED = 64  # files of which the beginning counts
UNKNOWN = -1  # size of a file that is not there
THREADS = 32  # for a remote file system, whose
PROBED, SLOW = 1000, 2e-4  # first so many files take longer than so many seconds each
EXAMPLES = 3  # in a sentence


class DataIndex(NamedTuple):
    """The images of a data set."""

    names: StringArray  # relative to its folder; of arrays none
    sizes: Int64[np.ndarray, " N"]  # in bytes
    content: str  # a hash of pixels of an array, of samples of tars, of labels
    num_images: int

    def digest(self) -> str:
        """Return a SHA-256, the same for the same images."""
        digest = hashlib.sha256(f"{self.num_images} {self.content}\0".encode())
        for array in (self.names.content, self.names.ends, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def index_of(source: Source, labelled: bool = False) -> DataIndex:
    """Identify the images of a source (of a subset: of all its source), labels if `labelled`."""
    while isinstance(source, Subset):
        source = source.source
    nothing = np.zeros(0, np.int64)
    if isinstance(source, Files):
        paths = [source.name(i) for i in range(len(source))]
        whole = not source.root or os.path.isabs(source.paths[0])
        names = StringArray.of(relative(source, paths)) if whole else source.paths
        sizes, content = sizes_of(paths), some_content(source)
    elif isinstance(source, TarShards):
        keys = [source.name(i) for i in range(len(source))]
        home = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in source.files])
        names = StringArray.of(os.path.relpath(key, home) for key in keys)
        sizes = source.lengths
        content = hashlib.sha256("".join(source.samples()).encode()).hexdigest()
    elif isinstance(source, Arrays):
        names, sizes, content = StringArray.of([]), nothing, pixels_digest(source.images)
    elif isinstance(source, HuggingFace):
        names, sizes, content = StringArray.of([]), nothing, source.fingerprint
    else:  # of another package
        names = StringArray.of(source.name(i) for i in range(len(source)))
        sizes, content = nothing, ""
    if labelled and source.labels is not None:
        labels = np.ascontiguousarray(source.labels)
        classes = "\0".join(source.class_names).encode("utf-8", "surrogateescape")
        content += hashlib.sha256(labels.tobytes() + classes).hexdigest()
    return DataIndex(names, sizes, content, len(source))


def relative(source: Files, paths: Sequence[str]) -> list[str]:
    """Return absolute paths relative to the folders that the source was made from."""
    if source.homes:
        inside = []
        for path in paths:
            place, home = next(
                (n, h) for n, h in enumerate(source.homes) if path.startswith(os.path.join(h, ""))
            )
            inside.append(f"{place}/{os.path.relpath(path, home)}")
        return inside
    home = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, home) if home else path for path in paths]


def some_content(source: Files) -> str:
    """Hash the starts of a few files: those of two cameras may have the same names and sizes."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)).tolist():
        try:
            with open(source.name(index), "rb", opener=without_waiting) as file:
                digest.update(hashlib.sha256(file.read(BLOCK)).digest())
        except (OSError, ValueError):
            digest.update(b"unreadable")
    return digest.hexdigest()


def without_waiting(path: str, flags: int) -> int:
    """Open a file, or a pipe without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def sizes_of(paths: Sequence[str]) -> Int64[np.ndarray, " N"]:
    """Return sizes in bytes; `UNKNOWN` of files that are not there."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):
            return UNKNOWN

    began = time.perf_counter()
    first = [size(path) for path in paths[:PROBED]]
    rest = paths[PROBED:]
    if time.perf_counter() - began < SLOW * len(first):  # on a local disk threads do not help
        return np.array([*first, *map(size, rest)], np.int64)
    with ThreadPoolExecutor(THREADS) as pool:
        return np.array([*first, *pool.map(size, rest)], np.int64)


def pixels_digest(images: np.ndarray) -> str:
    """Return the SHA-256 of an array; of a file it is cached while its times stay the same."""
    memo = None
    if isinstance(images, np.memmap):
        status = os.stat(str(images.filename))
        stamp = f"{os.path.realpath(str(images.filename))} {status.st_size} {status.st_ino} "
        stamp += f"{status.st_mtime_ns} {status.st_ctime_ns}"
        memo = default_cache() / "arrays" / hashlib.sha256(os.fsencode(stamp)).hexdigest()[:24]
        if memo.is_file() and len(known := memo.read_text()) == 64:
            return known
    digest = hashlib.sha256(f"{images.dtype} {images.shape}\0".encode())
    step = max(1, 2**24 // max(1, images[:1].nbytes))
    large = images.nbytes > 2**30 and sys.stdout.isatty()
    for start in track(range(0, len(images), step), "hashing the array", show=large):
        digest.update(np.ascontiguousarray(images[start : start + step]).tobytes())
    if memo is not None:
        try:
            with replacing(memo) as part:
                part.write_text(digest.hexdigest())
        except OSError:  # it is read again then
            pass
    return digest.hexdigest()


def indices_of(source: Source, pair: LabelledPair | None) -> dict[str, DataIndex]:
    """Identify all images of a run, by the setting that names them."""
    indices = {"data": index_of(source)}
    if pair is not None:
        indices["eval_data"] = index_of(pair.train, labelled=True)
        if not (isinstance(pair.test, Subset) or pair.test is pair.train):
            indices["eval_data.test"] = index_of(pair.test, labelled=True)
    return indices


def save_indices(indices: Mapping[str, DataIndex], file: Path) -> None:
    """Write all indices to one file."""
    arrays: dict[str, np.ndarray] = {}
    for key, index in indices.items():
        arrays |= {
            f"{key}:names": index.names.content,
            f"{key}:ends": index.names.ends,
            f"{key}:sizes": index.sizes,
            f"{key}:content": np.array(index.content),
            f"{key}:count": np.array(index.num_images),
        }
    with replacing(file) as part, part.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def load_indices(file: Path) -> dict[str, DataIndex]:
    """Load what `save_indices` wrote; empty if it cannot be read."""
    arrays = load_arrays(file) or {}
    try:
        return {
            key: DataIndex(
                StringArray(arrays[f"{key}:names"], arrays[f"{key}:ends"]),
                arrays[f"{key}:sizes"],
                str(arrays[f"{key}:content"]),
                int(arrays[f"{key}:count"]),
            )
            for key in (name.removesuffix(":count") for name in arrays if name.endswith(":count"))
        }
    except (KeyError, ValueError, TypeError):
        return {}


def difference(before: DataIndex, now: DataIndex) -> str:
    """Say what has changed, with examples; empty if nothing has."""
    if before.digest() == now.digest():
        return ""
    old = dict(zip(before.names, before.sizes.tolist(), strict=False))
    new = dict(zip(now.names, now.sizes.tolist(), strict=False))
    kinds = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "of another size": [name for name in new if name in old and new[name] != old[name]],
    }
    parts = [
        f"{len(names):,} {kind} (such as {', '.join(names[:EXAMPLES])})"
        for kind, names in kinds.items()
        if names
    ]
    counts = f"{before.num_images:,} images then, {now.num_images:,} now"
    if not parts and before.num_images == now.num_images:
        parts = ["the same names and sizes, but another order, content or labels"]
    return f"{counts}: {', '.join(parts)}" if parts else counts
