"""Files that the tests of sources read."""

import io
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def photo(seed, size=12, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def put(path, content=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(seed) if content is None else content)


def classes(root, names, count, seed=0):
    for c, name in enumerate(names):
        for i in range(count):
            put(root / name / f"{i}.png", seed=seed + 100 * c + i)


def logged(caplog):
    return [record.getMessage() for record in caplog.records]


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def gradient_image(height=90, width=120):
    """Red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels


def peak_memory(content, use):
    """KiB that using an encoded image takes beyond what a process that has read it needs."""
    code = f"""
import resource, sys
from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.preprocess import resize_center_crop
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{use}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, input=content, check=True, capture_output=True).stdout)
