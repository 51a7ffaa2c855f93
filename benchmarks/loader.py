"""Crops per CPU second, where the time goes, memory of a worker, reading from files and shards.

    python benchmarks/loader.py [--rounds 15] [--entries 1000,10000,100000] [--only crops,...]

Parts: `crops` (our fused multi-crop against Pillow and torchvision, the same JPEGs, interleaved in
one process on one thread), `decoders` (of the same JPEGs), `demo` (the crops of `ssl-xcit pretrain`
itself), `resize` (one box, three ways), `small` (CIFAR-size arrays), `memory` (private memory of
one loader process), `reading` (files and tar shards), `index` (folders of links, by size). Prints
medians and ratios and writes benchmarks/results/loader.json.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from ssl_xcit.data import folders, fused
from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.multicrop import MultiCrop, TorchvisionMultiCrop
from ssl_xcit.data.photos import photographs, photos
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.sets import Arrays
from ssl_xcit.data.shards import tar_shards
from ssl_xcit.data.sources import Files, Source
from ssl_xcit.training.datamodule import multi_crop_data
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.utils.validation import parse

WIDTH, HEIGHT, QUALITY = 500, 375, 95


def jpegs(count: int) -> list[bytes]:
    """Parts of the built-in photographs, 500 x 375 pixels at quality 95."""
    rng, found = np.random.default_rng(0), []
    images = [decode(path.read_bytes()) for _, path in photographs()]
    large = [i for i in images if i.shape[0] >= HEIGHT and i.shape[1] >= WIDTH]
    for n in range(count):
        image = large[n % len(large)]
        scale = rng.uniform(1.0, min(image.shape[0] / HEIGHT, image.shape[1] / WIDTH))
        h, w = int(HEIGHT * scale), int(WIDTH * scale)
        top, left = rng.integers(image.shape[0] - h + 1), rng.integers(image.shape[1] - w + 1)
        part = cv2.resize(image[top : top + h, left : left + w], (WIDTH, HEIGHT), interpolation=3)
        out = io.BytesIO()
        Image.fromarray(part).save(out, "JPEG", quality=QUALITY)
        found.append(out.getvalue())
    return found


def seconds(work: Callable[[], Any]) -> float:
    """Of this process's CPU."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], images: int) -> dict[str, Any]:
    """Interleaved rounds; milliseconds an image and the ratio of each round's pair."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(ARGS.rounds)]
    ratios = [b / a for a, b in pairs]
    return {
        "ours_ms": statistics.median(a for a, _ in pairs) / images * 1e3,
        "usual_ms": statistics.median(b for _, b in pairs) / images * 1e3,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def said(name: str, found: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{name}: ours {found['ours_ms']:.2f} ms an image, usual {found['usual_ms']:.2f} ms, "
        f"ratio {found['ratio']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"
    )
    return found


def crops() -> dict[str, Any]:
    """From the encoded image to uint8 crops; the usual way once more with float normalisation of
    every crop in the worker, as it is mostly done.
    """
    images = jpegs(20)
    ours, theirs = FusedMultiCrop(), TorchvisionMultiCrop()
    normalise = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(RGB.mean, RGB.std)]
    )

    def run(augment: MultiCrop, finish: Callable[[np.ndarray], Any] = id) -> None:
        for seed, content in enumerate(images):
            for part in augment(open_picture(content), seed):
                for crop in part:
                    finish(crop)

    name = f"2 x 224 + 8 x 96 of a {WIDTH} x {HEIGHT} JPEG"
    return {
        "uint8": said(name, compare(lambda: run(ours), lambda: run(theirs), len(images))),
        "normalised": said(
            f"{name}, usual way with normalised floats",
            compare(lambda: run(ours), lambda: run(theirs, normalise), len(images)),
        ),
        "shares": shares(images),
    }


def shares(images: list[bytes]) -> dict[str, float]:
    """Milliseconds an image of each part of the fused crops, and what the rest is."""
    augment, spent = FusedMultiCrop(), dict.fromkeys(("decode", "draw", "resize", "colour"), 0.0)
    spent["flip, blur, solarise"] = 0.0
    sizes = [augment.global_size] * 2 + [augment.local_size] * augment.num_local

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent[name] += time.process_time() - start

    rounds = max(1, ARGS.rounds // 3)
    for _ in range(rounds):
        for seed, content in enumerate(images):
            with part("decode"):
                pixels = open_picture(content).pixels()
            with part("draw"):
                views = augment.draw(HEIGHT, WIDTH, seed)
                boxes = fused.rescaled(views.boxes, (HEIGHT, WIDTH), pixels.shape[:2])
            with part("resize"):
                cut = [fused.cut(pixels, b, s) for b, s in zip(boxes.tolist(), sizes, strict=True)]
            with part("colour"):
                cut = fused.recolour(cut, views)
            with part("flip, blur, solarise"):
                for i, crop in enumerate(cut):
                    fused.finish(crop, views, i)
    found = {name: value / rounds / len(images) * 1e3 for name, value in spent.items()}
    total = sum(found.values())
    print("  " + ", ".join(f"{n} {v:.2f} ms ({v / total:.0%})" for n, v in found.items()))
    return found


def demo() -> dict[str, Any]:
    """The crops of `ssl-xcit pretrain` without further words, from its photographs on disk."""
    composed = []
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        for words in (["experiment=photos"], ["experiment=photos", "augment=torchvision"]):
            settings = parse(PretrainSettings, compose("pretrain", words))
            composed.append(instantiate(settings.augment))
    source = photos()
    places = np.linspace(0, len(source) - 1, 40).astype(int).tolist()

    def run(augment: MultiCrop) -> None:
        for seed, place in enumerate(places):
            augment(open_picture(source.read(place)), seed)

    found = compare(lambda: run(composed[0]), lambda: run(composed[1]), len(places))
    return said("the demo's crops of its photographs", found)


def decoders() -> dict[str, float]:
    """Milliseconds an image, to an array of pixels, which are the same for all."""
    images = jpegs(20)
    rgb = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    ways: dict[str, Callable[[bytes], Any]] = {
        "ours, Pillow and simplejpeg": decode,
        "Pillow": lambda content: np.asarray(Image.open(io.BytesIO(content))),
        "OpenCV": lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), rgb),
        "torchvision": lambda content: (
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            .permute(1, 2, 0)
            .numpy()
        ),
    }
    assert all(np.array_equal(way(images[0]), decode(images[0])) for way in ways.values())
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ARGS.rounds):
        for name, way in ways.items():
            spent[name].append(seconds(lambda way=way: [way(content) for content in images]))
    found = {name: statistics.median(times) / len(images) * 1e3 for name, times in spent.items()}
    print("decoding: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()))
    return found


def resize() -> dict[str, float]:
    """Milliseconds from a box of 300 x 400 to 224 x 224, three ways, interleaved."""
    image = decode(jpegs(1)[0])
    box = np.ascontiguousarray(image[:300, :400])
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: fused.cut(image, (0, 0, 300, 400), 224),
        "OpenCV by area": lambda: cv2.resize(box, (224, 224), interpolation=cv2.INTER_AREA),
        "Pillow": lambda: Image.fromarray(box).resize((224, 224), Image.Resampling.BICUBIC),
    }
    times = {name: [seconds(way) for _ in range(20)] for name, way in ways.items()}  # warm
    for _ in range(20 * ARGS.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    found = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    print("300 x 400 to 224: " + ", ".join(f"{n} {v:.2f} ms" for n, v in found.items()))
    return found


def small() -> dict[str, Any]:
    """CIFAR-size arrays: 2 x 32 + 8 x 16 of 32 x 32 pixels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 8, 8, 3), np.uint8)
    images = [cv2.resize(i, (32, 32), interpolation=cv2.INTER_CUBIC) for i in images]
    sides = [augment(32, 16, 8) for augment in (FusedMultiCrop, TorchvisionMultiCrop)]

    def run(augment: MultiCrop) -> None:
        for seed, image in enumerate(images):
            augment(open_picture(image), seed)

    found = compare(lambda: run(sides[0]), lambda: run(sides[1]), len(images))
    return said("2 x 32 + 8 x 16 of a 32 x 32 array", found)


def private_megabytes(pid: int) -> float:
    """Memory that this process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def memory() -> dict[str, float]:
    """Largest private memory of one loader process over 40 batches of 32."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), jpegs(200))
        for name, augment in (("ours", FusedMultiCrop()), ("usual", TorchvisionMultiCrop())):
            source = folders.folder(folder)
            data = multi_crop_data(source, augment, 32, 12, 0, RGB, num_workers=1)
            peak = 0.0
            for _ in data.train_dataloader():
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                with contextlib.suppress(OSError):
                    peak = max(peak, *(private_megabytes(int(pid)) for pid in children))
            found[name] = peak
    print(f"private memory of a loader process: {found['ours']:.0f} MB, usual {found['usual']:.0f}")
    return found


def write_files(folder: Path, images: list[bytes]) -> None:
    for i, content in enumerate(images):
        (folder / f"{i:06d}.jpg").write_bytes(content)


def read_all(source: Source) -> float:
    """Microseconds an image, in a random order."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    start = time.perf_counter()
    for index in order:
        source.read(index)
    return (time.perf_counter() - start) / len(source) * 1e6


def reading() -> dict[str, Any]:
    """The same images as files, as shards and as an array, from memory; and crops of the shards."""
    with tempfile.TemporaryDirectory() as folder:
        files, shards = Path(folder) / "files", Path(folder) / "shards"
        files.mkdir()
        write_files(files, jpegs(500))
        command = ["shard", f"data.root={files}", f"out={shards}", "images_per_shard=100"]
        subprocess.run(
            [sys.executable, "-c", "from ssl_xcit.cli import main; main()", *command],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        tar, plain = tar_shards(str(shards)), folders.folder(str(files))
        array = Arrays(np.stack([decode(plain.read(i)) for i in range(100)]), "array")
        assert tar is not None
        sources: dict[str, Source] = {"files": plain, "tar shards": tar, "arrays": array}
        found = {
            name: statistics.median(read_all(source) for _ in range(5))
            for name, source in sources.items()
        }
        print("reading, warm: " + ", ".join(f"{n} {v:.0f} us an image" for n, v in found.items()))
        sides = FusedMultiCrop(), TorchvisionMultiCrop()

        def run(augment: MultiCrop) -> None:
            for i in range(20):
                augment(open_picture(tar.read(i)), i)

        ratio = compare(lambda: run(sides[0]), lambda: run(sides[1]), 20)
        return {**found, "crops": said("crops from tar shards", ratio)}


def index() -> dict[str, Any]:
    """Folders of links to one image, 1,000 a folder: listing, listing again, memory, reading."""
    found = {}
    content = jpegs(1)[0]
    for count in map(int, ARGS.entries.split(",")):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            for start in range(0, count, 1000):
                inside = Path(folder) / f"n{start:08d}"
                inside.mkdir()
                first = inside / f"n{start:08d}_{0:06d}.JPEG"
                first.write_bytes(content)
                for i in range(start + 1, min(start + 1000, count)):
                    os.link(first, inside / f"n{start:08d}_{i:06d}.JPEG")
            time.sleep(2.1)  # a fresher listing is not trusted
            times = []
            for _ in range(3):
                start_time = time.perf_counter()
                source = folders.folder(folder)
                times.append(time.perf_counter() - start_time)
            assert len(source) == count
            assert isinstance(source, Files)
            megabytes = (source.paths.content.nbytes + source.paths.ends.nbytes) / 1e6
            places = np.random.default_rng(0).integers(0, count, 2000).tolist()
            began = time.perf_counter()
            for place in places:
                source.read(place)
            read = (time.perf_counter() - began) / len(places) * 1e6
        found[count] = {
            "list_s": times[0], "again_s": min(times[1:]), "index_mb": megabytes, "read_us": read,
        }  # fmt: skip
        print(
            f"{count:,} files: listed in {times[0]:.2f} s, again in {min(times[1:]):.3f} s, index "
            f"{megabytes:.1f} MB, {read:.0f} us to read one"
        )
    return found


PARTS = {
    "crops": crops, "decoders": decoders, "demo": demo, "resize": resize, "small": small,
    "memory": memory, "reading": reading, "index": index,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--entries", default="1000,10000,100000")
    parser.add_argument("--only", default=",".join(PARTS))
    ARGS = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    results = {name: PARTS[name]() for name in ARGS.only.split(",")}
    out = Path(__file__).parent / "results" / "loader.json"
    out.parent.mkdir(exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**kept, **results}, indent=2) + "\n")
    print(f"written: {out}")
