"""What each part of the machine has to have for a run: facts in, lines out.

A line is `ok`, a `note` (a run does without it, or takes longer) or a `problem`; the last two say
what to type.
"""

import errno
import netrc
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from ssl_xcit.doctor.probes import Facts

GB = 1e9
FEW_GB, LITTLE_GB = 2, 20  # free: not enough for the checkpoints of a run; for those of a few
LITTLE_MEMORY_GB = 4
SLOW_MB_S = 30  # reading or writing
BYTES_AN_IMAGE = 3 * (2 * 224**2 + 8 * 96**2)  # crops by conf/augment/fused.yaml, as bytes
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # in /proc/cpuinfo
CHUNK, MOST_CHUNKS, SECONDS = 8 << 20, 8, 2.0  # of the file that measures a disk
DRIVER, DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
WHEELS = "https://download.pytorch.org/whl"


class Line(NamedTuple):
    """One line of the page."""

    state: Literal["ok", "note", "problem"]
    what: str
    facts: str
    fix: str = ""

    def __str__(self) -> str:
        arrow = f" -> {self.fix}" if self.fix else ""
        return f"{self.state:<7}  {self.what:<13}  {self.facts}{arrow}"


class Driver(NamedTuple):
    """What the system says of NVIDIA GPUs, without torch."""

    gpus: list[str]
    version: str | None = None
    cuda: str | None = None  # newest version that it runs


def about_package(own_version: str, folder: Path) -> Line:
    """Versions of the package, its commit where it is a checkout, Python and the system."""
    git = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    commit = ""
    with suppress(OSError, ValueError):
        done = subprocess.run(git, capture_output=True, text=True, timeout=5)
        top, head = done.stdout.split()
        commit = f", commit {head}" if Path(top) == folder else ""
    return Line(
        "ok",
        "ssl_xcit",
        f"{own_version}{commit}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.release()} {platform.machine()}",
    )


def driver_here() -> Driver:
    """Ask nvidia-smi, then the kernel module, then the device files."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.rsplit(", ", 1) for line in answer.stdout.splitlines()]
        table = subprocess.run(query[:1], capture_output=True, text=True, timeout=20)
        cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", table.stdout)
        return Driver([name for name, _ in rows], rows[0][1] if rows else None, cuda and cuda[1])
    gpus = [str(file) for file in sorted(DEVICES.glob("nvidia[0-9]*"))]
    with suppress(OSError):
        if found := re.search(r"Kernel Module.*?(\d+\.[\d.]+)", DRIVER.read_text()):
            return Driver(gpus, found[1])
    return Driver(gpus)


def check_torch(facts: Facts, driver: Driver, environment: Mapping[str, str]) -> Iterator[Line]:
    """The build of torch against the driver and the GPUs, and the speed of matrix products."""
    if "error" in facts:
        fix = "pip install --force-reinstall torch torchvision"
        yield Line("problem", "torch", f"cannot be used: {facts['error']}", fix)
        return
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    versions = f"torch {facts['torch']}, {build}, torchvision {facts['torchvision']}"
    yield Line("ok", "torch", f"{versions}, lightning {facts['lightning']}")
    yield check_gpu(facts, driver, environment)
    kinds = facts["cpu_gflops"]
    speeds = ", ".join(f"{kind} {speed:g} GFLOP/s" for kind, speed in kinds.items())
    precision = "bf16-mixed" if facts["bfloat16"] else "32-true"
    threads = counted(facts["threads"], "thread")
    about = f"{speeds} on {threads}; trainer.precision=auto takes {precision}"
    yield Line("ok", "CPU speed", about)


def check_gpu(facts: Facts, driver: Driver, environment: Mapping[str, str]) -> Line:
    """A GPU that the driver has and torch cannot use is a problem; none at all is not."""
    built, works = facts["cuda"], facts["gpus"] and "gpu_error" not in facts
    seen = ", ".join(f"{driver.gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(driver.gpus))
    about = f"driver {driver.version or 'unknown'}"
    about += f" for CUDA up to {driver.cuda}" if driver.cuda else ""
    if works:
        names = ", ".join(dict.fromkeys(facts["gpus"]))
        speeds = ", ".join(f"{kind} {v:,.0f} GFLOP/s" for kind, v in facts["gpu_gflops"].items())
        return Line("ok", "GPU", f"{len(facts['gpus'])} x {names}, {about}, {speeds}")
    if not driver.gpus:
        return Line("note", "GPU", "none, so runs are on the CPU")
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        hidden = f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']} hides it"
        return Line("note", "GPU", f"{seen}, {about}, but {hidden}", "unset CUDA_VISIBLE_DEVICES")
    reinstall = "pip install --force-reinstall torch torchvision --index-url"
    newest = int((driver.cuda or "13").split(".")[0])
    if newest < 12:
        fix = "install a newer driver, of version 525 or above"
    else:  # a build for 12.6 runs on every driver of CUDA 12
        fix = f"{reinstall} {WHEELS}/{'cu126' if newest == 12 else 'cu130'}"
    if built is None:
        why = "this torch is built without CUDA"
    elif newest < int(built.split(".")[0]):
        why = f"this torch is built for CUDA {built}, which the driver is too old for"
    elif "gpu_error" in facts:
        why = f"a product of matrices fails: {facts['gpu_error']}"
    else:
        why = "torch does not find it"
        fix = "nvidia-smi, which must list it; in a container docker run --gpus all"
    return Line("problem", "GPU", f"{seen}, {about}, cannot be used: {why}", fix)


def check_faiss(facts: Facts, gpus: int) -> Line:
    """Whether faiss, which k-NN and clustering need, can be imported and searches rightly."""
    with_gpu = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    name = "faiss-gpu" if with_gpu else "faiss-cpu"
    fix = f"pip install --force-reinstall {name}"
    if "error" in facts:
        return Line("problem", "faiss", f"cannot be used: {facts['error']}", fix)
    build = f"finds {counted(facts['gpus'], 'GPU')}" if facts["gpu_build"] else "built for CPUs"
    about = f"faiss {facts['faiss']}, {build}"
    if not facts["right"]:
        return Line("problem", "faiss", f"{about}: an exact search finds other rows", fix)
    if gpus and not facts["gpus"]:
        return Line("note", "faiss", f"{about}, so k-NN is on the CPU", fix)
    return Line("ok", "faiss", f"{about}, an exact search is right")


def check_cores(processor: str, cores: int, usable: int, quota: float | None, flags: str) -> Line:
    """Cores of the machine against those that this process may use; the instructions they have."""
    listed = [name for name in INSTRUCTIONS if name in flags.split()]
    about = f"{processor}, {cores} cores, {usable} usable"
    about += f", cgroup limit {quota:g}" if quota is not None else ""
    about += f", {' '.join(listed) or 'no vector instructions listed'}"
    if usable < cores:
        fix = "docker run --cpus=N, --cpus-per-task=N of SLURM, or taskset"
        return Line("note", "cores", about, f"for more: {fix}")
    return Line("ok", "cores", about)


def check_cpp_compiler(compiler: str, version: str | None) -> Line:
    """The C++ compiler that builds kernels for this processor; `version=None`: there is none."""
    if version is None:
        fix = "apt install g++, or name another in CXX"
        return Line(
            "note", "compiler", f"no {compiler}: training on a CPU is slower",
            fix,
        )  # fmt: skip
    return Line("ok", "compiler", f"{version}, for kernels of this processor")


def check_kernels(facts: Facts) -> Line:
    """What the kernels gain, as tried once on this machine; see `models/kernel_trial.py`."""
    reason = facts.get("error")
    if not reason and not facts["speed"]:
        reason = facts["why"][-1]
    if reason:
        return Line("note", "kernels", reason, "name another compiler in CXX")
    speed = facts["speed"]
    about = f"a block is {speed:.2f} times as fast by them as by torch alone"
    taken = "takes them" if facts["taken"] else "leaves them"
    return Line("ok", "kernels", f"{about}; compile=auto {taken}")


def check_memory(total: int, available: int, limit: int | None) -> Line:
    """Main memory, and the limit that a container or a job has."""
    most = total if limit is None else min(total, limit)
    about = f"{total / GB:.1f} GB, {available / GB:.1f} GB available"
    about += f", cgroup limit {limit / GB:.1f} GB" if limit is not None and limit < total else ""
    if min(most, available) < LITTLE_MEMORY_GB * GB:
        return Line("note", "memory", about, "lower batch_size or num_workers, or end others")
    return Line("ok", "memory", about)


def memory_here() -> tuple[int, int]:
    """Total and available bytes; zeros where the system does not tell."""
    with suppress(OSError):
        rows = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        return 1024 * int(rows["MemTotal"]), 1024 * int(rows["MemAvailable"])
    return 0, 0


def check_shared_memory(
    total: int, free: int, num_workers: int, batch_size: int, writable: bool = True
) -> Line:
    """Room in /dev/shm for the batches of crops that loader processes hand over."""
    if not writable:
        return Line("problem", "shared memory", "/dev/shm cannot be written", "num_workers=0")
    batches = 2 * num_workers + 2 if num_workers else 0  # ready; taken out and in use
    needed = batches * batch_size * BYTES_AN_IMAGE
    about = (
        f"/dev/shm has {total / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free; up to {needed / 1e6:,.0f} "
        f"MB for {counted(num_workers, 'worker')} and batch_size={batch_size}"
    )
    if free >= needed:
        return Line("ok", "shared memory", about)
    fix = "docker run --shm-size=8g or --ipc=host; else num_workers=0 or a smaller batch_size"
    return Line("problem", "shared memory", about, fix)


def shared_memory_here(path: Path = Path("/dev/shm")) -> tuple[int, int, bool] | None:
    """Total and free bytes, and whether it can be written; None: the system has none."""
    if not path.is_dir():
        return None
    room = os.statvfs(path)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    return total, free, os.access(path, os.W_OK)


def check_disk(what: str, folder: Path, fix: str) -> Line:
    """Free space and speed of the disk of a folder, made or not; `fix` is how to take another one.

    Writes a file of at most 64 MB there, flushed to the disk, and removes it.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    about = shown(folder)
    try:
        room = os.statvfs(place)
        free = room.f_bavail * room.f_frsize
        about += f": {free / GB:,.1f} of {room.f_blocks * room.f_frsize / GB:,.1f} GB free"
        write, read = disk_speed(place)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk or quota is full" if full else f"cannot be written ({error.strerror})"
        return Line(
            "problem", what, f"{about}: {why}", f"df -h {shown(place)}, {fix}" if full else fix
        )
    about += f", writes {write:,.0f} MB/s, reads {read:,.0f} MB/s"
    if free < FEW_GB * GB:
        return Line("problem", what, f"{about}: almost full", f"df -h {shown(place)}, {fix}")
    if free < LITTLE_GB * GB:
        return Line("note", what, f"{about}: room for few runs", fix)
    if min(write, read) < SLOW_MB_S:
        return Line("note", what, f"{about}: slow", fix)
    return Line("ok", what, about)


def disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing and reading a file of at most 64 MB, in at most a few seconds; raises OSError
    where it cannot be written.
    """
    chunk = os.urandom(CHUNK)
    with tempfile.TemporaryFile(dir=folder, prefix=".ssl-xcit-doctor-") as file:
        handle, chunks, start = file.fileno(), 0, time.perf_counter()
        while chunks < MOST_CHUNKS and time.perf_counter() - start < SECONDS:
            written = 0
            while written < CHUNK:
                written += os.write(handle, chunk[written:])
            os.fsync(handle)
            chunks += 1
        write = chunks * CHUNK / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        size, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS and (part := os.read(handle, CHUNK)):
            size += len(part)
        return write / 1e6, size / (time.perf_counter() - start) / 1e6


def counted(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {what}{'s' * (number != 1)}"


def shown(path: Path) -> str:
    """A path that does not tell where somebody's home is."""
    text, home = str(path), os.path.expanduser("~")
    return f"~{text[len(home) :]}" if home != "/" and f"{text}/".startswith(f"{home}/") else text


def check_working_folder(folder: Path) -> Line:
    """Whether files can be made in the folder that commands are started in."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Line("ok", "folder", f"{shown(folder)} can be written")
    except OSError as error:
        about = f"{shown(folder)} cannot be written ({error.strerror})"
        return Line("problem", "folder", about, "cd to a folder of yours")


def check_decoders(facts: Facts) -> Iterator[Line]:
    """Pillow, its plugins, simplejpeg and OpenCV, each with a small image of each format."""
    if "error" in facts:
        fix = "pip install --force-reinstall pillow simplejpeg opencv-python-headless"
        yield Line("problem", "images", f"cannot be decoded: {facts['error']}", fix)
        return
    turbo = facts["libjpeg_turbo"]
    jpeg = f"libjpeg-turbo {turbo}" if turbo else "no libjpeg-turbo"
    heif = f", pillow-heif {facts['pillow_heif']}" if facts["pillow_heif"] else ""
    for what, about, package, results in (
        ("Pillow", f"{facts['pillow']}, {jpeg}{heif}", "pillow", facts["by_pillow"]),
        ("simplejpeg", facts["simplejpeg"], "simplejpeg", facts["by_simplejpeg"]),
        ("OpenCV", facts["opencv"], "opencv-python-headless", facts["by_opencv"]),
    ):
        reinstall = f"pip install --force-reinstall {package}"
        wrong = {kind: why for kind, why in results.items() if why}
        right = " ".join(kind for kind in results if kind not in wrong)
        if wrong:
            whys = "; ".join(f"{kind}: {why}" for kind, why in wrong.items())
            yield Line("problem", what, f"{about}: {whys}", reinstall)
        elif what == "Pillow" and not turbo:
            yield Line(
                "note", what, f"{about}: {right}; JPEG in grey or CMYK is decoded slowly", reinstall
            )
        else:
            missing = [k for k in ("WEBP", "AVIF") if what == "Pillow" and k not in results]
            without = f"; without {', '.join(missing)}" if missing else ""
            state: Literal["ok", "note"] = "note" if missing else "ok"
            fix = "pip install --upgrade pillow" if missing else ""
            yield Line(state, what, f"{about}: {right} decoded{without}", fix)


def check_requirements(package: Distribution) -> Iterator[Line]:
    """What the installed package requires, and its extras, by its own metadata."""
    wrong = unmet(package.requires or [])
    if wrong:
        typed = " ".join(f"'{requirement}'" for requirement in wrong)
        found = ", ".join(f"{r} ({wrong[r] or 'not installed'})" for r in wrong)
        yield Line("problem", "requirements", found, f"pip install {typed}")
    else:
        yield Line("ok", "requirements", "all installed, in versions that fit")
    extras = [e for e in package.metadata.get_all("Provides-Extra") or [] if e != "dev"]
    missing = {extra: unmet(package.requires or [], extra) for extra in extras}
    there = ", ".join(extra for extra in extras if not missing[extra])
    yield Line("ok", "extras", f"installed: {there or 'none'}")
    for extra in extras:
        if missing[extra]:
            found = ", ".join(f"{r} ({v or 'not installed'})" for r, v in missing[extra].items())
            name = package.metadata["Name"]
            yield Line("note", f"[{extra}]", found, f"pip install '{name}[{extra}]'")


def unmet(requirements: Iterable[str], extra: str | None = None) -> dict[str, str]:
    """Requirements of the package itself, or of an extra, that are not met, and what is there."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra or ""}):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue  # the package's own
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            found[f"{requirement.name}{requirement.specifier}"] = installed
    return found


def check_wandb(environment: Mapping[str, str], home: Path) -> Line:
    """Whether a key for wandb is there; it is not shown, and nobody is asked."""
    host = re.sub(r"^\w+://|[:/].*$", "", environment.get("WANDB_BASE_URL", "api.wandb.ai"))
    known = bool(environment.get("WANDB_API_KEY"))
    for file in (environment.get("NETRC"), home / ".netrc", home / "_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            known = known or bool(file and netrc.netrc(str(file)).authenticators(host))
    if known:
        return Line("ok", "wandb", f"there is a key for {host}")
    return Line("note", "wandb", "not logged in; logger=wandb works offline", "wandb login")
