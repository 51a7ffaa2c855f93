"""Schedules against tables made as the DINO paper describes them."""

from itertools import pairwise

import numpy as np
import pytest

from ssl_xcit.objectives.temperature import LinearInStairs
from ssl_xcit.training.schedules import Cosine


def cosine_table(start, end, total, warmup, warmup_start):
    ramp = np.linspace(warmup_start, start, warmup)
    steps = np.arange(total - warmup)
    return np.concatenate(
        (ramp, end + 0.5 * (start - end) * (1 + np.cos(np.pi * steps / len(steps))))
    )


@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_cosine_with_warmup(warmup):
    schedule = Cosine(1e-3, 1e-6, 100, warmup, 1e-5)
    table = cosine_table(1e-3, 1e-6, 100, warmup, 1e-5)
    if warmup == 1:  # linspace of one value stays at its first
        table[0] = 1e-5
    assert [schedule(step) for step in range(100)] == pytest.approx(table.tolist(), rel=1e-9)
    assert schedule(100) == pytest.approx(1e-6)
    assert schedule(1000) == pytest.approx(1e-6)


def test_rising_cosine_for_ema_and_weight_decay():
    ema = Cosine(0.996, 1.0, 50)
    values = [ema(step) for step in range(51)]
    assert values[0] == 0.996
    assert values[-1] == 1.0
    assert all(a < b for a, b in pairwise(values))


def test_teacher_temperature_by_epoch():
    steps_per_epoch = 7.5
    schedule = LinearInStairs(0.04, 0.07, 30 * steps_per_epoch, steps_per_epoch)
    table = np.concatenate((np.linspace(0.04, 0.07, 30), np.full(20, 0.07)))
    for step in range(int(50 * steps_per_epoch)):
        assert schedule(step) == pytest.approx(table[int(step / steps_per_epoch)])
    assert LinearInStairs(0.02, 0.04, 0, 3.0)(0) == 0.04
