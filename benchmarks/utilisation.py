"""How much of the machine's matrix rate a DINO step reaches: ours and timm's.

    python benchmarks/utilisation.py [--model nano_12_p16] [--batch 16] [--precision fp32]

Each round measures the rate of a 2048 x 2048 product and times one step of either side. The work of
a step is what the usual formulas take (counted by torch on timm's step: products, convolutions,
attention), for both sides, so that computing less shows as a higher share. Ours as executed stands
beside it. Then where our step's time goes, by kind of operation. Writes
benchmarks/results/utilisation.json.
"""

import math
import statistics
from collections import Counter
from typing import Any

import step
import torch
from measure import interleaved, save
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

SIDE = 2048
KINDS = {
    "mm": "products", "addmm": "products", "bmm": "products", "baddbmm": "products",
    "addmm_": "products", "addmv_": "products",
    "mkldnn_convolution": "convolutions", "convolution_backward": "convolutions",
    "gelu": "GELU", "gelu_backward": "GELU",
    "native_batch_norm": "BatchNorm", "native_batch_norm_backward": "BatchNorm",
    "native_layer_norm": "LayerNorm", "native_layer_norm_backward": "LayerNorm",
    "copy_": "copies", "cat": "copies", "fill_": "copies", "zero_": "copies",
    "_fused_adamw_": "AdamW", "lerp_": "EMA", "_foreach_lerp_": "EMA",
    **{
        function + way: f"kernels of {what}"
        for function, what in (
            ("MLPBranch", "MLPs"), ("AttentionBranch", "attention"),
            ("LocalBranch", "local patch interaction"), ("FusedStem", "the stem"),
        )
        for way in ("", "Backward")
    },
    "_softmax": "softmax", "_softmax_backward_data": "softmax", "softmax": "softmax",
}  # fmt: skip


def addmm_flop(_: object, a: list[int], b: list[int], **__: object) -> int:
    """Multiplications and additions of total += a b, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def conv_backward_flop(
    grad: list[int], x: list[int], w: list[int], *arguments: Any, **_: object
) -> int:
    """Of the input's gradient and the weights', where asked for; torch forgets the groups."""
    wanted = arguments[-1]
    return 2 * grad[0] * math.prod(grad[2:]) * math.prod(w) * (int(wanted[0]) + int(wanted[1]))


COUNTED = {
    torch.ops.aten.addmm_: addmm_flop,
    torch.ops.aten.convolution_backward: conv_backward_flop,
}


def product_rate() -> float:
    """FLOP/s."""
    dtype = torch.bfloat16 if ARGS.precision == "bf16" else torch.float32
    a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
    best = min(interleaved({"mm": lambda: a @ b}, 5)["mm"])
    return 2 * SIDE**3 / best


def main() -> None:
    views = step.random_views()
    sides = {who: make(views, ARGS.precision) for who, make in step.MAKE.items()}
    work = {}
    for who, run in sides.items():
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            run()
        work[who] = counter.get_total_flops()
    nominal, rates = work["timm"], []
    shares: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(ARGS.rounds):
        rate = product_rate()
        for who, run in sides.items():
            seconds = interleaved({who: run}, 1, warm_up=0)[who][0]
            shares[who].append(nominal / seconds / rate)
        rates.append(rate)
    median = {who: statistics.median(values) for who, values in shares.items()}
    print(
        f"{ARGS.model} {ARGS.precision}, batch {ARGS.batch}: "
        f"{nominal / ARGS.batch / 1e9:.1f} GFLOP an image (ours executes "
        f"{work['ours'] / ARGS.batch / 1e9:.1f}), products at "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s; share of that rate: ours "
        f"{100 * median['ours']:.0f} %, timm {100 * median['timm']:.0f} %"
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            sides["ours"]()
    spent: Counter[str] = Counter()
    copies = 0
    for row in profiled.key_averages():
        copies += row.count * (row.key == "aten::copy_")
        spent[KINDS.get(row.key.removeprefix("aten::"), "all else")] += row.self_cpu_time_total
    total = sum(spent.values())
    costs = {kind: round(100 * value / total, 1) for kind, value in spent.most_common()}
    print("where our step's time goes, in %: " + ", ".join(f"{k} {v}" for k, v in costs.items()))
    print(f"calls of copy_ a step: {copies // 3:,}")
    save("utilisation", {f"{ARGS.model}, {ARGS.precision}, batch {ARGS.batch}": {
        "gflop_an_image": nominal / ARGS.batch / 1e9,
        "gflop_an_image_executed": work["ours"] / ARGS.batch / 1e9,
        "product_gflops": statistics.median(rates) / 1e9,
        "share": median,
        "share_by_round": shares,
        "percent_of_time": costs,
        "copies": copies // 3,
    }})  # fmt: skip


if __name__ == "__main__":
    ARGS = step.ARGS = step.parser.parse_args()
    main()
