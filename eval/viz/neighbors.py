"""Find nearest neighbours across a data set: the images that the backbone holds for alike.

Cosine similarity of class tokens, as in the k-NN classifier of DINO (arXiv:2104.14294, section 4.1)
but shown instead of counted; exact, through `features/neighbors.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.sources import Files, Subset
from ssl_xcit.errors import UserError

from ..features.extractor import FeatureExtractor
from ..features.neighbors import nearest
from .dataset import DataSet, ImageFeatures, class_name, image_features, rows_of
from .grids import GridCell, GridRow

QUERIES = 20  # images of the data set itself that are queries


def nearest_rows(
    bank: Float[np.ndarray, "N C"],
    queries: Float[np.ndarray, "Q C"],
    itself: Int64[np.ndarray, " Q"],
    k: int,
) -> tuple[Int64[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Rows of the bank (may be a memory map) and their cosines, -1 to 1: the k nearest to each
    query, the highest first, of equals the first in the bank; at most N - 1 are given. The row that
    a query is itself (-1: none) is left out, its duplicates are not. Raises UserError where the
    bank has fewer than two rows.
    """
    if len(bank) < 2:
        raise UserError(f"nearest neighbours: {len(bank)} images; there must be at least 2")
    k = min(k, len(bank) - 1)
    if not len(queries):
        return np.zeros((0, k), np.int64), np.zeros((0, k))
    similarity, indices = nearest(bank, queries, k, itself)
    return indices, similarity.clip(-1.0, 1.0)


class Queries(NamedTuple):
    """Queries, which row of the bank each is (-1: none), and their classes where they are known."""

    images: ImageFeatures
    itself: Int64[np.ndarray, " Q"]
    classes: list[str | None]


def make_queries(
    extractor: FeatureExtractor,
    data: DataSet,
    bank: ImageFeatures,
    files: Sequence[Path] | None,
    most: int,
) -> Queries:
    """Queries from `files`, or, where that is None, at most `most` of the set itself: from its
    other part, where there is one, as in k-NN classification. Files that are images of the set have
    their class, and are no neighbours of themselves.
    """
    if files is not None:
        queries = image_features(extractor, Files([str(file) for file in files]), data, "queries")
        here = [files[row] for row in queries.rows]
        known = rows_of(bank.source, here)
        places = {int(row): i for i, row in enumerate(bank.rows)}
        itself = np.asarray([places.get(known.get(file, -1), -1) for file in here], np.int64)
        classes = {file: class_name(bank.source, row) for file, row in known.items()}
        if data.others is not None:
            others = rows_of(data.others, here)
            classes |= {file: class_name(data.others, row) for file, row in others.items()}
        return Queries(queries, itself, [classes.get(file) for file in here])
    if data.others is None:
        itself = np.asarray(evenly_spaced(len(bank), most), np.int64)
        queries = replace(bank, rows=bank.rows[itself], features=bank.features[itself])
    else:
        source = Subset(data.others, np.asarray(evenly_spaced(len(data.others), most)))
        queries = image_features(extractor, source, data, "queries")
        itself = np.full(len(queries), -1, np.int64)
    return Queries(queries, itself, [queries.class_of(i) for i in range(len(queries))])


def neighbor_rows(
    bank: ImageFeatures, queries: Queries, k: int
) -> tuple[list[GridRow], dict[str, Any]]:
    """A row of pictures for each query, and the same in numbers."""
    indices, similarity = nearest_rows(bank.features, queries.images.features, queries.itself, k)
    rows: list[GridRow] = []
    numbers: dict[str, Any] = {}
    same: list[bool] = []
    for query, wanted in enumerate(queries.classes):
        cells, neighbors = [], []
        for i, value in zip(indices[query].tolist(), similarity[query].tolist(), strict=True):
            own = bank.class_of(i)
            wrong = wanted is not None and own is not None and wanted != own
            if wanted is not None and own is not None:
                same.append(not wrong)
            words = f"{value:.2f} {own or ''}".rstrip()
            cells.append(GridCell(bank.picture(i), words, bank.short_name(i), wrong))
            neighbors.append({"image": bank.name(i), "similarity": round(value, 6), "class": own})
        images = queries.images
        first = GridCell(images.picture(query), wanted or "query", images.short_name(query))
        rows.append(GridRow("", first, cells))
        numbers[images.name(query)] = {"class": wanted, "neighbours": neighbors}
    return rows, {
        "images": len(bank),
        "k": int(indices.shape[1]),
        "same_class": round(sum(same) / len(same), 6) if same else None,
        "queries": numbers,
    }
