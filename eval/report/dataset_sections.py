"""Sections of the report about the evaluation images as a set: nearest neighbours, and a map of all
of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ssl_xcit.errors import UserError

from ..tasks.masks import resize_image
from ..viz.atlas import Atlas, atlas_fragment, sprites
from ..viz.dataset import evenly_spaced, has_classes
from ..viz.embedding import tsne
from ..viz.grids import GridCell
from ..viz.markup import esc, jpeg_uri, paragraph
from ..viz.neighbors import Queries, neighbor_rows
from .run_features import RunFeatures, for_each_run

NUM_QUERIES = 6
NUM_NEIGHBOURS = 8
NEIGHBOUR_SIDE = 128
ATLAS_SIDE = 64  # pixels of a thumbnail
MIN_IMAGES = 8  # of a map


def of_each(runs: Sequence[RunFeatures], make: Callable[[RunFeatures], str]) -> str:
    """HTML of every run, of several under their names; errors of some are shown.

    Raises:
        UserError: no run has anything.
    """
    made, errors = for_each_run(runs, make)
    html = [
        f"<h3>{esc(features.run.name)}</h3>{part}" if len(runs) > 1 else part
        for features, part in made
    ]
    return "".join([*html, *(paragraph(words, "hint") for words in errors)])


def neighbours_section(features: RunFeatures) -> str:
    """A row for each query: itself, then its nearest neighbours with their cosines."""
    bank, queries = features.bank, features.queries
    chosen = np.asarray(evenly_spaced(len(queries), NUM_QUERIES), np.int64)
    itself = chosen if queries is bank else np.full(len(chosen), -1, np.int64)
    images = replace(queries, rows=queries.rows[chosen], features=queries.features[chosen])
    classes = [images.class_of(i) for i in range(len(images))]
    grid, numbers = neighbor_rows(bank, Queries(images, itself, classes), NUM_NEIGHBOURS)
    rows = []
    for i, row in enumerate(grid):
        assert row.query is not None
        entry = numbers["queries"][images.name(i)]
        first = captioned(row.query, classes[i] or row.query.name, "query", images.name(i))
        hits = [
            captioned(cell, f"{near['similarity']:.2f}", near["class"] or "", near["image"])
            for cell, near in zip(row.cells, entry["neighbours"], strict=True)
        ]
        rows.append(f'<div class="hits"><div class="query">{first}</div>{"".join(hits)}</div>')
    cells = [cell for row in grid for cell in row.cells]
    right = sum(not cell.wrong for cell in cells)
    others = "the others" if queries is bank else "the training images"
    words = (
        f"{len(chosen)} evenly spaced images of {features.data.name}, and the nearest of {others} "
        f"({len(bank):,}) with the cosine of their features."
    )
    if has_classes(bank.source):
        words += f" {right} of {len(cells)} are of the query's class; others have a red frame."
    return paragraph(words, "hint") + "".join(rows)


def captioned(cell: GridCell, words: str, more: str, name: str) -> str:
    """A picture with two lines below it."""
    pixels = cell.picture
    side = max(pixels.shape)
    if side > NEIGHBOUR_SIDE:
        height, width = (max(1, round(NEIGHBOUR_SIDE / side * s)) for s in pixels.shape[:2])
        pixels = resize_image(pixels, height, width)
    return (
        f'<figure class="hit{" wrong" * cell.wrong}" title="{esc(name)}">'
        f'<img src="{jpeg_uri(pixels, 88)}" alt="{esc(words)} {esc(more)}">'
        f"<figcaption>{esc(words)}<br>{esc(more)}</figcaption></figure>"
    )


def atlas_section(features: RunFeatures, number: int, count: int) -> str:
    """The map of a run's evaluation images; several runs share the images that are allowed.

    Raises:
        UserError: there are too few images.
    """
    images = features.queries
    chosen = evenly_spaced(len(images), max(MIN_IMAGES, features.options.max_images // count))
    if len(chosen) < MIN_IMAGES:
        raise UserError(f"a map needs at least {MIN_IMAGES} images, and there are {len(chosen)}")
    labels = images.source.labels if has_classes(images.source) else None
    atlas = Atlas(
        tsne(np.asarray(images.features[np.asarray(chosen)])),
        [images.name(i) for i in chosen],
        None if labels is None else labels[images.rows[chosen]],
        images.source.class_names,
        sprites((images.picture(i) for i in chosen), ATLAS_SIDE),
        ATLAS_SIDE,
    )
    words = (
        f"{len(chosen):,} images of {features.data.name}: those that the backbone finds alike lie "
        "close to each other (t-SNE of the features)."
    )
    return paragraph(words, "hint") + atlas_fragment(atlas, f"atlas-{number}")
