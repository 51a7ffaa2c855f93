"""The parts of the report that show the evaluation images as a set: nearest neighbours, and a map
of all of them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ssl_xcit.errors import UserError

from ..masks import resize_image
from ..views import atlas
from ..views.data_set import evenly
from ..views.embedding import embed
from ..views.markup import esc, jpeg_uri, paragraph
from ..views.neighbours import found_by
from .features import Seen, has_classes
from .run import one_line

NUM_QUERIES = 6
NUM_NEIGHBOURS = 8
NEIGHBOUR_SIDE = 128
ATLAS_SIDE = 64  # pixels of a thumbnail
LEAST = 8  # images that make a map


def of_each(seen: Sequence[Seen], make: Callable[[Seen], str]) -> str:
    """HTML of every run under its name; what fails is said, and raised where nothing is left.

    Raises:
        UserError: it fails for all of several runs.
    """
    if len(seen) == 1:
        return make(seen[0])
    made, errors = [], []
    for each in seen:
        try:
            made.append(f"<h3>{esc(each.run.name)}</h3>{make(each)}")
        except Exception as error:
            errors.append(f"{each.run.name}: {one_line(error)}")
    if not made:
        raise UserError("; ".join(errors))
    return "".join(made) + "".join(paragraph(words, "hint") for words in errors)


def neighbours_part(seen: Sequence[Seen]) -> str:
    """The nearest images to a few of the evaluation images, by each run."""
    return of_each(seen, neighbours_of)


def neighbours_of(seen: Seen) -> str:
    """A row for each query: itself, then its neighbours with their cosines."""
    bank, queries = seen.bank, seen.queries
    chosen = np.asarray(evenly(len(queries), NUM_QUERIES), np.int64)
    itself = chosen if queries is bank else np.full(len(chosen), -1, np.int64)
    indices, similarity = found_by(bank.features, queries.features[chosen], itself, NUM_NEIGHBOURS)
    rows, right, total = [], 0, 0
    for query, near, values in zip(
        chosen.tolist(), indices.tolist(), similarity.tolist(), strict=True
    ):
        wanted = queries.class_of(query)
        hits = []
        for i, value in zip(near, values, strict=True):
            wrong = wanted is not None and bank.class_of(i) != wanted
            right, total = right + (not wrong), total + 1
            hits.append(
                shown(bank.picture(i), f"{value:.2f}", bank.class_of(i) or "", bank.name(i), wrong)
            )
        own = shown(queries.picture(query), wanted or queries.short_name(query), "query",
                    queries.name(query), False)  # fmt: skip
        rows.append(f'<div class="hits"><div class="query">{own}</div>{"".join(hits)}</div>')
    where = "the others" if queries is bank else "the training images"
    words = (
        f"{len(chosen)} evenly spaced images of {seen.data.name}, and the nearest of {where} "
        f"({len(bank):,}) with the cosine of their features."
    )
    if has_classes(bank):
        words += f" {right} of {total} are of the query's class; others have a red frame."
    return paragraph(words, "hint") + "".join(rows)


def shown(pixels: np.ndarray, words: str, more: str, name: str, wrong: bool) -> str:
    """A picture with two lines below it."""
    side = max(pixels.shape)
    if side > NEIGHBOUR_SIDE:
        scale = NEIGHBOUR_SIDE / side
        height, width = (max(1, round(scale * s)) for s in pixels.shape[:2])
        pixels = resize_image(pixels, height, width)
    return (
        f'<figure class="hit{" wrong" * wrong}" title="{esc(name)}">'
        f'<img src="{jpeg_uri(pixels, 88)}" alt="{esc(words)} {esc(more)}">'
        f"<figcaption>{esc(words)}<br>{esc(more)}</figcaption></figure>"
    )


def atlas_part(seen: Sequence[Seen]) -> str:
    """A map of the evaluation images for each run."""
    numbers = {id(each): number for number, each in enumerate(seen)}
    return of_each(seen, lambda each: atlas_of(each, numbers[id(each)], len(seen)))


def atlas_of(seen: Seen, number: int, count: int) -> str:
    """The map of one run; several share the images that are allowed.

    Raises:
        UserError: there are too few images.
    """
    shelf = seen.queries
    chosen = evenly(len(shelf), max(LEAST, seen.options.max_images // count))
    if len(chosen) < LEAST:
        raise UserError(f"{len(chosen)} images make no map; {LEAST} do")
    labels = shelf.source.labels
    made = atlas.Atlas(
        embed(np.asarray(shelf.features[np.asarray(chosen)])),
        [shelf.name(i) for i in chosen],
        labels[shelf.rows[chosen]] if labels is not None and has_classes(shelf) else None,
        shelf.source.class_names,
        atlas.sprites((shelf.picture(i) for i in chosen), ATLAS_SIDE),
        ATLAS_SIDE,
    )
    words = (
        f"{len(chosen):,} images of {seen.data.name}: those that the backbone finds alike lie "
        "close to each other (t-SNE of the features)."
    )
    return paragraph(words, "hint") + atlas.fragment(made, f"atlas-{number}")
