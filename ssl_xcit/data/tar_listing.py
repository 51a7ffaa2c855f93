"""What is in tar shards: images and labels by their places, listed once.

A listing stays in the cache folder for as long as the tars' sizes and times stay the same. Where
`ssl-xcit shard` has written tars behind URLs, their listing lies beside them.
"""

import gzip
import hashlib
import json
import logging
import os
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.decode import MAX_BYTES
from ssl_xcit.data.formats import (
    EXTENSIONS,
    HEAD,
    SkippedFiles,
    readable_by_head,
    readable_formats,
    remedy_by_ending,
)
from ssl_xcit.data.remote import INDEX, RemoteFile, ShardFetcher, shown
from ssl_xcit.data.shard_labels import MAX_LABEL
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import default_cache, replacing
from ssl_xcit.utils.terminal import say, track

log = logging.getLogger(__name__)
MAX_HEADER = 2**20  # bytes of one tar header with its extensions
FORMAT = 4  # of a cached listing
MAX_PROBLEMS = 5  # lines that are logged about tars
NO_LISTING = (ValueError, KeyError, TypeError, EOFError, OverflowError)
MAX_LINE = 2**28  # bytes of a listing of one tar
BLOCK, BLOCKS = 65_536, 8  # bytes read at each of so many places of a tar, to tell it from others
LISTED = {
    "keys", "key_ends", "offsets", "lengths", "labels", "label_ends", "counts", "problems",
    "problem_ends", "left_out", "samples", "sample_ends",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Listing(NamedTuple):
    """The places of the images in one tar."""

    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str]  # empty where there is none
    problems: list[str]  # for the log
    skipped: SkippedFiles  # members that are neither images nor labels
    sample: str = ""  # see `sample_of`; empty where it is not needed


class Member(NamedTuple):
    """An image in a tar."""

    name: str
    offset: int
    size: int

    @property
    def first(self) -> str:
        """Return the name up to the first dot behind its folder."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def last(self) -> str:
        """Return the name up to its last dot."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + (file.rpartition(".")[0] or file)


class Capped:
    """A file that refuses to read much at once: headers of a hostile tar claim any size."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, size: int) -> bytes:
        """Read at most MAX_HEADER bytes."""
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        """Move to a position."""
        return self.file.seek(position)

    def tell(self) -> int:
        """Return the position."""
        return self.file.tell()


def list_tar(path: str, name: str = "") -> Listing:
    """List the regular members of a tar that are images by ending or first bytes and lie wholly
    inside. What follows a damaged header is left out, as the listing's `problems` say, which call
    the tar `name`, or else by its path.

    Raises:
        UserError: compressed, or no tar.
    """
    name = name or path
    images: dict[str, Member] = {}  # the last of one name, as when a tar is unpacked
    labels: dict[str, str] = {}
    problems: list[str] = []
    skipped = SkippedFiles()
    odd = repeated = 0
    with open(path, "rb") as file:
        kind = COMPRESSED.get(file.read(2))
        if kind is not None:
            raise UserError(
                f"{name}: compressed ({kind}); images are compressed already, and reading in place "
                "needs a plain tar: unpack it once"
            )
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        last = -1
        try:
            with tarfile.open(fileobj=Capped(file), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    tar.members = []  # else it keeps them all
                    if member.size < 0 or member.offset <= last:
                        raise tarfile.ReadError("a member that ends before it begins")
                    last = member.offset
                    if not member.isreg() or member.issparse() or member.size > MAX_BYTES:
                        odd += not member.isdir()
                        continue
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    file_name = os.path.normpath(member.name).lstrip("/")
                    file_member = Member(file_name, member.offset_data, member.size)
                    encoded = os.fsencode(os.path.basename(file_name))
                    if encoded.startswith(b"."):  # as macOS puts beside every file
                        skipped.add(encoded, "hidden")
                    elif encoded.lower().endswith(b".cls") and member.size < MAX_LABEL:
                        content = os.pread(file.fileno(), member.size, member.offset_data)
                        labels[file_member.last] = content.decode("utf-8", "replace")
                    elif is_image(file.fileno(), file_member, encoded, skipped):
                        repeated += file_name in images
                        images.pop(file_name, None)
                        images[file_name] = file_member
                if problem := problem_at_end(file, tar.offset):
                    raise tarfile.ReadError(problem)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if not images and end:
                raise UserError(f"{name}: not a tar ({error})") from error
            problems.append(f"{name}: damaged after {len(images)} images, which are kept ({error})")
    if odd:
        problems.append(f"{name}: {odd} members are links, devices or too large; left out")
    if repeated:
        problems.append(
            f"{name}: {repeated} images are there twice under one name; the last is used"
        )
    keyed = by_key(name, list(images.values()), problems)
    return Listing(
        list(keyed),
        [member.offset for member in keyed.values()],
        [member.size for member in keyed.values()],
        [labels.get(m.last, labels.get(m.first, "")).strip() for m in keyed.values()],
        problems,
        skipped,
    )


def is_image(descriptor: int, member: Member, name: bytes, skipped: SkippedFiles) -> bool:
    """Whether a member is an image by its ending, or else its first bytes; others are counted."""
    if name.lower().endswith(EXTENSIONS):
        return True
    remedy = remedy_by_ending(name)
    if remedy is None:
        head = os.pread(descriptor, min(HEAD, member.size), member.offset)
        readable, remedy = readable_by_head(head)
        if readable:
            return True
    skipped.add(name, remedy)
    return False


def by_key(path: str, images: Sequence[Member], problems: list[str]) -> dict[str, Member]:
    """Return images by key. Beside `KEY.jpg`, images such as `KEY.depth.png` belong to the same
    sample and are left out, which is added to `problems`.
    """
    groups: dict[str, list[Member]] = {}
    for member in images:
        groups.setdefault(member.first, []).append(member)
    several = [g for g in groups.values() if len(g) > 1]
    if several and not any(m.first == m.last for g in groups.values() for m in g):
        example = several[0][0]  # dots are parts of the names
        problems.append(
            f"{path}: keys end at the last dot, such as {example.last} ({example.name})"
        )
        groups = {}
        for member in images:
            groups.setdefault(member.last, []).append(member)
    chosen = {key: next((m for m in g if m.last == key), g[0]) for key, g in groups.items()}
    beside = [(m, chosen[key]) for key, g in groups.items() for m in g if m is not chosen[key]]
    if beside:
        other, kept = beside[0]
        problems.append(
            f"{path}: {len(beside)} images lie beside another of the same key and are left out, "
            f"such as {other.name} beside {kept.name}"
        )
    return chosen


def problem_at_end(file: BinaryIO, offset: int) -> str:
    """Say what is wrong where tarfile stopped, which it does at a damaged header as at the end."""
    file.seek(offset)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE:
        return "it has no end"
    return "a damaged header" if rest.strip(b"\0") else ""


def local_listing(files: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the listing of tars on this machine, from the cache folder if none has changed."""
    stats = [(os.path.realpath(f), os.stat(f)) for f in files]
    state = [(path, s.st_size, s.st_mtime_ns) for path, s in stats]
    progress = sys.stdout.isatty() and len(files) > 1
    return cached_listing(
        state, lambda: [list_tar(f) for f in track(files, "listing shards", show=progress)]
    )


def remote_listing(
    fetcher: ShardFetcher, listings: Sequence[RemoteFile], words: str
) -> dict[str, np.ndarray]:
    """Return the listing of tars behind URLs by the files that list them; tars that none lists are
    fetched once.
    """
    files = fetcher.files
    sizes = {file.name: file.size for file in files}
    cached = sum(fetcher.cache.path(file).exists() for file in files)
    say(
        f"{words}: {len(files):,} shards, {sum(sizes.values()) / 1e9:.3g} GB; {cached:,} of them "
        f"are in {fetcher.cache.folder} (data.cache), which holds up to "
        f"{fetcher.cache.limit / 1e9:g} GB (data.cache_gb)"
    )

    def memo_of(name: str) -> Path:
        key = digest_of((FORMAT, readable_formats(), name))
        return default_cache() / "shards" / f"{key}.gz"

    def make() -> list[Listing]:
        known: dict[str, Listing] = {}
        for file in listings:
            known |= read_listings(fetcher.cache.fetch(file), sizes, shown(file.url))
        for name in sizes.keys() - known.keys():
            with suppress(OSError, UserError):  # none yet, or a damaged one
                known |= read_listings(memo_of(name), sizes, "")
        unlisted = [n for n, file in enumerate(files) if file.name not in known]
        if unlisted:
            say(
                f"  {len(unlisted):,} have no {INDEX} of ssl-xcit shard beside them: each is "
                "fetched once to be listed"
            )
        for shard in track(unlisted, "fetching and listing shards", show=sys.stdout.isatty()):
            file = files[shard]
            os.close(fetcher.open(shard))
            listing = full_listing(str(fetcher.cache.path(file)), shown(file.url))
            known[file.name] = listing
            with suppress(OSError), replacing(memo_of(file.name)) as part:
                write_listings(part, {file.name: listing})
        return [known[file.name] for file in files]

    return cached_listing([file.name for file in files], make)


def cached_listing(state: object, make: Callable[[], list[Listing]]) -> dict[str, np.ndarray]:
    """Return the listing of all tars, from the cache folder unless their state has changed, and log
    what is wrong with them.
    """
    file = default_cache() / "shards" / f"{digest_of((FORMAT, readable_formats(), state))}.npz"
    listing = load_arrays(file)
    if listing is None or not set(listing) >= LISTED:
        listing = as_arrays(make())
        save_arrays(file, listing)
    problems = list(StringArray(listing["problems"], listing["problem_ends"]))
    for problem in problems[:MAX_PROBLEMS]:
        log.warning("%s", problem)
    if len(problems) > MAX_PROBLEMS:
        count = len(listing["counts"])
        log.warning("%d more lines about %d tars", len(problems) - MAX_PROBLEMS, count)
    return listing


def digest_of(state: object) -> str:
    """Return a short hash for a file's name."""
    return hashlib.sha256(os.fsencode(repr(state))).hexdigest()[:16]


def as_arrays(listings: Sequence[Listing]) -> dict[str, np.ndarray]:
    """Return the listings of all tars as arrays."""
    keys = StringArray.of(key for listing in listings for key in listing.keys)
    labels = StringArray.of(label for listing in listings for label in listing.labels)
    problems = StringArray.of(text for listing in listings for text in listing.problems)
    samples = StringArray.of(listing.sample for listing in listings)
    skipped = SkippedFiles()
    for listing in listings:
        skipped.counts.update(listing.skipped.counts)
    return {
        "problems": problems.content,
        "problem_ends": problems.ends,
        "keys": keys.content,
        "key_ends": keys.ends,
        "labels": labels.content,
        "label_ends": labels.ends,
        "offsets": np.array([o for listing in listings for o in listing.offsets], np.int64),
        "lengths": np.array([s for listing in listings for s in listing.sizes], np.int64),
        "counts": np.array([len(listing.keys) for listing in listings], np.int64),
        "left_out": StringArray.of([skipped.sentence()]).content,
        "samples": samples.content,
        "sample_ends": samples.ends,
    }


def full_listing(path: str, name: str = "") -> Listing:
    """List a tar, with the sample that identifies it where it cannot be read."""
    return list_tar(path, name)._replace(sample=sample_of(path))


def sample_of(file: str) -> str:
    """Hash a tar's size and a few blocks of it."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(f"{size}\0".encode())
        for place in np.linspace(0, max(0, size - BLOCK), BLOCKS).astype(int).tolist():
            digest.update(os.pread(stream.fileno(), BLOCK, place))
    return digest.hexdigest()


def write_listings(path: Path, listings: Mapping[str, Listing]) -> None:
    """Write one line of JSON for each tar, by its name; the same listings give the same file."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as out:
        for name, listing in listings.items():
            skipped = [[*kind, count] for kind, count in listing.skipped.counts.items()]
            line = {"tar": name, **listing._asdict(), "skipped": skipped}
            out.write(json.dumps(line).encode() + b"\n")


def read_listings(path: Path, sizes: Mapping[str, int], shown_name: str) -> dict[str, Listing]:
    """Return the listings in a file by the names of their tars, whose sizes are known; of hostile
    ones nothing but a reasonable image inside its tar is taken.

    Raises:
        UserError: it is no such file.
    """
    listings = {}
    try:
        with gzip.open(path) as file:
            while line := file.readline(MAX_LINE):
                row = json.loads(line)
                if row["tar"] not in sizes:
                    continue
                skipped = SkippedFiles()
                for ending, remedy, count in row.pop("skipped"):
                    skipped.counts[str(ending), str(remedy)] = int(count)
                name = row.pop("tar")
                listing = Listing(**row, skipped=skipped)
                offsets = np.array(listing.offsets, np.int64)
                lengths = np.array(listing.sizes, np.int64)
                counts = {len(part) for part in listing[:4]}
                words = (*listing.keys, *listing.labels, *listing.problems, listing.sample)
                inside = (offsets >= 0) & (lengths >= 0) & (offsets <= sizes[name] - lengths)
                if (
                    counts != {offsets.size}
                    or not (inside & (lengths <= MAX_BYTES)).all()
                    or not all(isinstance(word, str) for word in words)
                ):
                    raise ValueError("images that lie outside of their tar")
                listings[name] = listing
    except (*NO_LISTING, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{shown_name} is no listing of ssl-xcit shard ({error}): write it again, or remove it"
        ) from error
    return listings
