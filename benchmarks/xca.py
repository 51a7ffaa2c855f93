"""Cross-covariance attention: directly and from the Gram matrix; fits the choice between them.

    python benchmarks/xca.py [--rounds 7] [--precision fp32]

Times one attention layer, the two forms interleaved, forward alone and with gradients, over widths
and numbers of tokens (about 6,000 tokens a batch). The line N = factor * C + offset from which the
Gram form is faster is fitted to the crossings of each width; GRAM_FROM in ssl_xcit/models/xca.py
holds the result. Writes benchmarks/results/xca.json.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ssl_xcit.models.xca import CrossCovarianceAttention, from_gram

WIDTHS = {128: 4, 192: 4, 384: 8}
TOKENS = (36, 100, 196, 400, 784, 1568, 3136)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(width: int, heads: int, tokens: int, gradients: bool) -> tuple[float, float]:
    """(milliseconds of the direct form, its time over the Gram form's), medians."""
    layer = CrossCovarianceAttention(width, heads)
    x = torch.randn(max(1, 6000 // tokens), tokens, width, requires_grad=gradients)
    proj = layer.proj.weight, layer.proj.bias
    forms = (
        lambda y: layer.direct(y, *proj),
        lambda y: from_gram(y, layer.qkv, layer.temperature, *proj),
    )

    def run(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        layer.zero_grad()
        x.grad = None
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=ARGS.precision == "bf16")
        with autocast, contextlib.nullcontext() if gradients else torch.no_grad():
            y = form(x)
        if gradients:
            y.backward(torch.ones_like(y))

    for form in forms:
        run(form)
    pairs = [[seconds(lambda f=form: run(f)) for form in forms] for _ in range(ARGS.rounds)]
    return (
        statistics.median(p[0] for p in pairs) * 1e3,
        statistics.median(p[0] / p[1] for p in pairs),
    )


def crossing(ratios: dict[int, float]) -> float:
    """The number of tokens where the ratio passes 1, on logarithmic scales."""
    n, r = np.log(list(ratios)), np.log(list(ratios.values()))
    above = np.flatnonzero(r > 0)
    if not len(above):
        return float(np.exp(n[-1]))
    i = int(above[0])
    if i == 0:
        return float(np.exp(n[0]))
    share = -r[i - 1] / (r[i] - r[i - 1])
    return float(np.exp(n[i - 1] + share * (n[i] - n[i - 1])))


def main() -> None:
    found = {}
    for gradients in (True, False):
        crossings = {}
        for width, heads in WIDTHS.items():
            ratios = {}
            for tokens in TOKENS:
                direct, ratios[tokens] = ratio(width, heads, tokens, gradients)
                print(
                    f"{'forward and backward' if gradients else 'forward'}, C {width}, N {tokens}: "
                    f"direct {direct:.1f} ms, Gram form {ratios[tokens]:.2f} times as fast",
                    flush=True,
                )
            crossings[width] = crossing(ratios)
            found[f"{gradients} {width}"] = ratios
        factor, offset = np.polyfit(list(crossings), list(crossings.values()), 1)
        print(f"crossings {crossings}: N = {factor:.2f} C + {offset:.0f}")
        found[f"fit {gradients}"] = [factor, offset]
    out = Path(__file__).parent / "results" / "xca.json"
    out.parent.mkdir(exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**kept, ARGS.precision: found}, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    ARGS = parser.parse_args()
    torch.manual_seed(0)
    main()
