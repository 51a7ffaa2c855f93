"""Tar shards in the WebDataset layout: `KEY.jpg`, perhaps `KEY.cls`, one after the other.

The tars are listed once, then images are read in place, any of them at any time. Nothing is ever
extracted: only regular files are looked at, of a limited size, and no pickles. A listing is kept in
the cache folder for as long as the tars' sizes and times stay the same.
"""

import glob
import hashlib
import logging
import os
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.progress import track

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.decode import MAX_BYTES, BadImage
from ssl_xcit.data.folders import EXTENSIONS
from ssl_xcit.data.names import Names
from ssl_xcit.data.order import Shards
from ssl_xcit.data.sources import LabelledPair, Labels, held_out
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import default_cache

log = logging.getLogger(__name__)
MAX_HEADER = 2**20  # bytes of one tar header with its extensions
MAX_OPEN = 64  # tars open at once in a process
NO_LABEL = -1
LISTED = {
    "keys", "key_ends", "offsets", "lengths", "labels", "counts", "trouble", "trouble_ends",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Listing(NamedTuple):
    """Where the images of one tar lie."""

    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]  # NO_LABEL where there is none
    trouble: list[str]  # what is wrong with it, for the log


class TarShards:
    """Images in tars, in the order of the tars.

    Args:
        files: the tars.
        sizes: images of each.
        keys: of all images.
        offsets: in bytes, where each begins in its tar.
        lengths: of each in bytes.
        window: images that are mixed with each other in a pass.
        labels: class ids, or None.
        class_names: by class id.
    """

    def __init__(
        self,
        files: Sequence[str],
        sizes: np.ndarray,
        keys: Names,
        offsets: np.ndarray,
        lengths: np.ndarray,
        window: int,
        labels: Labels | None,
        class_names: Sequence[str],
    ):
        self.files = list(files)
        self.ends = sizes.cumsum()
        self.keys = keys
        self.offsets = offsets
        self.lengths = lengths
        self.shards: Shards | None = Shards(sizes, window)
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)
        self.open_files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open_files": OrderedDict()}  # another process opens its own

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, index: int) -> int:
        """Which tar an image lies in."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def read(self, index: int) -> bytes:
        """The encoded image; raises BadImage."""
        length, offset = int(self.lengths[index]), int(self.offsets[index])
        try:
            content = os.pread(self.descriptor(self.shard_of(index)), length, offset)
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error.strerror}") from error
        if len(content) < length:
            raise BadImage(f"the tar ends within it: {len(content):,} of {length:,} bytes")
        return content

    def descriptor(self, shard: int) -> int:
        """Of an open tar; the one that was not used for longest is closed when there are many."""
        if shard not in self.open_files:
            if len(self.open_files) >= MAX_OPEN:
                os.close(self.open_files.popitem(last=False)[1])
            self.open_files[shard] = os.open(self.files[shard], os.O_RDONLY)
        self.open_files.move_to_end(shard)
        return self.open_files[shard]

    def name(self, index: int) -> str:
        """`shard-000001.tar/KEY`."""
        return f"{self.files[self.shard_of(index)]}/{self.keys[index]}"


class Capped:
    """A file that refuses to read much at once: headers of a hostile tar claim any size."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, size: int) -> bytes:
        """At most MAX_HEADER bytes."""
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        """As the file does."""
        return self.file.seek(position)

    def tell(self) -> int:
        """As the file does."""
        return self.file.tell()


def list_tar(path: str) -> Listing:
    """Its images: regular members that end as images do and lie wholly inside. One image a key.

    What follows a damaged header is left out, and is in the listing's `trouble`.

    Raises:
        UserError: compressed, or no tar.
    """
    found = Listing([], [], [], [], [])
    labels: dict[str, int] = {}
    odd = 0
    with open(path, "rb") as file:
        kind = COMPRESSED.get(file.read(2))
        if kind is not None:
            raise UserError(
                f"{path}: compressed ({kind}); images are compressed already, and reading in place "
                "needs a plain tar: unpack it once"
            )
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        last, field = -1, ""
        try:
            with tarfile.open(fileobj=Capped(file), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    tar.members = []  # else it keeps them all
                    if member.size < 0 or member.offset <= last:
                        raise tarfile.ReadError("a member that ends before it begins")
                    last = member.offset
                    folder, _, name = member.name.rpartition("/")
                    base, _, extension = name.partition(".")
                    key = f"{folder}/{base}".lstrip("/")
                    if not member.isreg() or member.issparse() or member.size > MAX_BYTES:
                        odd += not member.isdir()
                        continue
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    place = (member.offset_data, member.size)
                    if extension == "cls" and member.size < 20:
                        labels[key] = class_id(os.pread(file.fileno(), *place[::-1]))
                    elif f".{extension.lower()}".encode().endswith(EXTENSIONS):
                        again = bool(found.keys) and found.keys[-1] == key
                        if again and ("." in extension or "." not in field):
                            continue  # one image a key: KEY.jpg rather than KEY.depth.jpg
                        if again:
                            del found.keys[-1], found.offsets[-1], found.sizes[-1]
                        found.keys.append(key)
                        found.offsets.append(place[0])
                        found.sizes.append(place[1])
                        field = extension
                unread = after_the_end(file, tar.offset)
                if unread:
                    raise tarfile.ReadError(unread)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if not found.keys and end:
                raise UserError(f"{path}: not a tar ({error})") from error
            found.trouble.append(
                f"{path}: damaged after {len(found.keys)} images, which are kept ({error})"
            )
    if odd:
        found.trouble.append(f"{path}: {odd} members are links, devices or too large; left out")
    found.labels.extend(labels.get(key, NO_LABEL) for key in found.keys)
    return found


def after_the_end(file: BinaryIO, offset: int) -> str:
    """What is wrong where tarfile stopped, which it does at a damaged header as at the end."""
    file.seek(offset)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE:
        return "it has no end"
    return "a damaged header" if rest.strip(b"\0") else ""


def class_id(text: bytes) -> int:
    """What a `.cls` member says."""
    return int(text) if text.strip().isdigit() and len(text.strip()) < 10 else NO_LABEL


def tar_files(root: str | Sequence[str]) -> list[str]:
    """The tars that are meant: a folder's, a pattern's (`DIR/train-*.tar`), or those named.

    Raises:
        MissingPath: there are none.
    """
    roots = [root] if isinstance(root, str | Path | int) else list(root)
    files: list[str] = []
    for each in map(str, roots):
        path = str(Path(each).expanduser())
        inside = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
        named = [path] if os.path.isfile(path) else glob.glob(inside)
        found = sorted(f for f in named if os.path.isfile(f))
        if not found:
            raise MissingPath(f"data.root={each}: no tar shards (*.tar) there")
        files += found
    return files


def tar_shards(root: str | Sequence[str] | None, window: int = 10_000) -> TarShards | None:
    """Images in tar shards; with labels if every image has a `.cls`.

    Args:
        root: a folder of tars, a pattern, or several of these; None: no images.
        window: images that are mixed with each other in a pass; larger mixes better, smaller reads
            from fewer tars at a time.

    Raises:
        MissingPath: no tars, or no images in them.
        UserError: not tars, or compressed ones.
    """
    if root is None:
        return None
    if type(window) is not int or window < 1:
        raise UserError(f"data.window={window}: a whole number of images from 1")
    files = tar_files(root)
    listed = listing_of(files)
    count = len(listed["offsets"])
    if not count:
        raise MissingPath(f"data.root={root}: no images in {len(files)} tars")
    known = listed["labels"] if (listed["labels"] != NO_LABEL).all() else None
    names = [] if known is None else [str(i) for i in range(int(known.max()) + 1)]
    return TarShards(
        files,
        listed["counts"],
        Names(listed["keys"], listed["key_ends"]),
        listed["offsets"],
        listed["lengths"],
        window,
        known,
        names,
    )


def listing_of(files: Sequence[str]) -> dict[str, np.ndarray]:
    """Of all tars, from the cache folder when none has changed."""
    stats = [(os.path.realpath(f), os.stat(f)) for f in files]
    state = repr([(path, s.st_size, s.st_mtime_ns) for path, s in stats])
    key = hashlib.sha256(os.fsencode(state)).hexdigest()[:16]
    file = default_cache() / "shards" / f"{key}.npz"
    kept = load_arrays(file)
    if kept is None or not set(kept) >= LISTED:
        kept = list_all(files)
        save_arrays(file, kept)
    for trouble in Names(kept["trouble"], kept["trouble_ends"]):
        log.warning("%s", trouble)
    return kept


def list_all(files: Sequence[str]) -> dict[str, np.ndarray]:
    """Every tar listed, as arrays."""
    shown = sys.stdout.isatty() and len(files) > 1
    each = [list_tar(f) for f in track(files, "listing shards", transient=True, disable=not shown)]
    keys = Names.of(key for listing in each for key in listing.keys)
    trouble = Names.of(text for listing in each for text in listing.trouble)
    return {
        "trouble": trouble.content,
        "trouble_ends": trouble.ends,
        "keys": keys.content,
        "key_ends": keys.ends,
        "offsets": joined(each, "offsets"),
        "lengths": joined(each, "sizes"),
        "labels": joined(each, "labels"),
        "counts": np.array([len(listing.keys) for listing in each], np.int64),
    }


def joined(each: Sequence[Listing], field: str) -> np.ndarray:
    """One field of all listings."""
    return np.concatenate([np.array(getattr(one, field), np.int64) for one in each])


def labelled_shards(
    root: str | Sequence[str] | None,
    test_root: str | Sequence[str] | None = None,
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """`tar_shards` with labels, and others to be tested on (None: a share is held out)."""
    train, test = tar_shards(root), tar_shards(test_root)
    return held_out(train, test, str(root), test_fraction, resize, size, seed)
