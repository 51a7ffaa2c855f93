"""A whole DINO training step: ours against timm's XCiT with the usual loss loop, interleaved.

    python benchmarks/step.py [--model nano_12_p16] [--batch 16] [--prototypes 4096] [--rounds 7]
    python benchmarks/step.py --model small_12_p16 --batch 8 --prototypes 65536
    python benchmarks/step.py --precision fp32,bf16       all four in one run
    python benchmarks/step.py --compile false             ours without the kernels

Both sides have the same sizes, precision, optimizer and views (2 x 224 + 8 x 96, random pixels), no
stochastic depth; each round times one step of either. Prints the medians, the ratio of each round's
pair and its spread, and the peak memory of each side in a process of its own above what the imports
take. Writes benchmarks/results/step.json.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy

import timm
import torch
from loss import double_loop
from measure import compared, interleaved, line, save, status
from real_step import step_of
from torch import Tensor, nn

from ssl_xcit.training.optim import parameter_groups


def our_step(views: list[Tensor], precision: str) -> Callable[[], object]:
    """The step of `ssl-xcit pretrain` itself, without the trainer around it."""
    return step_of(
        [
            "experiment=none", "objective=dino", "trainer=cpu", "data=photos",
            f"model=xcit_{ARGS.model}", "model.drop_path=0", f"batch_size={ARGS.batch}",
            f"objective.num_prototypes={ARGS.prototypes}", f"compile={ARGS.compile}",
            f"augment.global_size={ARGS.large}", f"augment.local_size={ARGS.small}",
            f"trainer.precision={'bf16-mixed' if precision == 'bf16' else '32-true'}",
        ],
        views=views,
    )  # fmt: skip


def usual_step(views: list[Tensor], precision: str) -> Callable[[], object]:
    """timm's backbone, a plain head, log-softmaxes pair by pair, gradients and EMA by loops."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(f"xcit_{ARGS.model}_224", num_classes=0)
            width = self.backbone.num_features
            self.mlp = nn.Sequential(
                nn.Linear(width, 2048), nn.GELU(),
                nn.Linear(2048, 2048), nn.GELU(),
                nn.Linear(2048, 256),
            )  # fmt: skip
            last = nn.Linear(256, ARGS.prototypes, bias=False)
            self.last = torch.nn.utils.parametrizations.weight_norm(last)
            self.last.parametrizations.weight.original0.data.fill_(1)
            self.last.parametrizations.weight.original0.requires_grad = False

        def forward(self, parts: list[Tensor]) -> Tensor:
            x = torch.cat([self.backbone(part.flatten(0, 1)) for part in parts])
            return self.last(nn.functional.normalize(self.mlp(x), dim=-1))

    student = Plain()
    teacher = deepcopy(student).requires_grad_(False)
    center = torch.zeros(1, ARGS.prototypes)
    optimizer = torch.optim.AdamW(parameter_groups(student), 1e-4, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    V = sum(len(part) for part in views)
    views = [part.contiguous() for part in views]  # channels first, as loaders usually give them

    def step() -> float:
        nonlocal center
        with autocast:
            with torch.no_grad():
                logits = teacher(views[:1])
            targets = ((logits.float() - center) / 0.04).softmax(-1).unflatten(0, (2, -1))
            loss = double_loop(student(views).float().unflatten(0, (V, -1)), targets)
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


MAKE = {"ours": our_step, "timm": usual_step}


def random_views() -> list[Tensor]:
    """Channels-last, as our batches come."""
    torch.manual_seed(0)
    return [
        torch.randn(count, ARGS.batch, size, size, 3).permute(0, 1, 4, 2, 3)
        for count, size in ((2, ARGS.large), (8, ARGS.small))
    ]


def peak_memory(side: str) -> None:
    """Printed: bytes at the peak of three steps, above those of a process that has imported all."""
    before = status("VmRSS")
    who, precision = side.split()
    step = MAKE[who](random_views(), precision)
    for _ in range(3):
        step()
    print(status("VmHWM") - before)


def main() -> None:
    views, precisions = random_views(), ARGS.precision.split(",")
    sides = {f"{who} {p}": MAKE[who](views, p) for p in precisions for who in MAKE}
    seconds = interleaved(sides, ARGS.rounds)
    memory = {}
    for side in sides if not ARGS.no_memory else ():
        command = [sys.executable, *sys.argv, "--peak-of", side]
        memory[side] = int(subprocess.run(command, stdout=-1, check=True).stdout) / 2**30
    pairs = [(f"ours {p}", f"timm {p}") for p in precisions]
    if len(precisions) > 1:
        pairs.append((f"ours {precisions[-1]}", f"timm {precisions[0]}"))
    results = {}
    for ours, peer in pairs:
        found = compared({name: seconds[name] for name in (ours, peer)}, ours, peer)
        title = f"{ARGS.model}, batch {ARGS.batch}, K {ARGS.prototypes}, {ours} against {peer}"
        if ARGS.compile != "auto":
            title += f", compile={ARGS.compile}"
        if memory:
            found["gb"] = {name: round(memory[name], 2) for name in (ours, peer)}
            found["memory_ratio"] = round(memory[ours] / memory[peer], 3)
        results[title] = found
        print(f"{title}: {line(found)}", end="")
        print(f"; peak {found['gb']} GB, {found['memory_ratio']:.2f}" if memory else "", flush=True)
    save("step", results)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="nano_12_p16")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--prototypes", type=int, default=4096)
parser.add_argument("--large", type=int, default=224)
parser.add_argument("--small", type=int, default=96)
parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp32,bf16")
parser.add_argument("--compile", default="auto", help="auto, true or false, of ours")
parser.add_argument("--no-memory", action="store_true")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--peak-of", help=argparse.SUPPRESS)

if __name__ == "__main__":
    ARGS = parser.parse_args()
    if ARGS.peak_of:
        peak_memory(ARGS.peak_of)
    else:
        main()
