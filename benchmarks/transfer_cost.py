"""What the published recipes of `ssl-xcit finetune` cost, estimated: nothing of it was timed.

python benchmarks/transfer_cost.py [--models tiny_12_p16,small_12_p16,small_12_p8,medium_24_p16]

Counts the operations of the losses of a training image (torch's FlopCounterMode; a detector's are
of 640 x 856 pixels, the mean of the published sizes, with seven objects), times three for the
backward pass. Hours are those of all steps on 8 A100 GPUs at 35 % of 312 TFLOP/s, as in recipes.py.
"""

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit import create_model
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.segmentation.task import Segmentation

STEPS = {  # steps and batch
    "imagenet_supervised": (500_455, 1024),
    "coco_mask_rcnn": (263_848, 16),
    "ade20k_fpn": (80_000, 16),
    "ade20k_upernet": (160_000, 16),
}
RATE = 8 * 0.35 * 312e12  # operations a second
OBJECTS = torch.tensor([[50.0 * i, 40.0 * i, 50.0 * i + 150, 40.0 * i + 130] for i in range(7)])


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.zeros(count, 3, height, width, dtype=torch.uint8)


def classified(backbone: Any) -> tuple[Any, ...]:
    task = Classification(backbone, list(map(str, range(1000))))
    return task, images(2, 224, 224), torch.tensor([0, 1])


def segmented(backbone: Any, head: Any) -> tuple[Any, ...]:
    task = Segmentation(backbone, list(map(str, range(150))), head=head)
    return task, images(2, 512, 512), torch.zeros(2, 512, 512, dtype=torch.uint8)


def detected(backbone: Any) -> tuple[Any, ...]:
    masks = torch.zeros(len(OBJECTS), 640, 856, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, OBJECTS.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    objects = {"boxes": OBJECTS, "labels": torch.arange(len(OBJECTS)), "masks": masks}
    return Detection(backbone, list(map(str, range(80)))), images(1, 640, 856), [objects]


def step_flops(recipe: str, model: str) -> float:
    """Operations of a training step by image."""
    if recipe == "imagenet_supervised":
        task, batch, targets = classified(create_model(f"xcit_{model}", num_classes=1000))
    else:
        backbone = create_model(f"xcit_{model}", pyramid=True)
        heads = {"ade20k_fpn": "semantic_fpn", "ade20k_upernet": "upernet"}
        task, batch, targets = (
            segmented(backbone, heads[recipe]) if recipe in heads else detected(backbone)
        )
    task.train().requires_grad_(False)  # the backward pass is not counted, but taken as twice this
    with FlopCounterMode(display=False) as counter:
        task.losses(batch, targets)
    return 3 * counter.get_total_flops() / len(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models = "tiny_12_p16,small_12_p16,small_12_p8,medium_24_p16"
    parser.add_argument("--models", type=lambda text: text.split(","), default=models.split(","))
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| model | " + " | ".join(STEPS) + " |\n|---" + "|---:" * len(STEPS) + "|")
    for model in args.models:
        cells = []
        for recipe, (steps, batch) in STEPS.items():
            flops = step_flops(recipe, model)
            cells.append(f"{flops / 1e9:,.0f}, {flops * batch * steps / RATE / 3600:.1f} h")
        print(f"| {model} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
