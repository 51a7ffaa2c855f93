"""Nearest neighbours across a data set: which images the backbone holds for alike.

Cosine similarity of class tokens, as in the k-NN classifier of DINO (arXiv:2104.14294, section 4.1)
but looked at instead of counted; exact, through `search.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from ssl_xcit.data.sources import Files, Subset
from ssl_xcit.errors import UserError

from ..frozen import Frozen
from ..search import nearest, ordered, similarities
from .data_set import DataSet, Shelf, class_name, evenly, rows_of, shelf
from .grids import Cell, Row

QUERIES = 20  # images of the data set itself that are asked with


def found_by(
    bank: Float[np.ndarray, "N C"],
    queries: Float[np.ndarray, "Q C"],
    itself: Int64[np.ndarray, " Q"],
    k: int,
) -> tuple[Int64[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Rows of the bank and their cosines, -1 to 1: the k nearest to each query, the highest first,
    of equals the first in the bank. The row that a query is itself is left out, its duplicates are
    not.

    Args:
        bank: (N, C) features; may be a memory map.
        queries: (Q, C).
        itself: the row of the bank that each query is; -1: none.
        k: at most N - 1 are given.

    Raises:
        UserError: the bank has fewer than two rows.
    """
    if len(bank) < 2:
        raise UserError(f"nearest neighbours: {len(bank)} images; there must be at least 2")
    k = min(k, len(bank) - 1)
    if not len(queries):
        return np.zeros((0, k), np.int64), np.zeros((0, k))
    _, indices = nearest(bank, queries, k, itself=itself)
    similarity, indices = ordered(similarities(bank, queries, indices), indices)
    return indices, similarity.clip(-1.0, 1.0)


class Asked(NamedTuple):
    """Queries, which row of the bank each is (-1: none), and their classes where they are known."""

    shelf: Shelf
    itself: Int64[np.ndarray, " Q"]
    classes: list[str | None]


def asked(
    frozen: Frozen, data: DataSet, bank: Shelf, files: Sequence[Path] | None, most: int
) -> Asked:
    """What neighbours are looked for of.

    Queries of the set itself are of its other part, where there is one, as in k-NN classification.

    Args:
        frozen: the backbone.
        data: the set.
        bank: its images that are searched.
        files: queries; None: images of the set itself.
        most: of these.
    """
    if files is not None:
        return asked_by_files(frozen, data, bank, files)
    if data.others is None:
        some = np.asarray(evenly(len(bank), most), np.int64)
        queries = replace(bank, rows=bank.rows[some], features=bank.features[some])
    else:
        source = Subset(data.others, np.asarray(evenly(len(data.others), most)))
        queries, some = shelf(frozen, source, data, "queries"), None
    itself = np.full(len(queries), -1, np.int64) if some is None else some
    return Asked(queries, itself, [queries.class_of(i) for i in range(len(queries))])


def asked_by_files(frozen: Frozen, data: DataSet, bank: Shelf, files: Sequence[Path]) -> Asked:
    """Those that are images of the set have their class, and are not found as their own
    neighbours.
    """
    queries = shelf(frozen, Files([str(file) for file in files]), data, "queries")
    here = [files[row] for row in queries.rows]
    known = rows_of(bank.source, here)
    places = {int(row): i for i, row in enumerate(bank.rows)}
    itself = [places.get(known.get(file, -1), -1) for file in here]
    classes = {file: class_name(bank.source, row) for file, row in known.items()}
    if data.others is not None:
        others = rows_of(data.others, here)
        classes |= {file: class_name(data.others, row) for file, row in others.items()}
    return Asked(queries, np.asarray(itself, np.int64), [classes.get(file) for file in here])


def looked_up(bank: Shelf, queries: Asked, k: int) -> tuple[list[Row], dict[str, Any]]:
    """A row of pictures for each query, and the same in numbers."""
    indices, similarity = found_by(bank.features, queries.shelf.features, queries.itself, k)
    rows: list[Row] = []
    told: dict[str, Any] = {}
    same: list[bool] = []
    for number, (near, values) in enumerate(
        zip(indices.tolist(), similarity.tolist(), strict=True)
    ):
        wanted = queries.classes[number]
        cells, found = [], []
        for i, value in zip(near, values, strict=True):
            has = bank.class_of(i)
            wrong = wanted is not None and has is not None and wanted != has
            if wanted is not None and has is not None:
                same.append(not wrong)
            words = f"{value:.2f} {has or ''}".rstrip()
            cells.append(Cell(bank.picture(i), words, bank.short_name(i), wrong))
            found.append({"image": bank.name(i), "similarity": round(value, 6), "class": has})
        name = queries.shelf.short_name(number)
        rows.append(Row("", Cell(queries.shelf.picture(number), wanted or "query", name), cells))
        told[queries.shelf.name(number)] = {"class": wanted, "neighbours": found}
    return rows, {
        "images": len(bank),
        "k": int(indices.shape[1]),
        "same_class": round(sum(same) / len(same), 6) if same else None,
        "queries": told,
    }
