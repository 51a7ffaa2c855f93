"""What the ImageNet recipes cost: operations of a DINO step an image, counted on tensors without
memory, and hours of a machine that is named. An estimate, not a measurement.

    python benchmarks/recipes.py
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.xcit import SIZES, create_model

IMAGES = 1_281_167
GPUS, PEAK, SHARE = 8, 312e12, 0.35  # A100, bfloat16, of which so much is reached
LOCALS = {"xcit_medium_24_p8": 6}  # of 96 pixels; others 8
K = 65_536


def flops_an_image(name: str) -> float:
    """Of student forward and backward on all crops and teacher forward on the global ones."""
    with torch.device("meta"):
        student, teacher = create_model(name), create_model(name)
        heads = [DINOHead(student.embed_dim, K) for _ in range(2)]
        for part in (teacher, heads[1]):
            part.requires_grad_(False)
        crops = ((2, 224), (LOCALS.get(name, 8), 96))
        views = [torch.empty(count, 3, side, side) for count, side in crops]
        with FlopCounterMode(display=False) as counter:
            heads[1](teacher(views[0]))
            heads[0](torch.cat([student(v) for v in views])).sum().backward()  # the loss is cheap
    return float(counter.get_total_flops())


def hours(name: str, epochs: int) -> float:
    """On the machine above."""
    return flops_an_image(name) * IMAGES * epochs / (GPUS * PEAK * SHARE) / 3600


def row(size: str, patch: int, epochs: int = 300) -> str:
    """A line of the table."""
    name = f"xcit_{size}_p{patch}"
    flops = flops_an_image(name)
    return f"| {name} | {flops / 1e9:.0f} | {hours(name, epochs):.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    print(f"{GPUS} A100 at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, 300 epochs of ImageNet-1k:\n")
    print("| model | GFLOP an image | hours, estimated |\n|---|---:|---:|")
    for size in SIZES:
        for patch in (16, 8):
            print(row(size, patch), flush=True)


if __name__ == "__main__":
    main()
