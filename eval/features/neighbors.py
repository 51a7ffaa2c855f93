"""Nearest neighbours by cosine similarity: exact, or approximate where the bank is too large.

Exact search is faiss in float32 over blocks of the bank, so that a bank may be larger than memory.
Where float32 leaves open which neighbours are the nearest, the few in question are compared in
float64, of equals the first one in the bank; so the answer is that of float64 brute force.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64

from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
Bank = Float[np.ndarray, "N C"]  # float16 or float32, perhaps a memory map
Queries = Float[np.ndarray, "Q C"]
Similarity = Float[np.ndarray, "Q k"]
Indices = Int64[np.ndarray, "Q k"]
BLOCK = 1 << 29  # bytes of the bank at once
MARGIN = 8  # neighbours searched beyond the k that are returned
ROUNDING = 4e-6  # above what float32 loses in the product of two unit vectors
ROUNDING64 = 1e-12  # the same of float64
QUERIES = 1 << 17  # at once
GATHERED = 1 << 25  # numbers of neighbours' features at once
SIMILARITIES = 1 << 26  # at once, where all are kept: 256 MB


def unit(rows: Float[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
    """Rows of L2 norm 1; a row of zeros stays."""
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.sqrt(np.einsum("nc,nc->n", rows, rows))
    return rows / np.maximum(norms, np.float32(1e-12))[:, None]


def unit64(rows: Float[np.ndarray, "N C"]) -> Float64[np.ndarray, "N C"]:
    """The same in float64."""
    exact = rows.astype(np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)


def blocks(bank: Bank) -> Iterator[tuple[int, Float32[np.ndarray, "n C"]]]:
    """(first row, unit rows) of each block."""
    rows = max(1, BLOCK // (4 * bank.shape[1]))
    for start in range(0, len(bank), rows):
        yield start, unit(bank[start : start + rows])


def similarities(bank: Bank, queries: Queries, indices: Indices) -> Float64[np.ndarray, "Q k"]:
    """Cosines in float64 of each query with some rows of the bank."""
    cosines = np.empty(indices.shape)
    k, C = indices.shape[1], bank.shape[1]
    at_once = max(1, GATHERED // (k * C))
    for start in range(0, len(queries), at_once):
        here = slice(start, start + at_once)
        wanted, places = np.unique(indices[here], return_inverse=True)
        near = unit64(bank[wanted])[places.reshape(indices[here].shape)]
        cosines[here] = np.einsum("qkc,qc->qk", near, unit64(queries[here]))
    return cosines


def ordered(similarity: Similarity, indices: Indices) -> tuple[Similarity, Indices]:
    """Most similar first, of equals the first in the bank."""
    order = np.lexsort((indices, -similarity), axis=1)
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(indices, order, 1)


def scan(bank: Bank, queries: Queries, k: int) -> tuple[Similarity, Indices]:
    """The k nearest by float32, block by block, on a GPU where faiss finds one."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    gpu = faiss.StandardGpuResources() if k <= 2048 and gpus() else None
    wanted = unit(queries)
    best: tuple[np.ndarray, np.ndarray] | None = None
    for start, rows in blocks(bank):
        count = min(k, len(rows))
        product = faiss.METRIC_INNER_PRODUCT
        if gpu is None:
            similarity, indices = faiss.knn(wanted, rows, count, metric=product)
        else:
            similarity, indices = faiss.knn_gpu(gpu, wanted, rows, count, metric=product)
        indices = indices + start
        if best is not None:
            similarity = np.concatenate((best[0], similarity), axis=1)
            indices = np.concatenate((best[1], indices), axis=1)
            similarity, indices = ordered(similarity, indices)
        best = similarity[:, :k], indices[:, :k]
    assert best is not None
    return best


def gpus() -> int:
    """Number of GPUs that faiss can use; its CPU builds know of none."""
    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def brute_force(bank: Bank, queries: Queries, k: int) -> tuple[Similarity, Indices]:
    """All rows of the bank in float64: the k nearest, of equals the first.

    Products of matrices say who may be among them; those few are compared one by one, so that
    equal rows have equal similarities wherever they stand.
    """
    N, C = bank.shape
    best, places = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    at_once, rows = max(1, GATHERED // N), max(1, GATHERED // C)
    for first in range(0, len(queries), at_once):
        few = unit64(queries[first : first + at_once])
        products = np.empty((len(few), N))
        for start in range(0, N, rows):
            products[:, start : start + rows] = few @ unit64(bank[start : start + rows]).T
        kth = np.partition(products, N - k, axis=1)[:, N - k]
        for row, similarity in enumerate(products):
            wanted = np.flatnonzero(similarity >= kth[row] - ROUNDING64)[None]
            query = queries[first + row][None]
            exact = ordered(similarities(bank, query, wanted), wanted)
            best[first + row], places[first + row] = exact[0][0, :k], exact[1][0, :k]
    return best, places


def open_cuts(similarity: Similarity, cuts: Sequence[int], whole: bool) -> Bool[np.ndarray, " Q"]:
    """Queries where float32 does not tell which neighbours are the first few, for some number of
    them; `whole`: there are no others than these.
    """
    doubtful = np.zeros(len(similarity), bool)
    for k in cuts:
        if k < similarity.shape[1]:
            doubtful |= similarity[:, k - 1] - similarity[:, k] <= ROUNDING
        elif not whole:
            doubtful[:] = True
    return doubtful


def nearest(
    bank: Bank,
    queries: Queries,
    k: int,
    cuts: Sequence[int] = (),
    itself: Int64[np.ndarray, " Q"] | None = None,
) -> tuple[Similarity, Indices]:
    """Similarities and bank indices of the k nearest, most similar first: exactly those that
    brute force in float64 finds.

    Args:
        bank: (N, C); may be a memory map larger than memory.
        queries: (Q, C).
        k: at most N are given.
        cuts: smaller numbers of neighbours that must be exact too.
        itself: (Q,) the row of the bank that each query is, and which is left out.
    """
    if len(queries) > QUERIES:  # those of one set may be as many as the bank
        parts = [
            nearest(
                bank,
                queries[start : start + QUERIES],
                k,
                cuts,
                None if itself is None else itself[start : start + QUERIES],
            )
            for start in range(0, len(queries), QUERIES)
        ]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    k = min(k, len(bank) - (itself is not None))
    own = int(itself is not None)
    similarity, indices = scan(bank, queries, min(k + own + MARGIN, len(bank)))
    if itself is not None:
        similarity, indices = without_itself(similarity, indices, itself)
    whole = similarity.shape[1] + own >= len(bank)
    doubtful = np.flatnonzero(open_cuts(similarity, [*cuts, k], whole))
    if len(doubtful):
        exact = similarities(bank, queries[doubtful], indices[doubtful])
        exact, places = ordered(exact, indices[doubtful])
        similarity, indices = similarity.astype(np.float64), indices.copy()
        similarity[doubtful], indices[doubtful] = exact, places
        if not whole:  # equals may go on beyond the margin
            rows = doubtful[exact[:, k - 1] - exact[:, -1] <= ROUNDING]
            if len(rows):
                exact, places = brute_force(bank, queries[rows], similarity.shape[1] + own)
                if itself is not None:
                    exact, places = without_itself(exact, places, itself[rows])
                similarity[rows], indices[rows] = exact, places
    return similarity[:, :k], indices[:, :k]


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

    Args:
        kind: `ivf` (inverted lists; builds fast) or `hnsw` (a graph; searches fast, takes memory).
        recall: share of the exact neighbours, in (0, 1].
        sample: queries that it is measured on.
    """

    kind: str = "ivf"
    recall: float = 0.95
    sample: int = 200

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
        for _, rows in blocks(bank):
            index.add(rows)
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
    for _, rows in blocks(bank):
        index.add(rows)
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
