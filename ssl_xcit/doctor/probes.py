"""What native libraries can do, each asked in a process of its own: one that is broken may end the
interpreter instead of raising.
"""

import io
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

SIDE = 512  # of the matrices that are multiplied
TIMEOUT = 120  # seconds for a library that hangs
Facts = Mapping[str, Any]


def ask(name: str) -> Facts:
    """The facts of `PROBES[name]`, or {"error": why there are none}."""
    code = f"import sys; sys.path[:] = {sys.path!r}\nfrom ssl_xcit.doctor import probes\n"
    command = [sys.executable, "-c", f"{code}probes.answer({name!r})"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {TIMEOUT} s"}
    if done.returncode < 0:
        return {"error": f"ended the interpreter with {signal.Signals(-done.returncode).name}"}
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        complaints = done.stderr.decode(errors="replace").strip().splitlines()
        return {"error": complaints[-1] if complaints else f"exit code {done.returncode}"}
    facts: Facts = json.loads(lines[-1])
    return facts


def answer(name: str) -> None:
    """Write the facts, or the error, to standard output as a line of JSON."""
    try:
        facts = PROBES[name]()
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    sys.stdout.write(f"\n{json.dumps(facts)}\n")


def torch_facts() -> Facts:
    """Builds of torch, torchvision and lightning, the GPUs that torch can use, and its speed."""
    from importlib.metadata import version

    import torch

    from ssl_xcit.utils.hardware import has_bfloat16

    facts = {
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "lightning": version("lightning"),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "bfloat16": has_bfloat16(on_cpu=True),
        "cpu_gflops": {kind: gflops("cpu", kind) for kind in ("float32", "bfloat16")},
    }
    if torch.cuda.is_available():
        try:
            speeds = {kind: gflops("cuda", kind) for kind in ("float32", "bfloat16")}
            return facts | {"gpu_gflops": speeds}
        except RuntimeError as error:
            return facts | {"gpu_error": str(error).splitlines()[0]}
    return facts


def gflops(device: str, kind: str) -> float:
    """Thousands of millions of operations a second in the fastest of some products of matrices."""
    import torch

    side = SIDE if device == "cpu" else 8 * SIDE
    a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, kind))
    best, end = float("inf"), time.perf_counter() + 0.3
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for a GPU
        best = min(best, time.perf_counter() - start)
    return round(2 * side**3 / best / 1e9, 1)


def faiss_facts() -> Facts:
    """Version and GPUs of faiss, and whether its exact search finds what numpy finds."""
    from contextlib import suppress

    import numpy as np

    with suppress(Exception):
        import torch  # noqa: F401  # first, as in a run: two OpenMP libraries may not go together
    import faiss

    bank = np.random.default_rng(0).standard_normal((300, 32), dtype=np.float32)
    _, found = faiss.knn(bank[:50], bank, 5, metric=faiss.METRIC_INNER_PRODUCT)
    expected = np.argsort(-(bank[:50] @ bank.T), axis=1)[:, :5]
    return {
        "faiss": faiss.__version__,
        "gpu_build": hasattr(faiss, "StandardGpuResources"),
        "gpus": faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0,
        "right": bool((found == expected).all()),
    }


def decoder_facts() -> Facts:
    """Versions of the image libraries, and what becomes of a small image in each format."""
    from importlib.metadata import version

    import cv2
    import numpy as np
    import PIL
    import simplejpeg
    from PIL import Image, features

    x, y = np.meshgrid(np.arange(32), np.arange(32))
    pixels = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=2).astype(np.uint8)

    def by_pillow(kind: str) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return np.asarray(Image.open(file).convert("RGB"))

    def by_opencv(ending: str) -> np.ndarray:
        image = cv2.imdecode(cv2.imencode(ending, pixels)[1], cv2.IMREAD_UNCHANGED)
        return np.zeros_like(pixels) if image is None else image

    def by_simplejpeg(kind: str) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        decoded = simplejpeg.decode_jpeg(file.getvalue(), "RGB")
        if not np.array_equal(decoded, np.asarray(Image.open(file))):
            raise ValueError("other pixels than Pillow's")
        return decoded

    def result(decode: Callable[[str], np.ndarray], kind: str) -> str:
        try:
            difference = np.abs(decode(kind).astype(int) - pixels).mean()
        except Exception as error:  # Pillow, its plugins and OpenCV raise many types
            return f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return "" if difference < 8 else f"decoded to other pixels, by {difference:.0f} of 255"

    kinds = ["JPEG", "PNG", "TIFF", *(["WEBP"] if features.check("webp") else [])]
    if features.check("avif"):
        kinds.append("AVIF")
    heif = None
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        heif = pillow_heif.__version__
        kinds.append("HEIF")
    except ImportError:
        pass
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "simplejpeg": version("simplejpeg"),
        "opencv": cv2.__version__,
        "pillow_heif": heif,
        "by_pillow": {kind: result(by_pillow, kind) for kind in kinds},
        "by_simplejpeg": {"JPEG": result(by_simplejpeg, "JPEG")},
        "by_opencv": {ending[1:].upper(): result(by_opencv, ending) for ending in (".jpg", ".png")},
    }


def kernel_facts() -> Facts:
    """How many times as fast kernels are here, and whether that is enough to take them."""
    from ssl_xcit.models.kernel_trial import kernel_speed, kernels_are_faster

    why: list[str] = []

    class Reasons(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            why.append(record.getMessage())

    logging.getLogger("ssl_xcit").addHandler(Reasons())
    return {"speed": kernel_speed(), "taken": kernels_are_faster(), "why": why}


PROBES: dict[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "kernels": kernel_facts,
    "faiss": faiss_facts,
    "decoders": decoder_facts,
}
