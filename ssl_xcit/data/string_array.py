"""An array of strings in one block of memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int64, UInt8


class StringArray(Sequence[str]):
    """Paths or keys in one block of bytes, which loader processes share.

    A million of 40 characters take 48 MB; a list of str takes 100, and each process copies it
    piece by piece.

    Args:
        content: all names, one after the other, as the file system has them.
        ends: where each ends.
    """

    def __init__(self, content: UInt8[np.ndarray, " bytes"], ends: Int64[np.ndarray, " N"]):
        self.content = content
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str | bytes]) -> "StringArray":
        """Make it from strings."""
        encoded = [
            n if isinstance(n, bytes) else n.encode("utf-8", "surrogateescape") for n in names
        ]
        lengths = np.fromiter((len(n) for n in encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), lengths.cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "StringArray": ...
    def __getitem__(self, index: int | slice) -> "str | StringArray":
        count = len(self.ends)
        if isinstance(index, slice):
            return StringArray.of(self[i] for i in range(*index.indices(count)))
        if not -count <= index < count:
            raise IndexError(index)
        index %= count
        start = int(self.ends[index - 1]) if index else 0
        return (
            self.content[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")
        )

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
