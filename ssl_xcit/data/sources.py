"""Where images come from, behind one small protocol. Labels are there only when asked for by
name.

`folders.py` has trees of files, `lists.py` lists of paths, `shards.py` tar shards, `sets.py` arrays
and sets that other libraries read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from ssl_xcit.data.decode import read_file
from ssl_xcit.data.labels import AnyLabels, Labels, label_kind
from ssl_xcit.data.names import Names
from ssl_xcit.data.order import Shards
from ssl_xcit.errors import UserError

Stored = bytes | np.ndarray  # an encoded image, or its pixels


@runtime_checkable
class Source(Protocol):
    """A finite set of images with random access."""

    labels: AnyLabels | None  # class ids, or None; for evaluation also others, see `label_kind`
    class_names: Sequence[str]  # by class id; empty without labels
    shards: Shards | None  # which images lie together, where that decides how fast they are read

    def __len__(self) -> int: ...

    def read(self, index: int) -> Stored:
        """The image as it is stored, for `decode.open_picture`.

        Raises:
            BadImage: it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a message calls the image: its path, or its place in the set."""
        ...


def digest_of(stored: Stored) -> bytes:
    """16 bytes that tell contents apart."""
    content = stored if isinstance(stored, bytes) else stored.tobytes()
    return blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class LabelledPair:
    """Labelled images to learn the classes from, and others to be tested on.

    They are looked at with the short side at `resize` pixels and the central `size` x `size` of
    that.
    """

    train: Source
    test: Source
    name: str
    resize: int
    size: int


class Files:
    """Image files by path.

    Args:
        paths: the files, below `root`.
        root: a folder, or empty where the paths are whole.
        labels: their class ids, or None.
        class_names: by class id.
        homes: of whole paths, the folders that they lie below.
    """

    shards: Shards | None = None

    def __init__(
        self,
        paths: Sequence[str],
        root: str = "",
        labels: AnyLabels | None = None,
        class_names: Sequence[str] = (),
        homes: Sequence[str] = (),
    ):
        self.homes = tuple(homes)
        self.paths = paths if isinstance(paths, Names) else Names.of(paths)
        self.root = root
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's content; raises BadImage."""
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        """Its path."""
        return os.path.join(self.root, self.paths[index])


class Subset:
    """Some images of a source.

    Args:
        source: the images.
        indices: which, in the new order.
    """

    shards: Shards | None = None

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Stored:
        """As the source reads it."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.indices[index]))


def stratified(labels: Labels, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """A mask that picks of each class the same share: at least one image where it has two, never
    all.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"fraction={fraction}: a share in (0, 1)")
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return chosen


def some_rows(count: int, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """A mask with that share of the rows, at least one and not all."""
    generator = np.random.Generator(np.random.Philox(seed))
    mask = np.zeros(count, bool)
    mask[generator.permutation(count)[: min(max(1, round(fraction * count)), count - 1)]] = True
    return mask


def held_out(
    train: Source | None,
    test: Source | None,
    name: str,
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """Labelled images of any kind; without `train` there are none, and evaluation is off.

    Args:
        train: to learn the classes from.
        test: to be tested on; without it a share of each class of `train` is held out.
        name: what a table calls them.
        test_fraction: that share; 0: there is one set only, and each image is tested on the others.
        resize: short side in pixels.
        size: side of the central square.
        seed: of the choice.

    Raises:
        UserError: no labels.
    """
    if train is None:
        if test is not None:
            raise UserError("eval_data: test images are given without images to learn from")
        return None
    if train.labels is None:
        raise UserError(f"eval_data: {name} has no labels, which k-NN and linear probe need")
    if test is None and test_fraction == 0:
        return LabelledPair(train, train, name, resize, size)
    if test is None:
        if label_kind(train.labels) == "classes":
            chosen = stratified(train.labels, test_fraction, seed)
        else:
            chosen = some_rows(len(train), test_fraction, seed)
        train, test = (Subset(train, np.flatnonzero(mask)) for mask in (~chosen, chosen))
    return LabelledPair(train, test, name, resize, size)


def no_labels() -> None:
    """No labelled images: k-NN and linear probe are off."""
