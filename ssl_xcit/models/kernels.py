"""Kernels of a training step on a CPU: passes over memory that torch takes one after another, each
fused to one in `kernels.cpp`, which the C++ compiler of the machine builds for its processor.

Products stay torch's. Without a compiler the networks run the plain forms; both are compared in
`tests/models/test_kernels.py`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.hardware import compiler_version, cpp_compiler, processor, processor_flags
from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
BAND = 512  # tokens of an image that are convolved together, about
# no -ffast-math: what is not finite has to stay so
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-fPIC", f"-DBAND={BAND}",
)  # fmt: skip
WIDTHS = (16, 32, 48, 64)  # channels of a head that there are kernels for
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Kernels:
    """The functions of a built file; tensors are given as they are, `None` as a null pointer."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.functions: dict[tuple[str, torch.dtype], Any] = {}

    def __call__(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Run a kernel for values of this type; integers are 64 bits, floats 32. Fake tensors, by
        which `plan=true` computes the memory of a step, have nothing to run it on.
        """
        if any(isinstance(argument, FakeTensor) for argument in arguments):
            return
        function = self.functions.get((name, dtype))
        if function is None:
            address = ctypes.c_void_p.in_dll(self.library, f"{name}_{NAMES[dtype]}").value
            assert address is not None
            types = (argument_type(argument) for argument in arguments)
            function = ctypes.CFUNCTYPE(None, *types)(address)
            self.functions[name, dtype] = function
        function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def argument_type(argument: object) -> Any:
    """C's type of an argument; it is the same at every call of a kernel."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_float


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this processor, built at the first call on a machine (seconds) and kept in
    the user's cache folder; None, with a line that says why, where they cannot be built.
    """
    compiler, is_there = cpp_compiler()
    if not is_there:
        log.warning(
            "no C++ compiler (%s), so networks run on this CPU by the slower plain forms: install "
            "one (Debian: apt install g++), or name another in CXX", compiler[0],
        )  # fmt: skip
        return None
    try:
        return loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", None) or error).strip() or type(error).__name__
        log.warning(
            "%s did not build the kernels for this processor, so networks run by the slower plain "
            "forms: %s", compiler[0], output.splitlines()[0],
        )  # fmt: skip
        return None


def loaded(compiler: list[str]) -> Kernels:
    """The kernels of this source, compiler and processor, from the cache or built."""
    flags = list(FLAGS)
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append("-mprefer-vector-width=512")
    about = compiler_version(compiler), processor(), processor_flags()
    what = (SOURCE.read_bytes(), *flags, *compiler, *about)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = cache_folder() / f"{digest}.so"
    with suppress(OSError):  # not there yet, or cut short
        return Kernels(path)
    return built(compiler, flags, path)


def cache_folder() -> Path:
    """Where built kernels stay: a folder that is the user's own, or else a new one."""
    for folder in (default_cache(), Path(tempfile.gettempdir()) / f"ssl_xcit-{os.getuid()}"):
        with suppress(OSError):
            inner = folder / "kernels"
            inner.mkdir(parents=True, exist_ok=True, mode=0o700)
            owners = {inner.stat().st_uid, folder.stat().st_uid}
            if owners == {os.getuid()} and os.access(inner, os.W_OK):
                return inner
    return Path(tempfile.mkdtemp(prefix="ssl_xcit-"))


def built(compiler: list[str], flags: list[str], path: Path) -> Kernels:
    """Build the kernels, and put the file in its place."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # linked without -fopenmp: threads are those of the OpenMP that torch has loaded
        for words in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)],
            [*compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(words, check=True, capture_output=True, text=True)
        loaded = Kernels(linked)
        linked.replace(path)  # at once: other processes may be building it, too
        loaded.path = path
    seconds = time.perf_counter() - started
    say(f"kernels built for this processor in {seconds:.0f} s, once on this machine: {path}")
    return loaded
