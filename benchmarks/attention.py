"""Attention maps of one large photograph: seconds, and memory at the peak.

    python benchmarks/attention.py [--model xcit_small_12_p16] [--side 1024] [--rounds 3]

The built-in photograph flower.jpg, enlarged and cut to a square. Timed: class attention of both
blocks and the patch features (`look`), the same with the channels' matrices (`watched`), and the
pictures of all heads drawn in memory. The memory of the whole process counts, with torch and the
weights. Writes benchmarks/results/attention.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import extra_memory, save, status

from ssl_xcit import create_model
from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import Pixels, normalise
from ssl_xcit.eval.tasks.masks import resize_image
from ssl_xcit.eval.viz import attention, channels, pictures


def photograph(side: int) -> Pixels:
    pixels = read_image(dict(photographs())["flower"])
    least = min(pixels.shape[:2])
    return resize_image(pixels[:least, :least], side, side)


def seconds(work: Callable[[], object]) -> list[float]:
    """Each of some rounds, the first of all being the one that a person waits for."""
    found = []
    for _ in range(ARGS.rounds):
        start = time.perf_counter()
        work()
        found.append(round(time.perf_counter() - start, 3))
    return found


def main() -> None:
    backbone = create_model(ARGS.model).eval()
    pixels = photograph(ARGS.side)
    x = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], RGB)

    def maps() -> attention.AttentionPass:
        with torch.inference_mode():
            return attention.forward(backbone, x)

    def matrices() -> None:
        with torch.inference_mode(), channels.recorded(backbone):
            attention.forward(backbone, x)

    results = {}
    for name, work in (("attention", maps), ("attention and channels", matrices)):
        first, *others = seconds(work)
        extra = extra_memory(work) / 2**20
        peak = status("VmHWM") / 2**20
        results[f"{ARGS.model}, {ARGS.side} px, {name}"] = {
            "first_seconds": first,
            "seconds": statistics.median(others or [first]),
            "extra_mb": round(extra),
            "peak_mb": round(peak),
        }
        print(
            f"{name}: first {first:.2f} s, then {statistics.median(others or [first]):.2f} s, "
            f"{extra:.0f} MB more, {peak:.0f} MB at the peak"
        )
    picture, heads = pictures.visible(pixels), maps().attention[0, -1]
    drawing = seconds(lambda: list(attention.attention_pictures(picture, heads, 0.6, 0.65)))
    print(f"drawing {2 * len(heads) + 2} pictures: {min(drawing):.2f} s")
    results[f"{ARGS.model}, {ARGS.side} px, drawing"] = {"seconds": min(drawing)}
    save("attention", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="xcit_small_12_p16")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    ARGS = parser.parse_args()
    torch.manual_seed(0)
    main()
