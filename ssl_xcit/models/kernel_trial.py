"""Whether kernels make this machine faster than torch alone: a block tried both ways, once."""

import functools
import os
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ssl_xcit.errors import UserError
from ssl_xcit.models.kernels import kernels
from ssl_xcit.models.xcit import XCABlock
from ssl_xcit.utils.files import read_json, write_json
from ssl_xcit.utils.hardware import has_bfloat16
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.terminal import say

DIM, HEADS, SIDE, IMAGES = 128, 4, 14, 8  # xcit_nano_12_p16 at 224 pixels
ROUNDS = 7  # the fastest of each counts, for other work makes some slower
TOO_SLOW = 0.9  # speed below which the plain forms are taken; closer to 1 it would be chance
TIMEOUT = 300  # seconds for a trial
CODE = """
from ssl_xcit.models.kernel_trial import measured_speed
print(measured_speed())
"""


def kernels_are_faster() -> bool:
    """Whether networks on this machine's CPU should take the kernels."""
    speed = kernel_speed()
    return speed is not None and speed >= TOO_SLOW


@functools.cache
def kernel_speed() -> float | None:
    """How many times as fast a block is by the kernels as by torch alone (0: the trial failed);
    None where they cannot be built. Measured at the first call on a machine (seconds), and again
    for another torch or where it failed; kept beside the built file.
    """
    run = kernels()
    if run is None:
        return None
    record = run.path.with_suffix(".json")
    speed = recorded(record)
    return tried_once(record) if speed is None else speed


def tried_once(record: Path) -> float:
    """The speed by a trial, of several processes that want it at once by that of the first."""
    try:
        with exclusive(record.with_suffix(".lock"), "the trial of kernels", wait=True):
            speed = recorded(record)
            if speed is None:
                speed = tried_speed()
                if speed:
                    with suppress(OSError):  # a full disk
                        write_json({"speed": speed, "torch": torch.__version__}, record)
            return speed
    except UserError:  # a folder that cannot be written
        return tried_speed()


def recorded(record: Path) -> float | None:
    """The speed that an earlier trial found with this torch."""
    about: dict[str, Any] = read_json(record)
    speed = about.get("speed")
    is_ours = isinstance(speed, float) and about.get("torch") == torch.__version__
    return speed if is_ours else None


def tried_speed() -> float:
    """The speed found by a process of its own: nothing of this one changes, and kernels that end a
    process end that one. By one thread: several wait for each other where other programs run, more
    than they compute.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}\n{CODE}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        answer = said[-1] if said else f"exit code {done.returncode}"
        speed = 0.0 if done.returncode else float(answer)
    except subprocess.TimeoutExpired:
        answer, speed = f"no end within {TIMEOUT} s", 0.0
    except (OSError, ValueError) as error:
        answer, speed = str(error), 0.0
    if not speed:
        say(f"networks run without kernels for this processor, which failed in a trial: {answer}")
    elif speed < TOO_SLOW:
        say(f"networks run without kernels, which have {speed:.2f} of torch's speed here")
    return round(speed, 3)


def measured_speed() -> float:
    """That of a block, forward and backward, in the precision of `trainer.precision=auto`."""
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
