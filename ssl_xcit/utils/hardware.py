"""Describe the machine: its name, usable cores, bfloat16, a compiler."""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError

log = logging.getLogger(__name__)
IMPORTED = time.perf_counter()
clock: dict[str, float] = {}
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


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


def processor_flags() -> str:
    """Its instructions, where the system lists them."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        if match := re.search(r"(?:flags|Features)\s*: (.+)", file.read(20_000)):
            return match[1]
    return ""


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


def compiles_on_gpu() -> bool:
    """Whether `torch.compile` has what it needs: Triton, a C compiler, a GPU from Volta on. A
    warning says what is missing.
    """
    import torch

    compilers = (os.environ.get("CC") or "gcc", "cc", "clang")
    needs = {
        "Triton (pip install triton)": find_spec("triton") is not None,
        "a C compiler (Debian: apt install gcc)": any(map(shutil.which, compilers)),
        "a GPU of compute capability 7.0": torch.cuda.get_device_capability() >= (7, 0),
    }
    missing = [what for what, is_there in needs.items() if not is_there]
    if missing:
        log.warning(
            "compile=auto: torch.compile needs %s, so the backbones are not compiled",
            " and ".join(missing),
        )
    return not missing


def cpp_compiler() -> tuple[list[str], bool]:
    """The words that call the C++ compiler, `CXX` or g++, and whether it is there."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return words, shutil.which(words[0]) is not None


def compiler_version(compiler: Sequence[str]) -> str:
    """What it says of itself, on one line."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout.partition("\n")[0].strip()
    return ""


def check_compiler(on_cpu: bool) -> None:
    """That `compile=true` finds what it needs, before the data is read.

    Raises:
        UserError: no C++ compiler for a CPU.
    """
    if on_cpu and not cpp_compiler()[1]:
        raise UserError(
            "compile=true needs a C++ compiler on a CPU, and there is no g++: install one (Debian: "
            "apt install g++), name another in CXX, or leave compile=auto"
        )


def start_clock() -> None:
    """Let `seconds_since_start` count from here, in a process that does other things too."""
    clock["start"] = time.perf_counter()


def seconds_since_start() -> float:
    """Seconds since `start_clock`, or since this process was started where the system tells, or
    since this import.
    """
    if "start" in clock:
        return time.perf_counter() - clock["start"]
    with suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.perf_counter() - IMPORTED


def memory_of(device: Any) -> int:
    """Bytes that a device has; of the CPU the machine's, or the container's limit."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, memory_limit() or installed)


def resident_bytes(peak: bool = False) -> int:
    """Memory that this process has now, or had at most; 0 where the system does not tell."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(wanted)).split()[1])
    return 0


def usable_cores() -> int:
    """Cores that this process may run on, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return (cores or 1) if quota is None else max(1, min(cores or 1, int(quota)))


def default_workers(devices: int = 1) -> int:
    """Return a device's number of loader processes: its share of the cores less one, at most 12.
    A rank that srun has started has cores of its own.
    """
    of_task = os.environ.get("SLURM_CPUS_PER_TASK", "") if "SLURM_PROCID" in os.environ else ""
    cores = int(of_task) if of_task.isdecimal() else usable_cores() // max(devices, 1)
    return min(12, max(0, cores - 1))


def cpu_quota(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Cores' worth of time that cgroups leave to this process; None: all of it."""
    quotas = []
    for folder in cgroup_folders("cpu", root, own):
        with suppress(OSError, ValueError):  # no such file, or `max`
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):  # version 1
            quota = (folder / "cpu.cfs_quota_us").read_text()
            quotas.append(int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    return min((quota for quota in quotas if quota > 0), default=None)  # -1 is none


def memory_limit(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """Bytes that cgroups allow this process; None: as many as there are."""
    limits = []
    for folder in cgroup_folders("memory", root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if limit < 1 << 60), default=None)  # version 1's `max`


def cgroup_folders(controller: str, root: Path, own: Path) -> list[Path]:
    """Folders of this process's group and of all that it lies in, of cgroup versions 1 and 2; a
    container often sees its own group as the root.
    """
    folders = [root, root / controller]
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            group = Path(path.lstrip("/"))
            top = root / controller if names else root
            folders += [top / part for part in (group, *group.parents)]
    return list(dict.fromkeys(folders))
