"""Decode damaged copies of images: each is an image or a BadImage, and the process lives.

Run by test_fuzz.py in a process of its own: `python tests/data/fuzz.py COUNT SEED`.
"""

import io
import sys

import numpy as np
import tifffile
from PIL import Image

from ssl_xcit.data.decode import BadImage, open_picture
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.preprocess import Preprocess


def seeds():
    """(content, preprocessing) of every format."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((90, 70))
    kinds = [
        ("JPEG", smooth, {"quality": 90}), ("JPEG", smooth.convert("CMYK"), {}),
        ("JPEG", smooth, {"progressive": True}), ("PNG", smooth, {}),
        ("PNG", smooth.convert("RGBA"), {}), ("PNG", smooth.quantize(16), {}),
        ("GIF", smooth.quantize(16), {}), ("BMP", smooth, {}), ("WEBP", smooth, {}),
        ("WEBP", smooth, {"lossless": True}), ("TIFF", smooth, {}),
        ("TIFF", smooth, {"compression": "tiff_lzw"}), ("PPM", smooth, {}),
        ("PNG", Image.fromarray(rng.integers(0, 65536, (40, 50), np.uint16)), {}),
        ("JPEG2000", smooth, {}),
    ]  # fmt: skip
    for kind, image, options in kinds:
        out = io.BytesIO()
        image.save(out, kind, **options)
        yield out.getvalue(), Preprocess()
    five = Preprocess(5, (0.5,) * 5, (0.2,) * 5)
    array = rng.integers(0, 256, (40, 50, 5), np.uint8)
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric="minisblack", planarconfig="contig")
    yield out.getvalue(), five
    out = io.BytesIO()
    np.save(out, array)
    yield out.getvalue(), five


def damaged(content, rng):
    """Cut short, bits flipped, a stretch overwritten, or all of it."""
    changed = bytearray(content)
    kind = rng.integers(4)
    if kind in (0, 3):
        del changed[int(rng.integers(len(changed))) :]
    if kind in (1, 3) and changed:
        for _ in range(int(rng.integers(1, 20))):
            # half of them in the header, where they hurt
            end = min(len(changed), 64) if rng.random() < 0.5 else len(changed)
            changed[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    if kind == 2:
        start = int(rng.integers(len(changed)))
        stretch = rng.bytes(int(rng.integers(1, 64)))
        changed[start : start + len(stretch)] = stretch
    return bytes(changed)


def main(count, seed):
    rng, whole, augment = np.random.default_rng(seed), list(seeds()), FusedMultiCrop(32, 16, 2)
    good = bad = 0
    for i in range(count):
        content, preprocess = whole[i % len(whole)]
        changed = damaged(content, rng)
        try:
            large, _ = augment(open_picture(changed, preprocess), i)
            assert large.shape == (2, 32, 32, preprocess.channels)
            good += 1
        except BadImage:
            bad += 1
    print(f"seed {seed}: {count} files, {good} still images, {bad} bad")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
