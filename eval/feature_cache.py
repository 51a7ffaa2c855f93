"""Features kept on the disk, a folder for each (weights, images, how they are looked at).

The name of the folder is a hash of all three, so nothing goes stale. Each part is a `.npy` file of
its own, mapped into memory. Extraction writes beside the name and notes how far it has come; one
that was interrupted goes on there, and what is finished is compared with its SHA-256 when it is
opened.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.sources import Files, LabelledPair, Source, Subset, digest_of
from ssl_xcit.errors import UserError
from ssl_xcit.files import default_cache, replacing, sha256_of, write_json
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.terminal import say, track

from .features import (
    FeatureSet,
    Parts,
    Rows,
    as_feature_set,
    batches,
    check_features,
    extract,
    parts_of,
)
from .frozen import Frozen

log = logging.getLogger(__name__)
FORMAT = 1  # of the files, and of what extraction does
BLOCK = 65_536  # rows that are written at once
NOTED = 20.0  # seconds between two notes of how far it has come
SETTLED = 2_000_000_000  # nanoseconds after which a file's time tells of every change
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
    """A hash of the names, sizes and times of change of a source's files; None where that does not
    tell of every change.
    """
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
    """What a source's stored images are, by content.

    Args:
        all: SHA-256 of one image after another.
        each: 16 bytes that tell images apart; empty where one cannot be read.
    """

    all: str
    each: Shaped[np.ndarray, " N"]


def digests_of(source: Source, cache: Path | None, title: str | None = None) -> Digests:
    """Hashes of the stored images. Files whose names, sizes and times are as they were are not read
    again.

    Args:
        source: the images.
        cache: folder where the hashes of files are kept; None: nowhere.
        title: shows a progress bar under this name.
    """
    stamp = stamp_of(source) if cache is not None else None
    memo = cache / "digests" / f"{stamp}.npz" if cache is not None and stamp is not None else None
    if memo is not None and (kept := load_arrays(memo)) and kept.keys() >= {"all", "each"}:
        return Digests(str(kept["all"]), kept["each"])
    digest, each = hashlib.sha256(), np.zeros(len(source), "S16")
    for index in track(range(len(source)), title or "", show=title is not None):
        try:
            stored: Any = source.read(index)
            each[index] = digest_of(stored)
        except BadImage:
            stored = b"bad"
        if isinstance(stored, np.ndarray):
            digest.update(f"{stored.dtype} {stored.shape} ".encode())
            stored = np.ascontiguousarray(stored).tobytes()
        digest.update(len(stored).to_bytes(8, "little"))
        digest.update(stored)
    found = Digests(digest.hexdigest(), each)
    if memo is not None:
        save_arrays(memo, {"all": np.array(found.all), "each": each})
    return found


def data_digest(source: Source, cache: Path | None, title: str | None = None) -> str:
    """SHA-256 of the stored images, one after another; see `digests_of`."""
    return digests_of(source, cache, title).all


class Folder:
    """One set of features on the disk.

    Args:
        path: the folder.
        dtype: of the stored numbers.
    """

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.known: set[str] = set()  # to be sound

    def about(self) -> dict[str, Any]:
        """What is finished: `files` with SHA-256 by name; nothing where nothing is."""
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
            log.warning("%s is damaged; its features are made again", file)
            return False
        self.known.add(name)
        return True

    def missing(self, parts: Sequence[str]) -> list[str]:
        """Those that have to be made: not sound, or of other rows than the rest."""
        lost = [p for p in parts if not (self.is_sound(p) and self.is_sound(f"{p}.rows"))]
        rows = {self.array(f"{p}.rows").tobytes() for p in parts if p not in lost}
        return lost if len(rows) < 2 else list(parts)

    def array(self, name: str) -> np.ndarray:
        """Mapped into memory."""
        return np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def load(self, parts: Sequence[str]) -> tuple[Parts, Rows]:
        """Sound parts."""
        with suppress(OSError):
            os.utime(self.path)  # used now
        arrays = {name: self.array(name) for name in parts}
        return arrays, np.array(self.array(f"{parts[0]}.rows"))

    def fill(
        self,
        frozen: Frozen,
        source: Source,
        resize: int,
        size: int,
        parts: Sequence[str],
        title: str | None,
    ) -> None:
        """Extract the parts, from where an interrupted extraction of them stopped."""
        N, C = len(source), frozen.backbone.embed_dim
        names = {name: self.path / f".{name}.part" for name in parts}
        note = self.path / "progress.json"
        done, good = 0, np.zeros(N, bool)
        whole_size = N * C * self.dtype.itemsize
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(note.read_text())
            packed = np.frombuffer(bytes.fromhex(content["good"]), np.uint8)
            noted = np.unpackbits(packed, count=content["done"]).astype(bool)
            sizes = {file.stat().st_size for file in names.values()}
            if content["parts"] == list(parts) and sizes == {whole_size} and len(noted) <= N:
                done, good[: len(noted)] = len(noted), noted
        if done == 0:
            note.unlink(missing_ok=True)  # first: it would speak of other files
            for file in names.values():
                make_room(file, whole_size)
        arrays = {
            name: np.memmap(file, self.dtype, "r+", shape=(N, C)) for name, file in names.items()
        }
        if done:
            say(f"{title or source.name(0)}: going on from image {done:,} of {N:,}")
        rest = Subset(source, np.arange(done, N)) if done else source
        last_note = time.monotonic()

        def write_note() -> None:
            for array in arrays.values():
                array.flush()
            packed = np.packbits(good[:done]).tobytes().hex()
            write_json({"parts": list(parts), "done": done, "good": packed}, note)

        try:
            for found, readable in batches(frozen, rest, resize, size, parts, title):
                count = len(readable)
                for name, tensor in found.items():
                    arrays[name][done : done + count] = tensor.numpy()
                good[done : done + count] = readable.numpy()
                done += count
                if time.monotonic() - last_note > NOTED:
                    last_note = time.monotonic()
                    write_note()
        except KeyboardInterrupt:
            write_note()
            raise
        rows = np.flatnonzero(good)
        if not len(rows):
            raise UserError(f"none of {N:,} images can be read, such as {source.name(0)}")
        for name in list(arrays):
            whole = arrays.pop(name)
            check_features(whole, np.arange(N), source, good)
            self.keep({name: (whole, rows), f"{name}.rows": (rows, None)})
            del whole
            names.pop(name).unlink()
        note.unlink(missing_ok=True)

    def keep(self, arrays: dict[str, tuple[np.ndarray, Rows | None]]) -> None:
        """Give finished arrays, or some of their rows, their names, then enter them."""
        files = self.about()
        for name, (array, rows) in arrays.items():
            with replacing(self.path / f"{name}.npy") as part:
                with part.open("wb") as file:
                    write_rows(file, array, rows)
                files[name] = sha256_of(part)
            self.known.add(name)
        write_json({"format": FORMAT, "files": files}, self.path / "about.json")


def write_rows(file: IO[bytes], array: np.ndarray, rows: Rows | None = None) -> None:
    """An array, or some rows of it, in NumPy's format, a block at a time: it may be larger than
    memory.
    """
    chosen = np.arange(len(array)) if rows is None else rows
    header = np.lib.format.header_data_from_array_1_0(array[:0])
    header["shape"] = (len(chosen), *array.shape[1:])
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(chosen), BLOCK):
        file.write(np.ascontiguousarray(array[chosen[start : start + BLOCK]]).tobytes())


def cached(
    frozen: Frozen,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
    dtype: str = "float32",
) -> tuple[Parts, Rows]:
    """`extract`, from the disk where it has been done before; raises as it does.

    Without `frozen.cache`, or with several ranks, or when the disk cannot be written or another
    process is at the same features, it is done in memory.
    """
    options = (source, resize, size, parts, title)
    if frozen.cache is None or frozen.ranks:
        return extract(frozen, *options)
    shown = frozen.show and title is not None
    key = {
        "format": FORMAT,
        "weights": weights_digest(frozen.backbone),
        "architecture": frozen.backbone.architecture,
        "how": frozen.how.of_weights() | {"max_pixels": frozen.how.max_pixels},
        "resize": resize,
        "size": size,
        "data": data_digest(source, frozen.cache, f"{title}: reading" if shown else None),
        "dtype": dtype,
        "device": str(torch.device(frozen.device).type),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = Folder(frozen.cache / name, dtype)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with held(folder.path / ".lock") as mine:
            if mine and (missing := folder.missing(parts)):
                folder.fill(frozen, source, resize, size, missing, title)
                missing = folder.missing(parts)
                if missing:  # an image could be read the one time and not the other
                    folder.fill(frozen, source, resize, size, missing, title)
                forget_oldest(frozen.cache)
            found = None if folder.missing(parts) else folder.load(parts)
    except OSError as error:
        log.warning("features are not kept: %s", error)
        found = None
    return extract(frozen, *options) if found is None else found


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Whether no other process has it; ends with the process."""
    with lock.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def make_room(file: Path, size: int) -> None:
    """A file of so many zeros that the disk has set aside: a full one is found out now, and not by
    a signal when the map is written.

    Raises:
        OSError: the disk is full.
    """
    with file.open("wb") as made:
        if size:
            os.posix_fallocate(made.fileno(), 0, size)


def forget_oldest(cache: Path) -> None:
    """Remove the folders not used for longest while all of them are above `LIMIT`."""
    ours = (f for f in cache.iterdir() if re.fullmatch("[0-9a-f]{24}", f.name))
    folders = sorted((f for f in ours if (f / ".lock").exists()), key=used)
    sizes = [sum(file.stat().st_size for file in f.iterdir()) for f in folders]
    for place, folder in enumerate(folders[:-1]):
        if sum(sizes[place:]) <= LIMIT:
            break
        with held(folder / ".lock") as mine:
            if mine:
                shutil.rmtree(folder, ignore_errors=True)


def used(folder: Path) -> float:
    """When it was used last."""
    return folder.stat().st_mtime


def default_features() -> Path:
    """Where features are kept unless a setting says otherwise."""
    return default_cache() / "features"


def extract_pair(
    frozen: Frozen,
    kinds: Sequence[str] = ("cls",),
    title: str | None = None,
    dtype: str = "float32",
) -> FeatureSet:
    """Features of both parts of `frozen.pair`, of one where they are the same."""
    pair = frozen.pair
    assert isinstance(pair, LabelledPair)
    parts = parts_of(kinds)

    def part(source: Source, what: str) -> tuple[Parts, Rows]:
        shown = f"{title}: {what} features" if title else None
        return cached(frozen, source, pair.resize, pair.size, parts, shown, dtype)

    train = part(pair.train, "train")
    test = train if pair.test is pair.train else part(pair.test, "test")
    return as_feature_set(train, test, pair)
