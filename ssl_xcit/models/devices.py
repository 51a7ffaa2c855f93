"""Move networks to the devices that a setting names, and make the best of a CPU."""

import ctypes
import os
from contextlib import suppress

import torch
from torch import nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.kernel_trial import kernels_are_faster
from ssl_xcit.models.xcit import XCiT

# M_MMAP_THRESHOLD (its largest value), M_TRIM_THRESHOLD, M_TOP_PAD, in bytes
MALLOPT = {-3: 32 << 20, -1: 2**31 - 1, -2: 64 << 20}


def placed(network: nn.Module, device: str) -> list[torch.device]:
    """Move the network to the first of the devices that a setting names; return all of them;
    raises UserError where there is no such device.

    `auto` is every GPU there is (under torchrun the rank's own), or else the CPU; several are
    joined by `+` (cuda:0+cuda:1).
    """
    if device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [f"cuda:{i}" for i in range(count)] or ["cpu"]
        if count and "LOCAL_RANK" in os.environ:  # of torchrun's ranks each has its own
            names = [f"cuda:{int(os.environ['LOCAL_RANK']) % count}"]
    else:
        names = device.split("+")
    try:
        devices = [torch.device(name) for name in names]
        for one in reversed(devices):  # every one is tried, and it ends up on the first
            network.to(one)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device}: {reason}; try device=cpu") from error
    if devices[0].type == "cpu":
        prepare_cpu(network)
    elif devices[0].type == "cuda" and devices[0].index is not None:
        torch.cuda.set_device(devices[0])  # where faiss searches
    return devices


def prepare_cpu(network: nn.Module, kernels: bool | None = None) -> None:
    """Let every XCiT inside take this machine's kernels, and the process keep freed memory.

    Args:
        network: the XCiT, or what has some inside.
        kernels: whether to take them; None: where a trial, once a machine, finds them faster.
    """
    keep_memory()
    for module in network.modules():
        if isinstance(module, XCiT) and (kernels_are_faster() if kernels is None else kernels):
            module.fuse()


def keep_memory() -> None:
    """Let this process keep freed memory for the next tensors. glibc returns that of each large one
    to the system, and a step would take tens of thousands of page faults to get it again.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for option, value in MALLOPT.items():
            library.mallopt(option, value)
