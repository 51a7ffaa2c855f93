"""Tar shards in the WebDataset layout: `KEY.jpg`, perhaps `KEY.cls`, one after the other.

A key ends at the first dot of a file's name, as in WebDataset, unless that would make one image of
several (`scan.2023.01.jpg`): then it ends at the last.

The tars are listed once (`tar_listing.py`), then images are read in place, in any order. Nothing is
extracted: only regular files of a limited size are read, and no pickles. Tars behind URLs are
fetched whole (`remote.py`).
"""

import glob
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ssl_xcit.data.folders import warn_once
from ssl_xcit.data.labels import AnyLabels
from ssl_xcit.data.order import Shards
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.remote import (
    INDEX,
    ShardFetcher,
    check_limit,
    find_tars,
    is_url,
    open_cache,
    shown,
)
from ssl_xcit.data.shard_labels import ShardLabels, indexed_names, shard_labels
from ssl_xcit.data.sources import LabelledPair, Places, Seed, TestFraction, as_places, held_out
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.data.tar_listing import local_listing, remote_listing, sample_of
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.validation import PLACE, Count, Positive, Text

log = logging.getLogger(__name__)
MAX_OPEN = 64  # tars open at once in a process
CacheFolder = Annotated[Text | None, PLACE]
CacheSize = Annotated[Positive, PLACE]


@dataclass(eq=False)
class TarShards:
    """Images in tars, in the order of the tars."""

    files: Sequence[str]
    shards: Shards | None  # images of each tar, and how many are mixed with each other
    keys: StringArray  # of all images
    offsets: np.ndarray  # in bytes, where each begins in its tar
    lengths: np.ndarray  # of each in bytes
    labels: AnyLabels | None  # class ids, or None
    class_names: Sequence[str]  # by class id
    fetcher: ShardFetcher | None = None  # of tars behind URLs
    known_samples: Sequence[str] = ()  # of these, see `sample_of`
    ids: str = ""  # see `ShardLabels`

    def __post_init__(self) -> None:
        """Prepare to find and open tars."""
        assert self.shards is not None
        self.ends = self.shards.sizes.cumsum()
        self.open_files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open_files": OrderedDict()}  # another process opens its own

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, index: int) -> int:
        """Return the number of the tar that an image lies in."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def read(self, index: int) -> bytes:
        """Read the encoded image; raises BadImage."""
        length, offset = int(self.lengths[index]), int(self.offsets[index])
        try:
            content = os.pread(self.descriptor(self.shard_of(index)), length, offset)
        except UserError:  # a server refuses, which is no fault of the image
            raise
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error.strerror}") from error
        if len(content) < length:
            raise BadImage(f"the tar ends within it: {len(content):,} of {length:,} bytes")
        return content

    def descriptor(self, shard: int) -> int:
        """Return an open tar; of many the least recently used is closed."""
        if shard not in self.open_files:
            if len(self.open_files) >= MAX_OPEN:
                os.close(self.open_files.popitem(last=False)[1])
            if self.fetcher is None:
                self.open_files[shard] = os.open(self.files[shard], os.O_RDONLY)
            else:
                self.close_removed()
                self.open_files[shard] = self.fetcher.open(shard)
        self.open_files.move_to_end(shard)
        if self.fetcher is not None:
            self.fetcher.refresh(self.open_files[shard])
        return self.open_files[shard]

    def fetch(self, index: int) -> None:
        """Fetch the tar of an image, if it is behind a URL and not there.

        Raises:
            UserError: the server refuses.
            RunFailed: it fails for too long, or the disk does.
        """
        if self.fetcher is not None:
            self.fetcher.cache.fetch(self.fetcher.files[self.shard_of(index)])

    def close_removed(self) -> None:
        """Close tars that the cache has removed, for until then they take room on the disk."""
        for shard, descriptor in list(self.open_files.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self.open_files.pop(shard))

    def samples(self) -> Sequence[str]:
        """Return `sample_of` each tar."""
        return self.known_samples if self.fetcher else [sample_of(f) for f in self.files]

    def name(self, index: int) -> str:
        """Return `shard-000001.tar/KEY`."""
        return f"{self.files[self.shard_of(index)]}/{self.keys[index]}"


def tar_files(root: Places) -> list[str]:
    """Return the tars of a folder, of a pattern (`DIR/train-*.tar`), or of several of these.

    Raises:
        MissingPath: there are none.
    """
    files: list[str] = []
    for place in as_places(root):
        path = str(Path(str(place)).expanduser())
        pattern = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
        paths = [path] if os.path.isfile(path) else glob.glob(pattern)
        tars = sorted(filter(os.path.isfile, paths))
        if not tars:
            raise MissingPath(f"data.root={place}: no tar shards (*.tar) there")
        files += tars
    return files


def tar_shards(
    root: Places,
    window: Count = 10_000,
    known: Sequence[str] = (),
    cache: CacheFolder = None,
    cache_gb: CacheSize = 100.0,
    labelled: bool = False,
) -> TarShards | None:
    """Return images in tar shards; with labels if each has a `.cls`: a class name, or a class id,
    whose name is looked up in the `shards.json` of `ssl-xcit shard` beside the tar.

    Args:
        root: a folder of tars, a pattern, a URL of either, or several of these; None: no images.
        window: images that are mixed with each other in a pass; larger mixes better, smaller reads
            from fewer tars at a time.
        known: class names whose ids another set has fixed.
        cache: folder for tars behind URLs; None: in the cache folder.
        cache_gb: what it may hold, in units of 10^9 bytes.
        labelled: labels are needed; else those that `shard_labels` refuses are left out, with a
            warning.

    Raises:
        MissingPath: no tars, or no images in them.
        UserError: not tars, or compressed ones; labels that are refused; a server that refuses.
        RunFailed: a server that fails, or a full disk.
    """
    if root is None:
        return None
    places = as_places(root)
    words = shown_places(root)
    fetcher = None
    if any(map(is_url, places)):
        if not all(map(is_url, places)):
            raise UserError(f"data.root={words}: name folders or URLs, not both")
        folder = Path(str(cache)).expanduser() if cache else default_cache() / "remote"
        found = [find_tars(str(place)) for place in places]
        fetcher = ShardFetcher([t for f in found for t in f.tars], open_cache(folder, cache_gb))
        files = [shown(file.url) for file in fetcher.files]
        names = {shown(url): n for f in found for url, n in f.class_names.items()}
        listed = remote_listing(fetcher, [file for f in found for file in f.listings], words)
    else:
        files = tar_files(root)
        names = indexed_names(files)
        listed = local_listing(files)
    left_out = listed["left_out"].tobytes().decode("utf-8", "surrogateescape")
    count = len(listed["offsets"])
    if not count:
        others = f" (left out: {left_out})" if left_out else ""
        raise MissingPath(f"data.root={words}: no images in {len(files)} tars{others}")
    if left_out:
        warn_once(f"data.root={words}: left out: {left_out}")
    texts = list(StringArray(listed["labels"], listed["label_ends"]))
    classes = ShardLabels(None, [])
    try:
        classes = shard_labels(texts, files, listed["counts"], names, words, known)
    except UserError as error:
        if labelled:
            raise
        warn_once(f"labels are left out: {error}")
    keys, shards = StringArray(listed["keys"], listed["key_ends"]), Shards(listed["counts"], window)
    samples: list[str] = []
    if fetcher is not None:
        check_limit(fetcher.files, count, window, fetcher.cache)
        shards = replace(shards, read_ahead=fetcher.read_ahead)
        samples = list(StringArray(listed["samples"], listed["sample_ends"]))
    return TarShards(
        files, shards, keys, listed["offsets"], listed["lengths"], classes.labels,
        tuple(classes.class_names), fetcher, samples, classes.ids,
    )  # fmt: skip


def shown_places(root: Places) -> str:
    """Return what messages call the places of tars."""
    return ", ".join(shown(str(place)) for place in as_places(root))


def labelled_shards(
    root: Places,
    test_root: Places = None,
    test_fraction: TestFraction = 0.2,
    resize: Count = 256,
    size: Count = 224,
    seed: Seed = 0,
    cache: CacheFolder = None,
    cache_gb: CacheSize = 100.0,
) -> LabelledPair | None:
    """Return `tar_shards` with labels, and others to test on (None: a share is held out); they are
    read one after the other.

    Raises:
        UserError: an index names the class ids of the one, and not of the other.
    """
    train = tar_shards(root, 1, (), cache, cache_gb, labelled=True)
    names = train.class_names if train is not None else ()
    test = tar_shards(test_root, 1, names, cache, cache_gb, labelled=True)
    if train is not None and test is not None and {train.ids, test.ids} == {"bare", "named"}:
        bare = ("root", root) if train.ids == "bare" else ("test_root", test_root)
        raise UserError(
            f"eval_data.{bare[0]}={shown_places(bare[1])}: .cls holds class ids, and no {INDEX} "
            "beside the tars has their names, as it does for the other images: copy the one that "
            "ssl-xcit shard wrote there"
        )
    return held_out(train, test, str(root), test_fraction, resize, size, seed)
