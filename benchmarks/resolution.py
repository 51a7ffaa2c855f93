"""The backbone against the number of tokens: ours, timm's XCiT and a ViT of the same width.

    python benchmarks/resolution.py [--model tiny_12_p16] [--sides 224,448,640,896,1280,2048]
    python benchmarks/resolution.py --model tiny_12_p8 --sides 448 --no-vit

Forward alone (no gradients) and forward with backward of one image, the three interleaved, and the
memory that forward with backward needs beyond weights and image. Fits time = a * tokens^b from 784
tokens on. Writes benchmarks/results/resolution.json.
"""

import argparse
import gc
from collections.abc import Callable

import numpy as np
import timm
import torch
from measure import compared, extra_memory, interleaved, line, save
from torch import nn

from ssl_xcit import create_model
from ssl_xcit.models.devices import prepare_cpu


def models() -> dict[str, nn.Module]:
    """All in training mode, without stochastic depth or a classifier."""
    patch = int(ARGS.model.rsplit("_p", 1)[1])
    ours = create_model(f"xcit_{ARGS.model}")
    prepare_cpu(ours)
    found: dict[str, nn.Module] = {
        "ours": ours,
        "timm": timm.create_model(f"xcit_{ARGS.model}_224", num_classes=0).train(),
    }
    if not ARGS.no_vit:
        width = ours.embed_dim
        found["vit"] = timm.models.VisionTransformer(
            patch_size=patch, embed_dim=width, depth=len(ours.blocks), num_heads=width // 64,
            num_classes=0, dynamic_img_size=True,
        ).train()  # fmt: skip
    return found


def work(model: nn.Module, x: torch.Tensor, gradients: bool) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            model(x)

    def both() -> None:
        model.zero_grad(set_to_none=False)  # weights' gradients are not counted
        model(x).sum().backward()

    return both if gradients else forward


def exponent(tokens: list[int], seconds: list[float]) -> float:
    """b of time = a * tokens^b, from 784 tokens on."""
    t, s = np.array(tokens), np.array(seconds)
    return float(np.polyfit(np.log(t[t >= 784]), np.log(s[t >= 784]), 1)[0])


def main() -> None:
    sides = [int(side) for side in ARGS.sides.split(",")]
    patch = int(ARGS.model.rsplit("_p", 1)[1])
    tokens = [(side // patch) ** 2 for side in sides]
    nets = models()
    for model in nets.values():
        work(model, torch.randn(1, 3, 64, 64), True)()
    results = {}
    for gradients in (False, True):
        title = "forward and backward" if gradients else "forward"
        curves: dict[str, list[float]] = {name: [] for name in nets}
        memory: dict[str, list[float]] = {name: [] for name in nets}
        for side, count in zip(sides, tokens, strict=True):
            x = torch.randn(1, 3, side, side)
            here = {
                name: work(model, x, gradients)
                for name, model in nets.items()
                if name != "vit" or count <= ARGS.vit_tokens
            }
            rounds = max(3, min(ARGS.rounds, ARGS.rounds * 3136 // count))
            seconds = interleaved(here, rounds)
            found = compared({k: seconds[k] for k in ("ours", "timm")}, "ours", "timm")
            for name in nets:
                curves[name].append(float(np.median(seconds.get(name, [np.nan]))))
                gc.collect()
                extra = extra_memory(here[name]) / 2**20 if name in here and gradients else np.nan
                memory[name].append(round(extra, 1))
            text = f"{ARGS.model}, {side} px, {count} tokens, {title}: {line(found)}"
            if "vit" in here:
                text += f", ViT {curves['vit'][-1]:.3f} s"
            if gradients:
                found["memory_ratio"] = round(memory["ours"][-1] / memory["timm"][-1], 3)
                text += ", memory " + ", ".join(f"{k} {v[-1]:.0f} MB" for k, v in memory.items())
                text += f" ({found['memory_ratio']:.2f})"
            results[f"{ARGS.model}, {side} px, {title}"] = found
            print(text, flush=True)
        curve = {"tokens": tokens, "seconds": curves, "memory_mb": memory if gradients else {}}
        if sum(count >= 784 for count in tokens) > 2:
            fits = {}
            for name, values in curves.items():
                known = [(t, s) for t, s in zip(tokens, values, strict=True) if s == s]
                fits[name] = round(exponent(*map(list, zip(*known, strict=True))), 3)
            curve["exponent"] = fits
            print(f"{title}: time grows with tokens to the power {fits}", flush=True)
            results[f"{ARGS.model}, curve, {title}"] = curve
    save("resolution", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_12_p16")
    parser.add_argument("--sides", default="224,448,640,896,1280,2048")
    parser.add_argument("--no-vit", action="store_true")
    parser.add_argument(
        "--vit-tokens", type=int, default=6400, help="most that the ViT is run with"
    )
    parser.add_argument("--rounds", type=int, default=7)
    ARGS = parser.parse_args()
    torch.manual_seed(0)
    main()
