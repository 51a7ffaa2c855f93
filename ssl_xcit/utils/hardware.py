"""Describe the machine: its name, usable cores, bfloat16, a compiler."""

import logging
import os
import platform
import re
import shlex
import shutil
from contextlib import suppress
from typing import Any

from ssl_xcit.errors import UserError

log = logging.getLogger(__name__)


def machine() -> dict[str, str]:
    """System, processor and GPUs by name."""
    import torch  # here, for what drives a sweep does without it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "GPU": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
    }


def processor() -> str:
    """Its name, where the system tells."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        if match := re.search(r"model name\s*: (.+)", file.read(20_000)):
            return match[1]
    return platform.processor() or platform.machine()


def has_bfloat16(on_cpu: bool) -> bool:
    """Whether there are instructions for products in bfloat16: a GPU from Ampere on, a CPU with
    avx512_bf16 or amx. Without them torch computes the same many times slower.
    """
    import torch

    if not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision_for(setting: str, on_cpu: bool) -> str:
    """Lightning's name of the precision; `auto` is bf16-mixed where the hardware has it.

    Parameters, optimizer and loss are float32 in both.

    Raises:
        UserError: a precision that the step is not written for.
    """
    if setting == "auto":
        return "bf16-mixed" if has_bfloat16(on_cpu) else "32-true"
    if setting not in ("32-true", "32", "bf16-mixed"):
        raise UserError(
            f"trainer.precision={setting}: auto, 32-true or bf16-mixed (float16 would need a loss "
            "scale)"
        )
    if setting == "bf16-mixed" and not has_bfloat16(on_cpu):
        log.warning(
            "trainer.precision=bf16-mixed: this %s has no bfloat16 instructions, and without them "
            "a step takes many times as long; trainer.precision=auto takes float32 here",
            "processor" if on_cpu else "GPU",
        )
    return setting


def check_compiler(on_cpu: bool) -> None:
    """That `compile=true` finds what it needs, before the data is read.

    Raises:
        UserError: no C++ compiler for a CPU.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if on_cpu and shutil.which(compiler[0]) is None:
        raise UserError(
            "compile=true needs a C++ compiler on a CPU, and there is no g++: install one (Debian: "
            "apt install g++), name another in CXX, or leave compile=false"
        )


def memory_of(device: Any) -> int:
    """Bytes that a device has; of the CPU the machine's, or the container's limit."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError), open(path) as file:  # no such group, or `max`
            limits.append(int(file.read()))
    return min(limits)


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not tell."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def usable_cores() -> int:
    """Cores that this process may run on, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, min(cores or 1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or `max`
        return cores or 1
