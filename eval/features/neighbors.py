"""Nearest neighbours by cosine similarity, with faiss in float32: exact search over shards of the
bank, which may be larger than memory, or an approximate index where the bank is too large.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from ssl_xcit.utils.ranks import from_rank, rank, world_size
from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
Bank = Float[np.ndarray, "N C"]  # float16 or float32, perhaps a memory map
Queries = Float[np.ndarray, "Q C"]
Similarity = Float[np.ndarray, "Q k"]
Indices = Int64[np.ndarray, "Q k"]
BLOCK = 1 << 29  # bytes of the bank at once
SHARDS, SHARD = 16, 1 << 15  # of a bank, for ranks to share, and rows that one has at least
SIMILARITIES = 1 << 26  # at once, where all are kept: 256 MB


def unit(rows: Float[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
    """Rows of L2 norm 1; a row of zeros stays."""
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.sqrt(np.einsum("nc,nc->n", rows, rows))
    return rows / np.maximum(norms, np.float32(1e-12))[:, None]


def blocks(bank: Bank, most: int | None = None) -> Iterator[slice]:
    """Rows of each block, at most so many."""
    rows = max(1, BLOCK // (4 * bank.shape[1]))
    rows = rows if most is None else min(rows, most)
    for start in range(0, len(bank), rows):
        yield slice(start, min(start + rows, len(bank)))


def shards(bank: Bank) -> Iterator[slice]:
    """Rows of each shard: the same ones whoever searches them, since products of other shapes
    round otherwise, and of equally similar rows those of an earlier shard are kept.
    """
    return blocks(bank, max(SHARD, -(-len(bank) // SHARDS)))


def nearest(
    bank: Bank,
    queries: Queries,
    k: int,
    itself: Int64[np.ndarray, " Q"] | None = None,
    ranks: bool = False,
) -> tuple[Similarity, Indices]:
    """Cosine similarities and bank indices of the k nearest (at most N), most similar first,
    compared in float32, shard by shard, on a GPU where faiss finds one. The bank may be a memory
    map larger than memory; `itself` is the row of it that each query is, and which is left out.

    With `ranks` all ranks have called it with the same: they search shards in turns, and all get
    what one gets, to the last bit.
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    count = min(k + (itself is not None), len(bank))
    gpu = faiss.StandardGpuResources() if count <= 2048 and gpus() else None
    wanted = unit(queries)

    def found(shard: slice) -> tuple[Similarity, Indices]:
        rows = unit(bank[shard])
        few, product = min(count, len(rows)), faiss.METRIC_INNER_PRODUCT
        if gpu is None:
            similarity, indices = faiss.knn(wanted, rows, few, metric=product)
        else:
            similarity, indices = faiss.knn_gpu(gpu, wanted, rows, few, metric=product)
        return similarity, indices + shard.start

    best = faiss.ResultHeap(len(queries), count, keep_max=True)
    for result in in_turns(found, list(shards(bank))) if ranks else map(found, shards(bank)):
        best.add_result(*result)
    best.finalize()
    if itself is not None:
        return without_itself(best.D, best.I, itself)
    return best.D, best.I


def in_turns(
    found: Callable[[slice], tuple[Similarity, Indices]], places: Sequence[slice]
) -> Iterator[tuple[Similarity, Indices]]:
    """What is found in each place, by one of the ranks, on all of them; a rank holds one result at
    a time.
    """
    for first in range(0, len(places), world_size()):
        together = places[first : first + world_size()]
        mine: Any = found(together[rank()]) if rank() < len(together) else None
        for source in range(len(together)):
            yield from_rank(source, mine)


def gpus() -> int:
    """Number of GPUs that faiss can use; its CPU builds know of none."""
    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def without_itself(
    similarity: Similarity, indices: Indices, itself: Int64[np.ndarray, " Q"]
) -> tuple[Float[np.ndarray, "Q fewer"], Int64[np.ndarray, "Q fewer"]]:
    """Neighbours without each query's own row, or without the last where that is not among them."""
    own = indices == itself[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(indices), indices.shape[1] - 1)
    return similarity[~own].reshape(shape), indices[~own].reshape(shape)


@dataclass(frozen=True)
class Approximate:
    """Search by an index of faiss, which holds a copy of the bank in memory.

    Its effort (lists probed, or candidates kept) is doubled until, on a sample of the queries, so
    much of what exact search finds is found.
    """

    kind: str = "ivf"  # inverted lists; builds fast; `hnsw`: a graph; searches fast, takes memory
    recall: float = 0.95  # share of the exact neighbours, in (0, 1]
    sample: int = 200  # queries that it is measured on

    def nearest(
        self, bank: Bank, queries: Queries, k: int, itself: Int64[np.ndarray, " Q"] | None = None
    ) -> tuple[Similarity, Indices, float]:
        """What `nearest` returns, and the recall in percent, which is printed."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        own = int(itself is not None)
        N, k = len(bank), min(k, len(bank) - own)
        chosen = np.unique(np.linspace(0, len(queries) - 1, self.sample).astype(np.int64))
        some = None if itself is None else itself[chosen]
        exact = nearest(bank, queries[chosen], k, itself=some)[1]
        index, limit = self.built(bank)
        effort = min(max(8, k + own) if self.kind == "hnsw" else 8, limit)
        while True:
            self.set_effort(index, effort)
            indices = searched(index, queries[chosen], k, some)[1]
            hits = [len(np.intersect1d(a, b)) for a, b in zip(indices, exact, strict=True)]
            recall = 100.0 * sum(hits) / exact.size
            if recall >= 100.0 * self.recall or effort >= limit:
                break
            effort = min(2 * effort, limit)
        unit_of_effort = "lists probed" if self.kind == "ivf" else "candidates kept"
        say(
            f"k-NN by {self.kind.upper()} in {N:,} rows, {effort} {unit_of_effort}: recall "
            f"{recall:.1f} % of the exact {k} neighbours, on {len(chosen)} queries"
        )
        return *searched(index, queries, k, itself), recall

    def built(self, bank: Bank) -> tuple[Any, int]:
        """The index of all rows, and the highest effort that makes sense."""
        N, C = bank.shape
        index: Any
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(C, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 100
        else:
            lists = int(np.clip(4 * N**0.5, 1, max(1, N // 39)))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(C), C, lists, faiss.METRIC_INNER_PRODUCT)
            some = np.unique(np.linspace(0, N - 1, min(N, 64 * lists)).astype(np.int64))
            index.train(unit(bank[some]))
        for block in blocks(bank):
            index.add(unit(bank[block]))
        return index, (min(N, 1 << 14) if self.kind == "hnsw" else lists)

    def set_effort(self, index: Any, effort: int) -> None:
        """Set the number of lists probed, or of candidates kept."""
        if self.kind == "hnsw":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort


def searched(
    index: faiss.Index, queries: Queries, k: int, itself: Int64[np.ndarray, " Q"] | None
) -> tuple[Similarity, Indices]:
    """The k nearest by an index; where it finds fewer, -1 with the similarity -1."""
    similarity, indices = index.search(unit(queries), k + int(itself is not None))
    if itself is not None:
        similarity, indices = without_itself(similarity, indices, itself)
    return np.where(indices < 0, np.float32(-1.0), similarity), indices


def built_index(bank: Bank, kind: str) -> faiss.Index:
    """An index of unit rows by inner product: `flat` is exact, `ivf` and `hnsw` are not."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    if kind != "flat":
        return Approximate(kind).built(bank)[0]
    index = faiss.IndexFlatIP(bank.shape[1])
    for block in blocks(bank):
        index.add(unit(bank[block]))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    """Write a file of faiss's own format."""
    faiss.write_index(index, str(path))


def opened_index(path: Path) -> faiss.Index:
    """Open what `write_index` wrote; the lists of an inverted file are mapped, not read."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def is_exact(index: faiss.Index) -> bool:
    """Whether an index compares with every row."""
    return isinstance(index, faiss.IndexFlat)


def nearest_in(index: faiss.Index, queries: Queries, k: int) -> tuple[Similarity, Indices]:
    """The k nearest by an index, with a generous effort where it is approximate."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = max(1, index.nlist // 8)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = max(128, 4 * k)
    return searched(index, queries, min(k, index.ntotal), None)
