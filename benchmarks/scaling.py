"""What ranks exchange in a step, and what it leaves of their speed on more of them.

    python benchmarks/scaling.py [--words "model=xcit_small_12_p16 ..."] [--check]

Bytes and calls are counted in the real step, run as one of N ranks whose exchanges do nothing;
products are counted in the same step. Times are computed from these and from the figures of
`Machine`, none of which was measured here. `--check` trains two real ranks (gloo) in a network of
their own and compares what the system counts on it with what is computed; it needs the right to
make one (root). Writes benchmarks/results/scaling.json.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import save
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.data.picture import RGB
from ssl_xcit.training.build import make_module
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.utils.ranks import summed_
from ssl_xcit.utils.validation import parse

MODELS = ("nano_12_p16", "small_12_p16", "medium_24_p16", "large_24_p16")
RANKS = (8, 16, 32, 64, 128, 256)
GLOBAL_BATCH = 1024
TOY = [
    "experiment=photos", "objective=dino", "objective.num_prototypes=1024", "batch_size=4",
    "model=xcit_nano_12_p16", "augment.num_local=2",
]  # fmt: skip
CHECKED_STEPS = 10


class Machine(NamedTuple):
    """Figures to compute with: a node of 8 H100 and a network of 400 Gbit/s a GPU, as their makers
    and the users of NCCL state them.
    """

    flops: float = 400e12  # a second in bfloat16, 40 % of the peak
    node: int = 8  # GPUs
    inside: float = 300e9  # bytes a second of a ring within a node
    outside: float = 45e9  # between nodes
    latency_inside: float = 15e-6  # seconds of a small exchange
    latency_outside: float = 12e-6  # more for each doubling of nodes


class Exchange(NamedTuple):
    """What a rank exchanges in a step."""

    gradients: int  # bytes, in one all-reduce cut into buckets
    sums: Counter[str]  # bytes of other exchanges by kind
    calls: Counter[str]  # number of those that are waited for
    flops: float  # of an image, student and teacher, both passes


def module_of(words: list[str], ranks: int, rank: int) -> Any:
    """The networks of a run, as a rank has them; a step is `module.step(views)`."""
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", words)
    settings = parse(PretrainSettings, cfg)
    module: Any = make_module(settings, make_plan(settings, 100_000, ranks), RGB)
    module._trainer = SimpleNamespace(
        world_size=ranks, global_rank=rank, global_step=500, num_devices=ranks
    )
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()
    module.setup("fit")
    module.on_train_start()
    augment = instantiate(cfg.augment)
    sizes = ((2, augment.global_size), (augment.num_local, augment.local_size))
    images = settings.batch_size // ranks
    return module, [torch.randn(V, images, 3, s, s) for V, s in sizes if V]


@contextmanager
def counted():
    """Bytes and calls of exchanges inside, by kind."""
    sums, calls, originals = Counter[str](), Counter[str](), {}

    def counting(name, place):
        def exchange(*args, **kwargs):
            tensor = args[place]
            sums[name] += tensor.numel() * tensor.element_size()
            calls[name] += not kwargs.get("async_op")
            return originals[name](*args, **kwargs)

        return exchange

    for name, place in (("all_reduce", 0), ("all_gather", 1)):
        originals[name] = getattr(dist, name)
        setattr(dist, name, counting(name, place))
    try:
        yield sums, calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def exchange_of(words: list[str], ranks: int) -> Exchange:
    """Count a step of one of the ranks, with an image each."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        module, views = module_of([*words, f"batch_size={ranks}"], ranks, 0)
        with counted() as (sums, calls), FlopCounterMode(display=False) as flops:
            module.step(views)
    finally:
        dist.destroy_process_group()
    gradients = sum(p.numel() for p in module.student.parameters() if p.requires_grad)
    return Exchange(4 * gradients, sums, calls, float(flops.get_total_flops()))


def wire_bytes(exchange: Exchange, ranks: int, bytes_a_gradient: int = 4) -> float:
    """What a rank sends: rings, 2 (N - 1) / N of what is reduced, N - 1 times what is gathered."""
    share = 2 * (ranks - 1) / ranks
    gradients = exchange.gradients * bytes_a_gradient / 4
    return (
        share * (gradients + exchange.sums["all_reduce"])
        + (ranks - 1) * exchange.sums["all_gather"]
    )


def efficiency(exchange: Exchange, ranks: int, machine: Machine, norm: str) -> float:
    """Share of the time of a step in which a GPU computes. Gradients overlap with the backward
    pass, half of the products; other exchanges are waited for. `norm`: whose images BatchNorm sees.
    """
    nodes = max(1, ranks // machine.node)
    compute = exchange.flops * GLOBAL_BATCH / ranks / machine.flops
    bandwidth = machine.inside if nodes == 1 else machine.outside
    gradients = 2 * (ranks - 1) / ranks * exchange.gradients / bandwidth
    far = machine.latency_inside + machine.latency_outside * math.log2(nodes)
    calls = sum(exchange.calls.values())
    few = 1  # losses
    waited = (calls - few) * (far if norm == "global" else machine.latency_inside)
    waited += (few + 1) * far  # and health's features, outside the step that is counted
    return compute / (compute + max(0.0, gradients - compute / 2) + waited)


def train_two(rank: int, store: str) -> None:
    """Two real ranks: print what crosses the network in a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    module, views = module_of(TOY, 2, rank)

    def backward(loss):
        loss.backward()
        summed_(
            torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None])
        )

    module.manual_backward = backward
    module.step(views)
    dist.barrier()
    before = crossed()
    for _ in range(CHECKED_STEPS):
        module.step(views)
    dist.barrier()
    if rank == 0:
        print((crossed() - before) / CHECKED_STEPS)
    dist.barrier()
    dist.destroy_process_group()


def crossed() -> int:
    """Bytes that the loopback device has sent."""
    match = re.search(r"lo:\s*(.*)", Path("/proc/net/dev").read_text())
    assert match is not None
    return int(match[1].split()[8])


def check() -> dict[str, float]:
    """Bytes a step of two ranks as counted by the system, and as computed."""
    with tempfile.TemporaryDirectory() as folder:
        own = f"{sys.executable} {__file__} --store {folder}/store --rank"
        done = subprocess.run(
            ["unshare", "--net", "sh", "-c", f"ip link set lo up; {own} 1 & {own} 0; wait"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    measured = float(done.stdout.split()[-1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    module, views = module_of(TOY, 2, 0)
    with counted() as (sums, calls):
        module.step(views)
    dist.destroy_process_group()
    gradients = sum(p.grad.numel() for p in module.student.parameters() if p.grad is not None)
    computed = 2 * wire_bytes(Exchange(4 * gradients, sums, calls, 0.0), 2)
    return {"measured": measured, "computed": computed}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", default="objective=dino augment.num_local=8")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.store:
        train_two(args.rank, args.store)
        return
    results: dict[str, Any] = {"machine": Machine()._asdict()}
    if args.check:
        results["check"] = both = check()
        print(
            f"two ranks, bytes a step: {both['measured']:,.0f} on the network, "
            f"{both['computed']:,.0f} computed ({both['measured'] / both['computed']:.3f})"
        )
    print("model | GFLOP an image | gradients MB | BatchNorm and others MB | exchanges waited for")
    for model in args.models.split(","):
        words = ["data=folder", "data.root=x", f"model=xcit_{model}", *args.words.split()]
        exchange = exchange_of(words, RANKS[0])
        others, calls = sum(exchange.sums.values()) / 1e6, sum(exchange.calls.values())
        print(
            f"{model} | {exchange.flops / 1e9:.1f} | {exchange.gradients / 1e6:.0f} | "
            f"{others:.2f} | {calls}"
        )
        rows = {
            norm: [efficiency(exchange, ranks, Machine(), norm) for ranks in RANKS]
            for norm in ("global", "node")
        }
        for norm, row in rows.items():
            shown = " | ".join(f"{100 * value:.0f}" for value in row)
            print(f"  efficiency in %, batch_norm={norm}, on {RANKS} GPUs: {shown}")
        results[model] = {**exchange._asdict(), "efficiency": rows}
    save("scaling", results)


if __name__ == "__main__":
    main()
