"""Files that the tests of sources read."""

import io
import struct
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import putchunk

from ssl_xcit.data.preprocess import Preprocess

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)
SMALL = {"global_size": 32, "local_size": 16, "num_local": 3}
PLAIN = {
    "jitter_prob": 0.0, "grey_prob": 0.0, "blur_prob": [0, 0, 0], "solarise_prob": [0, 0, 0],
}  # fmt: skip


def channels(count, **options):
    return Preprocess(count, (0.5,) * count, (0.2,) * count, **options)


def saved(write, *args, **options):
    """What a function writes to a file."""
    out = io.BytesIO()
    write(out, *args, **options)
    return out.getvalue()


def encoded(image, kind="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return saved(image.save, kind, **options)


def png_of_chunks(header, *chunks):
    """(width, height, bits, kind of colours), then (name, content)."""
    out = io.BytesIO()
    out.write(b"\x89PNG\r\n\x1a\n")
    for name, content in ((b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), *chunks):
        putchunk(out, name, content)
    return out.getvalue()


def photo(seed, size=12, kind="PNG"):
    return encoded(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8), kind)


def put(path, content=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(seed) if content is None else content)
    return path


def put_all(root, names):
    for name in names:
        put(root / name)


def classes(root, names, count, seed=0):
    for c, name in enumerate(names):
        for i in range(count):
            put(root / name / f"{i}.png", seed=seed + 100 * c + i)


def logged(caplog):
    return [record.getMessage() for record in caplog.records]


def tar(path, members, **options):
    """A tar of (name, content), perhaps with further fields of tarfile.TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, content, *fields in members:
            info = tarfile.TarInfo(name)
            for field, value in dict({"size": len(content)}, **dict(*fields)).items():
                setattr(info, field, value)
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
from ssl_xcit.data.decode import decode
from ssl_xcit.data.preprocess import resize_center_crop
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{use}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, input=content, check=True, capture_output=True).stdout)
