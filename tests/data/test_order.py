"""Order and seeds are functions of (seed, pass, position) and nothing else."""

import numpy as np
import pytest

from ssl_xcit.data.order import Positions, crop_seed, image_at, permutation, step_seed


def test_every_pass_sees_every_image_once():
    for pass_index in range(3):
        seen = [image_at(0, 101 * pass_index + position, 101) for position in range(101)]
        assert sorted(seen) == list(range(101))


def test_passes_and_seeds_differ():
    orders = {tuple(permutation(s, p, 50)) for s in range(3) for p in range(3)}
    assert len(orders) == 9
    seeds = {crop_seed(s, position, 50) for s in range(3) for position in range(500)}
    assert len(seeds) == 1500
    assert len({step_seed(s, r, t) for s in range(3) for r in range(3) for t in range(50)}) == 450


def test_values_are_those_of_every_machine():
    assert [image_at(0, i, 10) for i in range(10)] == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert crop_seed(0, 3, 10) == 7431040579890139132


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_global_sequence(world_size):
    batch = 8 // world_size
    ranks = [list(Positions(3, 10, batch, rank, world_size)) for rank in range(world_size)]
    steps = np.array(ranks).reshape(world_size, 7, batch).swapaxes(0, 1)
    assert steps.flatten().tolist() == list(range(24, 80))
    assert len(Positions(3, 10, batch, 0, world_size)) == 10 * batch
