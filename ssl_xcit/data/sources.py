"""Where images come from, behind one small protocol; labels are read only where they are asked for.

`folders.py` has trees of files, `lists.py` lists of paths, `shards.py` tar shards, `sets.py` arrays
and sets that other libraries read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge, Lt
from jaxtyping import Bool

from ssl_xcit.data.decode import read_file
from ssl_xcit.data.labels import AnyLabels, Labels, label_kind
from ssl_xcit.data.order import Shards
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import PLACE, Text

Stored = bytes | np.ndarray  # an encoded image, or its pixels

# Settings of sources. A place says where images lie or how a list is read, not which images.
Place = Annotated[Text | None, PLACE]
Places = Annotated[Text | Sequence[Text] | None, PLACE]
LabelKind = Annotated[Literal["classes", "numbers"] | None, PLACE]
TestFraction = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0)]


def as_places(root: Places) -> list[str | int | float]:
    """Return one place, several or none as a list."""
    return [root] if isinstance(root, str | int | float) else list(root or [])


@runtime_checkable
class Source(Protocol):
    """A finite set of images with random access."""

    labels: AnyLabels | None  # class ids, or None; for evaluation also others, see `label_kind`
    class_names: Sequence[str]  # by class id; empty without labels
    shards: Shards | None  # which images lie together, where that decides how fast they are read

    def __len__(self) -> int: ...

    def read(self, index: int) -> Stored:
        """Read the image as it is stored, for `decode.open_picture`.

        Raises:
            BadImage: it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Return the image's path, or its place in the set, for messages."""
        ...


def digest_of(stored: Stored) -> bytes:
    """Return a hash of 16 bytes."""
    content = stored if isinstance(stored, bytes) else stored.tobytes()
    return blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class LabelledPair:
    """Labelled images to learn the classes from, and others to test on; resized to a short side of
    `resize` pixels, of which the central `size` x `size` are used.
    """

    train: Source
    test: Source
    name: str
    resize: int
    size: int


class Files:
    """Image files by path, relative to `root`, or absolute (`root` is empty) below `homes`."""

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
        self.paths = paths if isinstance(paths, StringArray) else StringArray.of(paths)
        self.root = root
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """Read the file; raises BadImage."""
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        """Return its path."""
        return os.path.join(self.root, self.paths[index])


class Subset:
    """The images of a source that have these indices, in their order."""

    shards: Shards | None = None

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Stored:
        """Read it from the source."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Return its name in the source."""
        return self.source.name(int(self.indices[index]))


def stratified(labels: Labels, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Choose the same share of each class, as a mask: at least one image of two, never all."""
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return chosen


def some_rows(count: int, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Choose that share of the rows, as a mask: at least one, never all."""
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
    """Return labelled images of any source; None without `train`: evaluation is off.

    Args:
        train: images to learn the classes from.
        test: images to test on; None: a share of each class of `train` is held out.
        name: what tables call the set.
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
    """Return no labelled images: k-NN and linear probe are off."""
