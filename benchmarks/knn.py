"""Exact k-NN search against torch's matmul and topk, in one interleaved run; and a bank that is
searched from the disk.

python benchmarks/knn.py [--queries 2000] [--bank 200000] [--dim 384] [--k 200] [--rounds 7]
                         [--only search|profile|disk]

Features are random directions around random centres, as those of classes are. Both sides get raw
float32 features, normalise them and return the k most similar of each query.
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import measure
import numpy as np
import torch

from ssl_xcit.eval.features.neighbors import nearest, unit


def features(rows: int, dim: int, seed: int, centres: int = 1000) -> np.ndarray:
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(0).standard_normal((centres, dim), dtype=np.float32)
    which = generator.integers(centres, size=rows)
    return middle[which] + generator.standard_normal((rows, dim), dtype=np.float32)


def with_torch(bank: torch.Tensor, queries: torch.Tensor, k: int) -> torch.return_types.topk:
    unit = torch.nn.functional.normalize
    return (unit(queries) @ unit(bank).T).topk(k, dim=1)


def search(args: argparse.Namespace) -> dict[str, dict]:
    bank, queries = features(args.bank, args.dim, 1), features(args.queries, args.dim, 2)
    tensors = torch.from_numpy(bank), torch.from_numpy(queries)
    ours, theirs = nearest(bank, queries, args.k), with_torch(*tensors, args.k)
    same = [
        len(np.intersect1d(a, b)) / args.k
        for a, b in zip(ours[1], theirs.indices.numpy(), strict=True)
    ]
    seconds = measure.interleaved(
        {
            "ours": lambda: nearest(bank, queries, args.k),
            "torch": lambda: with_torch(*tensors, args.k),
        },
        args.rounds,
    )
    found = measure.compared(seconds, "ours", "torch")
    title = f"search {args.queries} x {args.bank} x {args.dim}, k {args.k}"
    print(f"{title}: {measure.line(found)}; {100 * np.mean(same):.4f} % of the neighbours agree")
    return {title: found}


def profile(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of the parts of both sides, the least of three."""
    bank, queries = (
        unit(features(args.bank, args.dim, 1)),
        unit(features(args.queries, args.dim, 2)),
    )
    one, other = torch.from_numpy(queries), torch.from_numpy(bank)
    products = one @ other.T
    faiss.omp_set_num_threads(torch.get_num_threads())
    ip = faiss.METRIC_INNER_PRODUCT
    parts = {
        "normalise": lambda: unit(bank),
        "faiss.knn": lambda: faiss.knn(queries, bank, args.k, metric=ip),
        "faiss.knn, k 1": lambda: faiss.knn(queries, bank, 1, metric=ip),
        "torch, product": lambda: one @ other.T,
        "torch, topk": lambda: products.topk(args.k, dim=1),
        "numpy, product": lambda: queries @ bank.T,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(3):  # interleaved
        for name, call in parts.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    least = {name: round(min(values), 2) for name, values in seconds.items()}
    print(", ".join(f"{name} {value} s" for name, value in least.items()))
    return {"profile": least}


def disk(args: argparse.Namespace) -> dict[str, dict]:
    """A million rows, written in pieces, mapped, and searched by 2,000 queries."""
    rows, queries = 1_000_000, features(args.queries, args.dim, 2)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        file = Path(folder) / "bank.npy"
        bank = np.lib.format.open_memmap(file, "w+", np.float32, (rows, args.dim))
        for start in range(0, rows, 100_000):
            bank[start : start + 100_000] = features(100_000, args.dim, 10 + start)
        bank.flush()
        del bank
        mapped = np.load(file, mmap_mode="r")
        began = time.perf_counter()
        extra = measure.extra_memory(lambda: nearest(mapped, queries, args.k))
        seconds = time.perf_counter() - began
    title = f"disk {args.queries} x {rows} x {args.dim}, k {args.k}"
    found = {"seconds": round(seconds, 2), "peak_gb": round(measure.status("VmHWM") / 1e9, 2)}
    print(f"{title}: {seconds:.1f} s, peak {found['peak_gb']} GB of the process, the mapped file "
          f"counted ({extra / 1e9:.2f} GB above what it held before)")  # fmt: skip
    return {title: found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("queries", 2000), ("bank", 200_000), ("dim", 384), ("k", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("search", "profile", "disk"))
    given = parser.parse_args()
    for part in (search, profile, disk):
        if given.only in (None, part.__name__):
            measure.save("knn", part(given))
