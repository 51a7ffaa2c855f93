"""Whether kernels make this machine faster than torch alone: a block tried both ways, once."""

import functools
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssl_xcit.errors import UserError
from ssl_xcit.models.kernels import kernels
from ssl_xcit.models.xcit import XCABlock
from ssl_xcit.utils.files import read_json, write_json
from ssl_xcit.utils.hardware import has_bfloat16
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
DIM, HEADS, SIDE, IMAGES = 128, 4, 14, 8  # xcit_nano_12_p16 at 224 pixels
ROUNDS = 7  # the fastest of each counts, for other work makes some slower
TOO_SLOW = 0.9  # speed below which the plain forms are taken; closer to 1 it would be chance
TIMEOUT = 60  # seconds for a trial, half of what the doctor waits for
TRY_AGAIN = 3600  # seconds that a failed trial counts
CODE = """
import torch
from ssl_xcit.models.kernel_trial import measured_speed
torch.set_num_threads(1)
print(measured_speed())
"""


class Trial(NamedTuple):
    """What a trial found."""

    speed: float  # that of torch alone is 1; 0: the trial failed
    reason: str = ""  # for which it failed


def kernels_are_faster() -> bool:
    """Whether networks on this machine's CPU should take the kernels."""
    speed = kernel_speed()
    return speed is not None and speed >= TOO_SLOW


@functools.cache
def kernel_speed() -> float | None:
    """How many times as fast a block is by the kernels as by torch alone (0: the trial failed);
    None where they cannot be built. Measured at the first call on a machine (seconds), again for
    another torch and an hour after a failure; kept beside the built file.
    """
    run = kernels()
    if run is None:
        return None
    record = run.path.with_suffix(".json")
    speed, reason = recorded(record) or tried_once(record)
    if not speed:
        log.warning(
            "networks run without kernels for this processor, which failed in a trial: %s", reason
        )
    return speed


def tried_once(record: Path) -> Trial:
    """A trial, of several processes that want it at once that of the first."""
    try:
        with exclusive(record.with_suffix(".lock"), "the trial of kernels", wait=True):
            trial = recorded(record)
            if trial is None:
                trial = new_trial()
                about = {**trial._asdict(), "torch": torch.__version__, "time": time.time()}
                with suppress(OSError):  # a full disk
                    write_json(about, record)
            return trial
    except UserError:  # a folder that cannot be written
        return new_trial()


def recorded(record: Path) -> Trial | None:
    """An earlier trial with this torch; one that failed counts for an hour."""
    about: dict[str, Any] = read_json(record)
    speed, tried_at = about.get("speed"), about.get("time")
    if not isinstance(speed, float) or about.get("torch") != torch.__version__:
        return None
    recent = isinstance(tried_at, float) and abs(time.time() - tried_at) < TRY_AGAIN
    return Trial(speed, str(about.get("reason", ""))) if speed or recent else None


def new_trial() -> Trial:
    """A trial by a process of its own: nothing of this one changes, and kernels that end a process
    end that one. By one thread: several wait for each other where other programs run, more than
    they compute.
    """
    try:
        speed = round(float(answer_of_child()), 3)
    except subprocess.TimeoutExpired:
        return Trial(0.0, f"no end within {TIMEOUT} s")
    except (OSError, ValueError, RuntimeError) as error:
        return Trial(0.0, str(error))
    if speed < TOO_SLOW:
        say(f"networks run without kernels, which have {speed:.2f} of torch's speed here")
    return Trial(speed)


def answer_of_child() -> str:
    """The last line that `CODE` prints, in time; an alarm ends it where this process is killed."""
    code = f"import signal, sys; signal.alarm({TIMEOUT + 1}); sys.path[:] = {sys.path!r}\n{CODE}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            output, errors = child.communicate(timeout=TIMEOUT)
        except BaseException:
            with suppress(ProcessLookupError):  # with what it has started, which holds the pipes
                os.killpg(child.pid, signal.SIGKILL)
            raise
    if child.returncode < 0:
        raise RuntimeError(f"ended with {signal.Signals(-child.returncode).name}")
    said = (errors if child.returncode else output).strip().splitlines()
    if child.returncode or not said:
        raise RuntimeError(said[-1] if said else f"exit code {child.returncode}")
    return said[-1]


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
