"""Which sample comes when, and with which random numbers: pure functions of (seed, pass, position).

Position g of the run is place g mod N of pass g // N over N images. The place decides the image (a
permutation keyed by the pass) and the seed of its crops, so the only state of the data is an
integer, and neither the number of workers nor of ranks changes what a sample looks like. Random
bits come from Philox, a counter-based generator.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

_ORDER, _CROPS, _STEP = 0, 1, 2  # what the random bits are for


def _bits(seed: int, purpose: int, *place: int) -> np.random.Philox:
    """A generator keyed by the seed and the purpose, its counter at a place (up to three
    integers).
    """
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(place)] = place  # the lowest word counts the draws
    return np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)


@lru_cache(maxsize=2)
def permutation(seed: int, pass_index: int, num_images: int) -> Int64[np.ndarray, " N"]:
    """The order of pass `pass_index`: every image once."""
    order = np.random.Generator(_bits(seed, _ORDER, pass_index)).permutation(num_images)
    order.setflags(write=False)  # it is cached
    return order


def image_at(seed: int, position: int, num_images: int) -> int:
    """Index of the image at a position of the run."""
    return int(permutation(seed, position // num_images, num_images)[position % num_images])


def crop_seed(seed: int, position: int, num_images: int) -> int:
    """Seed of the crops at a position, in [0, 2^63)."""
    bits = _bits(seed, _CROPS, position // num_images, position % num_images)
    return int(bits.random_raw()) >> 1


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed of stochastic depth at an optimizer step on a rank, in [0, 2^63)."""
    return int(_bits(seed, _STEP, rank, step).random_raw()) >> 1


class Positions(Sampler[int]):
    """The positions of one rank from `start` to the end of the run, in batches of the global
    sequence.

    Step s of W ranks takes positions s * B to (s + 1) * B of the run; rank r takes the r-th of W
    equal parts.

    Args:
        start_step: first step not yet trained on.
        total_steps: steps of the whole run.
        batch_size: B / W, images a step on this rank.
        rank: r in [0, world_size).
        world_size: W.
    """

    def __init__(
        self, start_step: int, total_steps: int, batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.start_step = start_step
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Of the whole run, not of what is left: Lightning compares it with the steps done since
        the run began.
        """
        return self.total_steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Positions in the order they are trained on."""
        for step in range(self.start_step, self.total_steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)
