"""Whether kernels make this machine faster than torch alone: a block tried both ways, once."""

import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import torch

from ssl_xcit.models.kernels import kernels
from ssl_xcit.models.xcit import XCABlock
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import has_bfloat16
from ssl_xcit.utils.terminal import say

DIM, HEADS, SIDE, IMAGES = 128, 4, 14, 8  # xcit_nano_12_p16 at 224 pixels
ROUNDS = 7  # the fastest of each counts, for other work makes some slower
TOO_SLOW = 0.9  # speed below which the plain forms are taken; closer to 1 it would be chance


def kernels_are_faster() -> bool:
    """Whether networks on this machine's CPU should take the kernels."""
    speed = kernel_speed()
    return speed is not None and speed >= TOO_SLOW


@functools.cache
def kernel_speed() -> float | None:
    """How many times as fast a block is by the kernels as by torch alone; None where they cannot be
    built. Measured at the first call on a machine (a second) and kept beside the built file.
    """
    run = kernels()
    if run is None:
        return None
    record = record_of(run.path)
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or cut short
        return float(json.loads(record.read_text())["speed"])
    speed = round(measured_speed(), 3)
    if speed < TOO_SLOW:
        say(f"they have {speed:.2f} of torch's speed here, so networks run without them: {record}")
    with suppress(OSError):
        write_json({"speed": speed}, record)
    return speed


def record_of(built: Path) -> Path:
    """Where the trial of built kernels is kept."""
    return built.with_suffix(".json")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute by one thread for the time being."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured_speed() -> float:
    """That of a block, forward and backward, in the precision of `trainer.precision=auto`. By one
    thread: several wait for each other where other programs run, more than they compute. No random
    number is drawn from the global generator.
    """
    with (
        one_thread(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        plain = XCABlock(DIM, HEADS, layer_scale=1.0, drop_path=0.0)
        fused = deepcopy(plain)
        fused.fused = True
        x = torch.randn(IMAGES, SIDE * SIDE, DIM).requires_grad_()
        seconds: dict[XCABlock, list[float]] = {plain: [], fused: []}
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(on_cpu=True)):
            for _ in range(ROUNDS + 1):  # the first is not counted
                for block, times in seconds.items():
                    started = time.perf_counter()
                    block(x, (SIDE, SIDE)).sum().backward()
                    times.append(time.perf_counter() - started)
    return min(seconds[plain][1:]) / min(seconds[fused][1:])
