"""Features of a folder of JPEGs against the forward pass alone of the same images, interleaved.

    python benchmarks/features.py [--models nano_12_p16:1024,small_12_p16:256] [--rounds 7]

So many images of 500 x 375 pixels are read, decoded and cut to 224 x 224 by the loader, as in
`ssl-xcit eval` and `embed`, while the network computes; alone, the network gets the same batches
from memory. `loader`: reading without a network. Where both work on the same cores, the folder
cannot reach more than the share printed as `at most`: the seconds of cores that the forward pass
takes over those that both take. Writes benchmarks/results/features.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loader import jpegs
from measure import compared, interleaved, line, save

from ssl_xcit import create_model
from ssl_xcit.data.crop_dataset import plain_loader
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import Files
from ssl_xcit.eval.features.extract import batches, forward_parts
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.devices import keep_memory, prepare_cpu

RESIZE, SIZE, BATCH = 256, 224, 32


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measured(name: str, source: Files, rounds: int) -> dict[str, object]:
    """Seconds of the folder and of the forward pass alone, and what bounds the ratio."""
    backbone = create_model(f"xcit_{name}").eval()
    prepare_cpu(backbone)
    extractor = FeatureExtractor(backbone, batch_size=BATCH)
    preprocess = extractor.preprocess

    def loader(workers: int = extractor.workers) -> list[torch.Tensor]:
        parts = plain_loader(source, RESIZE, SIZE, BATCH, workers, preprocess)
        return [pixels for pixels, _ in parts]

    resident = loader()
    reading = cpu_seconds(lambda: loader(0))

    def alone() -> None:
        for pixels in resident:
            forward_parts(backbone, normalise(pixels, preprocess), ["cls"])

    def folder() -> None:
        for _ in batches(extractor, source, RESIZE, SIZE):
            pass

    sides = {"folder": folder, "alone": alone, "loader": loader}
    seconds = interleaved(sides, rounds)
    # a share: what the forward pass alone takes over what the folder takes
    found = compared({side: seconds[side] for side in ("folder", "alone")}, "folder", "alone")
    found["seconds"]["loader"] = sorted(seconds["loader"])[rounds // 2]
    forward = cpu_seconds(alone)
    found["at_most"] = round(forward / (forward + reading), 3)
    found["images"] = len(source)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="nano_12_p16:1024,small_12_p16:256")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        contents = jpegs(64)
        for model in args.models.split(","):
            name, count = model.split(":")
            paths = [f"{n:05}.jpg" for n in range(int(count))]
            for n, path in enumerate(paths):
                (Path(folder) / path).write_bytes(contents[n % len(contents)])
            found = measured(name, Files(paths, folder), args.rounds)
            title = f"{name}, {count} images"
            print(f"{title}: {line(found)}; at most {found['at_most']:.2f}", flush=True)
            results[title] = found
    save("features", results)


if __name__ == "__main__":
    main()
