"""Damaged files, other ones each time: `python tests/data/test_fuzz.py COUNT SEED` repeats them."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import tifffile
from PIL import Image
from samples import channels, encoded, saved

from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess


def test_damaged_files_are_bad_images_and_nothing_else():
    seed = os.environ.get("FUZZ_SEED") or str(time.time_ns() % 10**9)
    print(f"FUZZ_SEED={seed}")
    command = [sys.executable, __file__, "2000", seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"FUZZ_SEED={seed}: exit {done.returncode}: {done.stderr[-2000:]}"
    words = re.search(r"(\d+) files, (\d+) .*, (\d+) bad", done.stdout)
    count, good, bad = map(int, words.groups())
    assert count == good + bad == 2000
    assert bad > 500
    assert good > 100


def seeds():
    """(content, preprocessing) of every format."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((90, 70))
    for kind, image, options in (
        ("JPEG", smooth, {"quality": 90}), ("JPEG", smooth.convert("CMYK"), {}),
        ("JPEG", smooth, {"progressive": True}), ("PNG", smooth, {}),
        ("PNG", smooth.convert("RGBA"), {}), ("PNG", smooth.quantize(16), {}),
        ("GIF", smooth.quantize(16), {}), ("BMP", smooth, {}), ("WEBP", smooth, {}),
        ("WEBP", smooth, {"lossless": True}), ("TIFF", smooth, {}),
        ("TIFF", smooth, {"compression": "tiff_lzw"}), ("PPM", smooth, {}),
        ("PNG", rng.integers(0, 65536, (40, 50), np.uint16), {}), ("JPEG2000", smooth, {}),
    ):  # fmt: skip
        yield encoded(image, kind, **options), Preprocess()
    array = rng.integers(0, 256, (40, 50, 5), np.uint8)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    yield saved(tifffile.imwrite, array, **options), channels(5)
    yield saved(np.save, array), channels(5)


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
