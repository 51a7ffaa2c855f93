"""The order of samples and their random numbers: pure functions of (seed, pass, position).

Position g of the run is place g mod N of pass g // N over N images. The place decides the image (a
permutation keyed by the pass) and the seed of its crops, so the only state of the data is an
integer, and neither the number of workers nor of ranks changes what a sample looks like. Random
bits come from Philox, a counter-based generator.

Images that lie together in shards are read together: shards come in a permuted order, and their
images are mixed in a window that moves over them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

_ORDER, _CROPS, _STEP, _WINDOW, _FALLBACK, _DEPTH = range(6)  # purposes of random bits
NEIGHBOURS = 4  # tried in place of a bad image before any other


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most so many of 0 to count - 1."""
    places = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return [int(place) for place in np.unique(places)]


def _bits(seed: int, purpose: int, *place: int) -> np.random.Philox:
    """Return a generator keyed by seed and purpose, its counter at up to three integers."""
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(place)] = place  # the lowest word counts the draws
    return np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)


@lru_cache(maxsize=2)
def permutation(seed: int, pass_index: int, num_images: int) -> Int64[np.ndarray, " N"]:
    """Return the order of pass `pass_index`: every image once."""
    order = np.random.Generator(_bits(seed, _ORDER, pass_index)).permutation(num_images)
    order.setflags(write=False)  # it is cached
    return order


@lru_cache(maxsize=8)
def window_permutation(
    seed: int, pass_index: int, window: int, size: int
) -> Int64[np.ndarray, " W"]:
    """Return the order inside a window of pass `pass_index`."""
    return np.random.Generator(_bits(seed, _WINDOW, pass_index, window)).permutation(size)


@dataclass(frozen=True)
class Shards:
    """Images that lie together on disk."""

    sizes: Int64[np.ndarray, " S"]  # images of each shard, which follow one another in the source
    window: int  # images that are mixed with each other
    # where shards have to be fetched: called with a number of the window, and what returns the
    # shards of it and of the next
    read_ahead: Callable[[Any, Callable[[], list[int]]], None] | None = None

    def image_at(self, seed: int, pass_index: int, place: int) -> int:
        """Return the index of the image at a place of a pass: the shards in a permuted order laid
        end to end, cut into windows, each permuted.
        """
        window, inside = divmod(place, self.window)
        first = window * self.window
        size = min(self.window, int(self.sizes.sum()) - first)
        place = first + int(window_permutation(seed, pass_index, window, size)[inside])
        shards = permutation(seed, pass_index, len(self.sizes))
        ends = self.sizes[shards].cumsum()
        which = int(np.searchsorted(ends, place, side="right"))
        shard = shards[which]
        start = int(self.sizes[:shard].sum())
        return start + place - int(ends[which] - self.sizes[shard])

    def announce(self, seed: int, position: int) -> None:
        """Say which shards will be read from a position on, if anybody wants to know."""
        if self.read_ahead is not None:
            pass_index, place = divmod(position, int(self.sizes.sum()))
            window = (seed, pass_index, place // self.window)
            self.read_ahead(window, partial(self.upcoming, seed, position))

    def upcoming(self, seed: int, position: int) -> list[int]:
        """Return the shards of the window at a position and of the next, in their order."""
        num_images = int(self.sizes.sum())
        pass_index, place = divmod(position, num_images)
        chosen: list[int] = []
        for _ in range(2):
            first = place - place % self.window
            place = min(first + self.window, num_images)
            shards = permutation(seed, pass_index, len(self.sizes))
            ends = self.sizes[shards].cumsum()
            start, last = np.searchsorted(ends, [first, place - 1], side="right")
            chosen += shards[start : last + 1].tolist()
            if place == num_images:
                pass_index, place = pass_index + 1, 0
        return list(dict.fromkeys(chosen))


def image_at(seed: int, position: int, num_images: int, shards: Shards | None = None) -> int:
    """Return the index of the image at a position of the run."""
    pass_index, place = divmod(position, num_images)
    if shards is not None:
        return shards.image_at(seed, pass_index, place)
    return int(permutation(seed, pass_index, num_images)[place])


def crop_seed(seed: int, position: int, num_images: int) -> int:
    """Return the seed of the crops at a position, in [0, 2^63)."""
    bits = _bits(seed, _CROPS, position // num_images, position % num_images)
    return int(bits.random_raw()) >> 1


def fallback_index(seed: int, position: int, wanted: int, attempt: int, num_images: int) -> int:
    """Return the index to try for a bad one: neighbours, then any, as bad ones may lie together."""
    if attempt < NEIGHBOURS:
        return (wanted + attempt) % num_images
    bits = _bits(seed, _FALLBACK, position // num_images, position % num_images, attempt)
    return int(bits.random_raw() % num_images)


def step_seed(seed: int, part: int, step: int) -> int:
    """Return the seed of what is drawn for a part of a step's batch, known by a number such as that
    of its first image, in [0, 2^63).
    """
    return int(_bits(seed, _STEP, part, step).random_raw()) >> 1


def depth_seed(seed: int, step: int) -> int:
    """Return the seed of stochastic depth at a step, of all ranks, in [0, 2^63)."""
    return int(_bits(seed, _DEPTH, step).random_raw()) >> 1


@dataclass(eq=False)
class Positions(Sampler[int]):
    """The positions of one rank from `start` to the end of the run, in batches of the global
    sequence.

    Step s of W ranks takes positions s * B to (s + 1) * B of the run; rank r takes the r-th of W
    equal parts.
    """

    start_step: int  # first step not yet trained on
    total_steps: int  # steps of the whole run
    batch_size: int  # B / W, images a step on this rank
    rank: int = 0  # r in [0, world_size)
    world_size: int = 1  # W

    def __len__(self) -> int:
        """Return the length of the whole run, which Lightning compares with all steps done."""
        return self.total_steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield positions in the order they are trained on."""
        for step in range(self.start_step, self.total_steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)
