"""Two ranks that were started with different settings."""

import re
from types import SimpleNamespace

import numpy as np
from ranks import on_ranks

from ssl_xcit.data.identity import index_of
from ssl_xcit.data.sets import Arrays
from ssl_xcit.errors import UserError
from ssl_xcit.training.same_ranks import SameRanks

SETTINGS = [
    {"seed": 0, "optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "logger": None},
    {"seed": 0, "optim": {"lr": 2e-3, "betas": [0.9, 0.999], "fused": True}, "logger": None},
]


def images(seed):
    """Of two sets that differ in a pixel."""
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[0, 0, 0, 0] = seed
    return {"data": index_of(Arrays(pixels, "some"))}


def work(rank):
    trainer = SimpleNamespace(world_size=2)
    SameRanks(SETTINGS[0], images(0)).setup(trainer)
    try:
        SameRanks(SETTINGS[rank], images(rank)).setup(trainer)
    except UserError as error:
        return str(error)
    return None


def test_the_rank_and_the_difference_are_named_on_all_ranks(tmp_path):
    said = on_ranks(2, tmp_path, work)
    assert said[0] == said[1]
    assert re.sub(r"\b[0-9a-f]{8}\b", "DIGEST", said[0]) == (
        "rank 1 was started with optim.lr 0.002 (rank 0: 0.001), the images of data 3 (DIGEST) "
        "(rank 0: 3 (DIGEST)), optim.fused True (rank 0: not set): all ranks need the same "
        "command, the same images and the same packages"
    )


def test_one_rank_compares_nothing():
    SameRanks(SETTINGS[0], {}).setup(SimpleNamespace(world_size=1))
