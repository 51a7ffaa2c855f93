"""A whole DINO training step: ours against timm's XCiT with the usual loss loop, interleaved.

    python benchmarks/step.py [--model nano_12_p16] [--batch 16] [--prototypes 4096] [--rounds 7]

Both sides have the same sizes, precision, optimizer and views (2 x 224 + 8 x 96, random pixels);
each round times one step of either. Prints the medians, the ratio of each round's pair and its
spread, and writes benchmarks/results/step.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ssl_xcit import create_model
from ssl_xcit.models.head import DINOHead
from ssl_xcit.objectives.dino import Center, dino_loss
from ssl_xcit.training.ema import ema_update_
from ssl_xcit.training.module import make_networks
from ssl_xcit.training.optim import clip_each_, parameter_groups


def our_step(name: str, prototypes: int, views: list[Tensor]) -> Callable[[], float]:
    backbone = create_model(f"xcit_{name}")
    student, teacher = make_networks(
        backbone, DINOHead(backbone.embed_dim, prototypes), create_model(f"xcit_{name}")
    )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    center = Center(prototypes)
    optimizer = torch.optim.AdamW(parameter_groups(student), 1e-4, fused=True)  # as conf has it
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=ARGS.precision == "bf16")

    def step() -> float:
        with autocast:
            with torch.no_grad():
                logits = teacher(views[:1])
            targets = center.targets(logits, 0.04)
            loss = dino_loss(student(views), targets, 0.1)
        optimizer.zero_grad()
        loss.backward()
        clip_each_(student.parameters(), 3.0)
        optimizer.step()
        center.update_(logits)
        ema_update_(teacher, student, 0.996)
        return loss.item()

    return step


def usual_step(name: str, prototypes: int, views: list[Tensor]) -> Callable[[], float]:
    """timm's backbone, a plain head, log-softmaxes pair by pair, gradients and EMA by loops."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(f"xcit_{name}_224", num_classes=0)
            width = self.backbone.num_features
            self.mlp = nn.Sequential(
                nn.Linear(width, 2048), nn.GELU(),
                nn.Linear(2048, 2048), nn.GELU(),
                nn.Linear(2048, 256),
            )  # fmt: skip
            last = nn.Linear(256, prototypes, bias=False)
            self.last = torch.nn.utils.parametrizations.weight_norm(last)
            self.last.parametrizations.weight.original0.data.fill_(1)
            self.last.parametrizations.weight.original0.requires_grad = False

        def forward(self, parts: list[Tensor]) -> Tensor:
            x = torch.cat([self.backbone(part.flatten(0, 1)) for part in parts])
            return self.last(nn.functional.normalize(self.mlp(x), dim=-1))

    student = Plain()
    teacher = deepcopy(student).requires_grad_(False)
    center = torch.zeros(1, prototypes)
    optimizer = torch.optim.AdamW(parameter_groups(student), 1e-4, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=ARGS.precision == "bf16")
    V = sum(len(part) for part in views)

    def step() -> float:
        nonlocal center
        with autocast:
            with torch.no_grad():
                logits = teacher(views[:1])
            out = (student(views).float() / 0.1).chunk(V)
            targets = ((logits.float() - center) / 0.04).softmax(-1).chunk(2)
            loss, pairs = torch.zeros(()), 0
            for g, q in enumerate(targets):
                for v, s in enumerate(out):
                    if v != g:
                        loss = loss + (-q * s.log_softmax(-1)).sum(-1).mean()
                        pairs += 1
            loss = loss / pairs
        optimizer.zero_grad()
        loss.backward()
        for p in student.parameters():
            if p.grad is not None:
                coefficient = 3.0 / (p.grad.norm(2) + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        optimizer.step()
        with torch.no_grad():
            center = center * 0.9 + logits.float().mean(0, keepdim=True) * 0.1
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.mul_(0.996).add_(0.004 * s)
        return loss.item()

    return step


def main() -> None:
    torch.manual_seed(0)
    views = [
        torch.randn(2, ARGS.batch, ARGS.large, ARGS.large, 3).permute(0, 1, 4, 2, 3),
        torch.randn(8, ARGS.batch, ARGS.small, ARGS.small, 3).permute(0, 1, 4, 2, 3),
    ]
    plain = [part.contiguous() for part in views]  # channels first, as loaders usually give them
    sides = {
        "ours": our_step(ARGS.model, ARGS.prototypes, views),
        "timm": usual_step(ARGS.model, ARGS.prototypes, plain),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(ARGS.rounds + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["timm"], strict=True)]
    result = {
        "settings": vars(ARGS),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "median_seconds": medians,
        "median_ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }
    print(
        f"{ARGS.model} {ARGS.precision} batch {ARGS.batch}: ours {medians['ours']:.3f} s, "
        f"timm and loop {medians['timm']:.3f} s, ratio {result['median_ratio']:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {ARGS.rounds} pairs)"
    )
    out = Path(__file__).parent / "results" / "step.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="nano_12_p16")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--prototypes", type=int, default=4096)
parser.add_argument("--large", type=int, default=224)
parser.add_argument("--small", type=int, default=96)
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
parser.add_argument("--rounds", type=int, default=7)

if __name__ == "__main__":
    ARGS = parser.parse_args()
    main()
