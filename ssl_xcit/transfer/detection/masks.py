"""Instance masks as COCO stores them: polygons, and runs of zeros and ones down the columns (RLE).

Differs from pycocotools: a pixel belongs to a polygon if its centre does; pycocotools draws the
outline at five times the size first, which moves borders by less than half a pixel.
"""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from jaxtyping import Bool, Float, Int64

Mask = Bool[np.ndarray, "height width"]


def polygon_mask(polygon: Float[np.ndarray, "P 2"], height: int, width: int) -> Mask:
    """Fill a polygon of (x, y) in pixels, where the first pixel reaches from 0 to 1; what crosses
    itself is filled by the even-odd rule, and what lies outside the image is cut off.
    """
    mask = np.zeros((height, width), bool)
    limits = (width, height)
    left, top = np.clip(np.floor(polygon.min(axis=0)), 0, limits).astype(int).tolist()
    right, bottom = np.clip(np.ceil(polygon.max(axis=0)), 0, limits).astype(int).tolist()
    start, end = polygon, np.roll(polygon, -1, axis=0)
    rows = np.arange(top, bottom) + 0.5  # centres
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    edge, row = np.nonzero((low[:, None] <= rows) & (rows < high[:, None]))
    share = (rows[row] - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    crossing = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
    first = np.clip(np.ceil(crossing - 0.5), left, right).astype(int)  # pixel to the right of it
    crossings = np.zeros((bottom - top, right - left + 1), np.uint8)
    np.add.at(crossings, (row, first - left), 1)
    inside = np.bitwise_xor.accumulate(crossings & 1, axis=1)
    mask[top:bottom, left:right] = inside[:, :-1]
    return mask


def polygons_mask(polygons: Iterable[Float[np.ndarray, "_ 2"]], height: int, width: int) -> Mask:
    """Fill the union of an object's parts."""
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        mask |= polygon_mask(polygon, height, width)
    return mask


def runs_of(mask: Mask) -> list[int]:
    """Return the lengths of runs of equal pixels, column by column, starting with a run of False
    (0: the first pixel is True).
    """
    box = box_of(mask)
    if box is None:
        return [mask.size]
    left, top, right, bottom = box
    columns = np.pad(mask[top:bottom, left:right].T, ((0, 0), (1, 1)))
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    changes = (left + column) * len(mask) + top + row
    same = changes[1:] == changes[:-1]  # a run goes on from one column to the next
    changes = changes[~(np.append(same, False) | np.append(False, same)) & (changes < mask.size)]
    runs: list[int] = np.diff(changes, prepend=0, append=mask.size).tolist()
    return runs


def runs_mask(runs: Sequence[int] | Int64[np.ndarray, " R"], height: int, width: int) -> Mask:
    """Return the mask that `runs_of` described.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    lengths = np.asarray(runs, np.int64)
    total = int(lengths.sum())
    if total != height * width or (lengths < 0).any():
        raise ValueError(f"runs of {total:,} pixels in a mask of {width} x {height}")
    mask = np.zeros((height, width), bool)
    if len(lengths) > 1:
        last = int(lengths[-1]) if len(lengths) % 2 else 0  # False after the last True
        left, right = int(lengths[0]) // height, width - last // height
        inner = lengths.copy()  # of the columns that may have a True pixel
        inner[0] -= left * height
        inner[-1] -= (width - right) * height
        values = np.repeat(np.arange(len(inner)) % 2 == 1, inner)
        mask[:, left:right] = values.reshape(right - left, height).T
    return mask


def runs_from_text(text: str) -> list[int]:
    """Return the runs of a compressed RLE.

    A number is written as characters from `0` on of 5 bits each, the lowest first, with 32 added
    on all but the last, in two's complement. From the fourth on it is less the one two before.

    Raises:
        ValueError: it ends within a number, or has other characters.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} in a compressed RLE")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a compressed RLE that is cut short")
    return runs


def runs_to_text(runs: Sequence[int]) -> str:
    """Return runs as a compressed RLE, see `runs_from_text`."""
    text = []
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5  # keeps the sign
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


class RunMasks(Sequence[Mask]):
    """Masks of an image that are kept as runs, of which an index decodes one; slices and arrays of
    indices choose some, still as runs.

    Args:
        runs: of each mask, see `runs_of`.
        size: (height, width) of the image.
    """

    def __init__(self, runs: Sequence[Int64[np.ndarray, " _"]], size: tuple[int, int]):
        self.runs, self.size = list(runs), size

    @classmethod
    def of(cls, masks: Iterable[Mask], size: tuple[int, int]) -> "RunMasks":
        """Encode masks, of which one at a time is taken."""
        return cls([np.array(runs_of(mask), np.int64) for mask in masks], size)

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> Mask: ...

    @overload
    def __getitem__(self, index: slice | Int64[np.ndarray, " _"]) -> "RunMasks": ...

    def __getitem__(self, index: int | slice | Int64[np.ndarray, " _"]) -> "Mask | RunMasks":
        chosen = np.arange(len(self))[index]
        if isinstance(index, slice | np.ndarray):
            return RunMasks([self.runs[i] for i in chosen.tolist()], self.size)
        return runs_mask(self.runs[chosen], *self.size)

    def num_pixels(self, index: int) -> int:
        """How many pixels of a mask are True."""
        return int(self.runs[index][1::2].sum())


def box_of(mask: Mask) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom around the True pixels; None: there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
