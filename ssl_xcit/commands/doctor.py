"""The command `doctor`: what of this machine a run can use, and what to type where it cannot."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import ssl_xcit
from ssl_xcit.doctor import checks
from ssl_xcit.doctor.probes import ask
from ssl_xcit.errors import RunFailed
from ssl_xcit.utils import hardware
from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Text, Workers


@dataclass(frozen=True)
class DoctorSettings:
    """`conf/doctor.yaml`."""

    main: str
    out: Text
    batch_size: Count
    num_workers: Workers


def main(settings: DoctorSettings) -> None:
    """`ssl-xcit doctor`: print a line for each part.

    Raises:
        RunFailed: one of them is a problem.
    """
    problems = []
    for line in examine(settings):
        say(str(line))
        if line.state == "problem":
            problems.append(line.what)
    if problems:
        raise RunFailed(f"{len(problems)} of these are problems: {', '.join(problems)}")


def examine(settings: DoctorSettings) -> Iterator[checks.Line]:
    """All lines, those that take longest last."""
    home = Path(os.path.expanduser("~"))
    usable, cores = hardware.usable_cores(), os.cpu_count() or 1
    workers = settings.num_workers
    workers = hardware.default_workers() if workers is None else workers
    driver = checks.driver_here()
    yield checks.about_package(ssl_xcit.__version__, Path(ssl_xcit.__file__).parents[1])
    flags = hardware.processor_flags()
    yield checks.check_cores(hardware.processor(), cores, usable, hardware.cpu_quota(), flags)
    compiler, is_there = hardware.cpp_compiler()
    version = hardware.compiler_version(compiler) if is_there else None
    yield checks.check_cpp_compiler(compiler[0], version)
    yield checks.check_memory(*checks.memory_here(), hardware.memory_limit())
    if (shared := checks.shared_memory_here()) is not None:
        total, free, writable = shared
        yield checks.check_shared_memory(total, free, workers, settings.batch_size, writable)
    yield checks.check_working_folder(Path.cwd())
    yield checks.check_wandb(os.environ, home)
    yield from checks.check_requirements(distribution("ssl-xcit"))
    torch = ask("torch")  # by itself, for it measures the processor's speed
    yield from checks.check_torch(torch, driver, os.environ)
    if is_there:
        yield checks.check_kernels(ask("kernels"))
    out = Path(str(settings.out)).expanduser()
    yield checks.check_disk("runs", out, "out=DIR for another place")
    cache = default_cache()
    yield checks.check_disk("cache", cache, "export XDG_CACHE_HOME=DIR for another place")
    with ThreadPoolExecutor() as pool:
        faiss, decoders = pool.map(ask, ("faiss", "decoders"))
    yield checks.check_faiss(faiss, len(torch.get("gpus", [])))
    yield from checks.check_decoders(decoders)
