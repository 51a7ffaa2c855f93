"""A cache of features on the disk: a folder for each (weights, images, preprocessing).

The name of the folder is a hash of all three, so nothing goes stale. Each part is a `.npy` file of
its own, mapped into memory. Extraction notes how many images are done; one that was interrupted
goes on there, and finished files are compared with their SHA-256 when they are opened.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.sources import Files, LabelledPair, Source, Subset, digest_of
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.files import default_cache, replacing, sha256_of, write_json
from ssl_xcit.utils.locks import try_lock
from ssl_xcit.utils.terminal import say, track
from ssl_xcit.utils.validation import Text

from .extract import (
    FeatureSet,
    Parts,
    Rows,
    as_feature_set,
    batches,
    check_features,
    extract,
    parts_of,
)
from .extractor import FeatureExtractor

log = logging.getLogger(__name__)
FORMAT = 1  # of the files, and of what extraction does
BLOCK = 65_536  # rows that are written at once
NOTED = 20.0  # seconds between two notes of how many images are done
SETTLED = 2_000_000_000  # nanoseconds after which a file's time shows every change
LIMIT = 50_000_000_000  # bytes, above which the folders not used for longest go


def weights_digest(backbone: XCiT) -> str:
    """SHA-256 of the backbone's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stamp_of(source: Source) -> str | None:
    """A hash of the names, sizes and times of a source's files; None: these may hide a change."""
    inner = source.source if isinstance(source, Subset) else source
    if not isinstance(inner, Files):
        return None
    digest, newest = hashlib.sha256(), 0
    for index in range(len(source)):
        name = source.name(index)
        try:
            status = os.stat(name)
        except OSError:
            return None
        newest = max(newest, status.st_ctime_ns)  # which, unlike mtime, nobody can set back
        digest.update(os.fsencode(name) + b"\0")
        times = (status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{status.st_size} {status.st_ino} {times} ".encode())
    return digest.hexdigest() if time.time_ns() - newest > SETTLED else None


class Digests(NamedTuple):
    """Hashes of a source's stored images."""

    whole: str  # SHA-256 of one image after another
    images: Shaped[np.ndarray, " N"]  # 16 bytes that tell them apart; empty: one cannot be read


def digests_of(source: Source, cache: Path | None, title: str | None = None) -> Digests:
    """Hashes of the stored images. Files whose names, sizes and times are as they were are not read
    again: their hashes are kept in `cache` (None: nowhere). `title` shows a progress bar.
    """
    stamp = stamp_of(source) if cache is not None else None
    memo = cache / "digests" / f"{stamp}.npz" if cache is not None and stamp is not None else None
    if memo is not None and (kept := load_arrays(memo)) and kept.keys() >= {"all", "each"}:
        return Digests(str(kept["all"]), kept["each"])
    whole, images = hashlib.sha256(), np.zeros(len(source), "S16")
    for index in track(range(len(source)), title or "", show=title is not None):
        try:
            stored: Any = source.read(index)
            images[index] = digest_of(stored)
        except BadImage:
            stored = b"bad"
        if isinstance(stored, np.ndarray):
            whole.update(f"{stored.dtype} {stored.shape} ".encode())
            stored = np.ascontiguousarray(stored).tobytes()
        whole.update(len(stored).to_bytes(8, "little"))
        whole.update(stored)
    if memo is not None:
        save_arrays(memo, {"all": np.array(whole.hexdigest()), "each": images})
    return Digests(whole.hexdigest(), images)


def data_digest(source: Source, cache: Path | None, title: str | None = None) -> str:
    """SHA-256 of the stored images, one after another; see `digests_of`."""
    return digests_of(source, cache, title).whole


class PartialFeatures:
    """Features that are being extracted: a memory map for each part, and a note of how many images
    are done. What an earlier extraction of the same parts has left in `folder` is kept.

    Attributes:
        done: number of images.
        readable: (N,) which of them could be read.
        arrays: (N, C) by part.
    """

    def __init__(self, folder: Path, parts: Sequence[str], shape: tuple[int, int], dtype: np.dtype):
        self.parts = list(parts)
        self.files = {name: folder / f".{name}.part" for name in parts}
        self.note = folder / "progress.json"
        self.readable = np.zeros(shape[0], bool)
        size = shape[0] * shape[1] * dtype.itemsize
        self.done = self.read_note(size)
        if self.done == 0:
            self.note.unlink(missing_ok=True)  # first: it would speak of other files
            for file in self.files.values():
                make_room(file, size)
        self.arrays = {
            name: np.memmap(file, dtype, "r+", shape=shape) for name, file in self.files.items()
        }
        self.noted = time.monotonic()

    def read_note(self, size: int) -> int:
        """Number of images done, where the note is of these files."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.note.read_text())
            packed = np.frombuffer(bytes.fromhex(content["good"]), np.uint8)
            readable = np.unpackbits(packed, count=content["done"]).astype(bool)
            sizes = {file.stat().st_size for file in self.files.values()}
            whole = content["parts"] == self.parts and sizes == {size}
            if whole and len(readable) <= len(self.readable):
                self.readable[: len(readable)] = readable
                return len(readable)
        return 0

    def write_note(self) -> None:
        """Note how many images are done."""
        for array in self.arrays.values():
            array.flush()
        packed = np.packbits(self.readable[: self.done]).tobytes().hex()
        write_json({"parts": self.parts, "done": self.done, "good": packed}, self.note)

    def add(self, features: Mapping[str, Tensor], readable: Tensor) -> None:
        """Append a batch; every so often with a note."""
        rows = slice(self.done, self.done + len(readable))
        for name, tensor in features.items():
            self.arrays[name][rows] = tensor.numpy()
        self.readable[rows] = readable.numpy()
        self.done = rows.stop
        if time.monotonic() - self.noted > NOTED:
            self.noted = time.monotonic()
            self.write_note()


class Folder:
    """One set of features on the disk, its numbers stored as `dtype`."""

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.known: set[str] = set()  # files whose SHA-256 was compared

    def about(self) -> dict[str, Any]:
        """Files that are finished, with SHA-256 by name; empty where none is."""
        try:
            return dict(json.loads((self.path / "about.json").read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def is_sound(self, name: str) -> bool:
        """Whether a file is there as it was written."""
        file, files = self.path / f"{name}.npy", self.about()
        if name in self.known:
            return True
        if name not in files or not file.is_file():
            return False
        if sha256_of(file) != files[name]:
            log.warning("%s is damaged; its features are extracted again", file)
            return False
        self.known.add(name)
        return True

    def missing(self, parts: Sequence[str]) -> list[str]:
        """Parts that have to be extracted: not sound, or of other rows than the rest."""
        lost = [p for p in parts if not (self.is_sound(p) and self.is_sound(f"{p}.rows"))]
        rows = {self.array(f"{p}.rows").tobytes() for p in parts if p not in lost}
        return lost if len(rows) < 2 else list(parts)

    def array(self, name: str) -> np.ndarray:
        """A file, mapped into memory."""
        return np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def load(self, parts: Sequence[str]) -> tuple[Parts, Rows]:
        """Sound parts, and the rows that they are of."""
        with suppress(OSError):
            os.utime(self.path)  # used now
        arrays = {name: self.array(name) for name in parts}
        return arrays, np.array(self.array(f"{parts[0]}.rows"))

    def fill(
        self,
        extractor: FeatureExtractor,
        source: Source,
        resize: int,
        size: int,
        parts: Sequence[str],
        title: str | None,
    ) -> None:
        """Extract the parts, from where an interrupted extraction of them stopped."""
        N = len(source)
        shape = (N, extractor.backbone.embed_dim)
        partial = PartialFeatures(self.path, parts, shape, self.dtype)
        rest = source
        if partial.done:
            say(f"{title or source.name(0)}: going on from image {partial.done:,} of {N:,}")
            rest = Subset(source, np.arange(partial.done, N))
        try:
            for features, readable in batches(extractor, rest, resize, size, parts, title):
                partial.add(features, readable)
        except KeyboardInterrupt:
            partial.write_note()
            raise
        rows = np.flatnonzero(partial.readable)
        if not len(rows):
            raise UserError(f"none of {N:,} images can be read, such as {source.name(0)}")
        for name in parts:
            whole = partial.arrays.pop(name)
            check_features(whole, np.arange(N), source, partial.readable)
            self.keep({name: (whole, rows), f"{name}.rows": (rows, None)})
            del whole
            partial.files[name].unlink()
        partial.note.unlink(missing_ok=True)

    def keep(self, arrays: dict[str, tuple[np.ndarray, Rows | None]]) -> None:
        """Write finished arrays, or some of their rows, then enter them in `about.json`."""
        files = self.about()
        for name, (array, rows) in arrays.items():
            with replacing(self.path / f"{name}.npy") as part:
                with part.open("wb") as file:
                    write_rows(file, array, rows)
                files[name] = sha256_of(part)
            self.known.add(name)
        write_json({"format": FORMAT, "files": files}, self.path / "about.json")


def write_rows(file: IO[bytes], array: np.ndarray, rows: Rows | None = None) -> None:
    """An array, or some rows of it, in NumPy's format, by blocks: it may not fit into memory."""
    chosen = np.arange(len(array)) if rows is None else rows
    header = np.lib.format.header_data_from_array_1_0(array[:0])
    header["shape"] = (len(chosen), *array.shape[1:])
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(chosen), BLOCK):
        file.write(np.ascontiguousarray(array[chosen[start : start + BLOCK]]).tobytes())


def cached(
    extractor: FeatureExtractor,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
    dtype: str = "float32",
) -> tuple[Parts, Rows]:
    """`extract`, from the disk where it has been done before; raises as it does.

    Without `extractor.cache`, or with several ranks, or when the disk cannot be written or another
    process is at the same features, it is done in memory.
    """
    options = (source, resize, size, parts, title)
    if extractor.ranks:
        return extract(extractor, *options)
    made_by = {
        "weights": weights_digest(extractor.backbone),
        "architecture": extractor.backbone.architecture,
        "dtype": dtype,
        "device": str(torch.device(extractor.device).type),
    }

    def fill(folder: Folder, missing: Sequence[str]) -> None:
        folder.fill(extractor, source, resize, size, missing, title)

    found = kept(extractor, source, resize, size, made_by, fill, parts, title, dtype)
    return extract(extractor, *options) if found is None else found


def kept(
    extractor: FeatureExtractor,
    source: Source,
    resize: int,
    size: int,
    made_by: Mapping[str, Any],
    fill: Callable[[Folder, Sequence[str]], None],
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
    dtype: str = "float32",
) -> tuple[Parts, Rows] | None:
    """Features of images from the disk, put there by `fill` if any are missing; None without
    `extractor.cache`, or when the disk cannot be written or another process is at the same ones.

    Args:
        extractor: where they are kept, and how images are read.
        source: the images ...
        resize: ... their shorter side ...
        size: ... and what is cut from their middle.
        made_by: what the features depend on beside the images and how these are read.
        fill: puts the parts that are missing into a folder.
        parts: names of the features.
        title: of the progress bar while images are read; None: no bar.
        dtype: of their numbers.
    """
    if extractor.cache is None:
        return None
    visible, preprocess = extractor.show and title is not None, extractor.preprocess
    key = {
        **made_by,
        "format": FORMAT,
        "how": preprocess.of_weights() | {"max_pixels": preprocess.max_pixels},
        "resize": resize,
        "size": size,
        "data": data_digest(source, extractor.cache, f"{title}: reading" if visible else None),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = Folder(extractor.cache / name, dtype)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with try_lock(folder.path / ".lock") as mine:
            for _ in range(2):  # an image could be read the one time and not the other
                if mine and (missing := folder.missing(parts)):
                    fill(folder, missing)
                    forget_oldest(extractor.cache, folder.path)
            if not folder.missing(parts):
                return folder.load(parts)
    except OSError as error:
        log.warning("features are not kept: %s", error)
    return None


def make_room(file: Path, size: int) -> None:
    """Create a file of so many zeros that the disk has set aside: a full disk is an OSError now,
    not a signal when the map is written.
    """
    with file.open("wb") as made:
        if size:
            os.posix_fallocate(made.fileno(), 0, size)


def forget_oldest(cache: Path, in_use: Path) -> None:
    """Remove the folders not used for longest while all of them together are above `LIMIT`, but for
    the one in use, and those that others keep from us or are changing now.
    """
    total, others = size_of_files(in_use), []
    for folder in cache.iterdir():
        if folder != in_use and re.fullmatch("[0-9a-f]{24}", folder.name):
            with suppress(OSError):
                if (folder / ".lock").exists():
                    others.append((folder.stat().st_mtime, size_of_files(folder), folder))
    total += sum(size for _, size, _ in others)
    for _, size, folder in sorted(others):
        if total <= LIMIT:
            break
        with suppress(OSError), try_lock(folder / ".lock") as mine:
            if mine:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def size_of_files(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def cache_folder(cache: bool | Text | None) -> Path | None:
    """Where a setting says that features are kept; None: nowhere."""
    if cache is True:
        return default_cache() / "features"
    return Path(str(cache)).expanduser() if cache else None


def extract_pair(
    extractor: FeatureExtractor,
    kinds: Sequence[str] = ("cls",),
    title: str | None = None,
    dtype: str = "float32",
) -> FeatureSet:
    """Features of both parts of `extractor.pair`, of one where they are the same."""
    pair = extractor.pair
    assert isinstance(pair, LabelledPair)
    parts = parts_of(kinds)

    def features_of(source: Source, part: str) -> tuple[Parts, Rows]:
        bar = f"{title}: {part} features" if title else None
        return cached(extractor, source, pair.resize, pair.size, parts, bar, dtype)

    train = features_of(pair.train, "train")
    test = train if pair.test is pair.train else features_of(pair.test, "test")
    return as_feature_set(train, test, pair, extractor.ranks)
