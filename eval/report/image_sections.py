"""Content of the report's sections with images: attention and components of fixed images over
training, channel attention, nearest neighbours, and the map of all.

A run leaves pictures of its way in `RUN/pictures/`; of a run that has none they are drawn by the
newest checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.errors import UserError

from ..viz.atlas import Atlas, atlas_fragment, sprites
from ..viz.dataset import has_classes
from ..viz.embedding import tsne
from ..viz.markup import file_uri, jpeg_uri
from ..viz.neighbors import Queries, neighbor_rows
from ..viz.pictures import Picture, thumbnail, visible
from ..viz.snapshots import FOLDER, INDEX, FixedImage, Snapshots, read_sized
from .figures import Entropy, entropy_figure
from .run_features import RunFeatures, for_each_run
from .run_reader import Run, is_number, message_of

Content = dict[str, Any]  # of a section, by the arguments of its macro
SIDE = 224  # long side of pictures inside the page
BUDGET = 2_600_000  # bytes of the files of all pictures; moments are left out above it
NUM_IMAGES = 6  # drawn where the run has left none
KINDS = {"attention": "Class attention", "pca": "Components of the patches"}
NUM_QUERIES = 6
NUM_NEIGHBOURS = 8
NEIGHBOUR_SIDE = 128
ATLAS_SIDE = 64  # pixels of a thumbnail
MIN_IMAGES = 8  # of a map


class Moment(NamedTuple):
    """Pictures at a step, by kind one for each image, as URIs; empty where one is missing."""

    step: int
    pictures: dict[str, list[str]]
    entropy: list[float]  # of channel attention, by block


class Timeline(NamedTuple):
    """Fixed images, and their pictures at several steps."""

    names: list[str]  # of the images
    labels: list[str]  # likewise, for people; images of a class have the same
    images: list[str]  # themselves
    moments: list[Moment]  # by step
    note: str  # where they are from, and what was left out


def timelines_of(
    runs: Sequence[RunFeatures],
) -> tuple[list[tuple[RunFeatures, Timeline]], list[str]]:
    """The pictures that each run has left, else drawn now, and why others have none; raises
    UserError where no run has any.
    """

    def timeline(features: RunFeatures) -> Timeline:
        budget = BUDGET // len(runs)
        recorded = features.once("recorded", lambda: recorded_timeline(features.run, budget))
        return recorded or features.once("drawn", lambda: drawn_timeline(features))

    return for_each_run(runs, timeline)


def recorded_timeline(run: Run, budget: int) -> Timeline | None:
    """The timeline in `pictures/index.json`, with as many moments, evenly spaced, as go into the
    budget; None where there is none. Files outside the folder are not read.
    """
    folder = run.path / FOLDER
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = [str(entry["name"]) for entry in content["images"]]
        labels = [str(entry["label"] or Path(entry["name"]).name) for entry in content["images"]]
        files = [inside(folder, entry["file"]) for entry in content["images"]]
        moments = [moment for moment in content["moments"] if type(moment["step"]) is int]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{FOLDER}/{INDEX} cannot be read: {message_of(error)}")
        return None
    if not names or not moments:
        return None

    def files_of(moment: Content, kind: str) -> list[Path | None]:
        listed = moment.get(kind)
        found = [inside(folder, name) for name in listed] if isinstance(listed, list) else []
        return [*found, *[None] * len(names)][: len(names)]

    sizes = [
        sum(file.stat().st_size for kind in KINDS for file in files_of(moment, kind) if file)
        for moment in moments
    ]
    count = len(moments)
    while count > 2 and sum(sizes[i] for i in evenly_spaced(len(moments), count)) > budget:
        count -= 1
    kept = [moments[i] for i in evenly_spaced(len(moments), count)]
    note = "Drawn while the run was training, by the teacher."
    if len(kept) < len(moments):
        note += f" {len(kept)} of {len(moments)} moments are shown."
    return Timeline(
        names,
        labels,
        [picture_at(file) for file in files],
        [
            Moment(
                moment["step"],
                {kind: [picture_at(file) for file in files_of(moment, kind)] for kind in KINDS},
                [float(v) for v in moment.get("entropy") or [] if is_number(v)],
            )
            for moment in kept
        ],
        note,
    )


def inside(folder: Path, name: Any) -> Path | None:
    """A file of the folder; None for any other place, and where there is none."""
    path = (folder / str(name)).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def picture_at(file: Path | None) -> str:
    """A picture as a URI; empty where it cannot be read."""
    try:
        return "" if file is None else file_uri(file, SIDE)
    except OSError:
        return ""


def drawn_timeline(features: RunFeatures) -> Timeline:
    """One moment, by the newest checkpoint, of evenly spaced evaluation images; raises UserError
    where there is no checkpoint, or there are no images.
    """
    queries, extractor = features.queries, features.extractor
    patch = extractor.backbone.patch_size
    side = max(SIDE // patch, 1) * patch
    snapshots = Snapshots(size=SIDE)
    snapshots.images = [
        FixedImage(
            queries.name(i),
            queries.class_of(i),
            read_sized(queries.source, int(queries.rows[i]), extractor.preprocess, side, patch),
        )
        for i in evenly_spaced(len(queries), NUM_IMAGES)
    ]
    panels = snapshots.draw(extractor)
    digits = "".join(c for c in features.checkpoint.stem if c.isdigit())
    drawn = {"attention": panels.attention, "pca": panels.pca}
    moment = Moment(
        int(digits) if digits else features.run.step,
        {kind: [jpeg_uri(picture) for picture in pictures] for kind, pictures in drawn.items()},
        panels.entropy,
    )
    return Timeline(
        [image.name for image in snapshots.images],
        [image.label or Path(image.name).name for image in snapshots.images],
        [jpeg_uri(visible(image.pixels)) for image in snapshots.images],
        [moment],
        f"The run has left no pictures of its way: drawn by {features.checkpoint.name}.",
    )


def pictures_section(runs: Sequence[RunFeatures]) -> Content:
    """Rows of images, columns of moments; of several runs a column for the newest of each. Raises
    UserError where no run has pictures.
    """
    timelines, errors = timelines_of(runs)
    first = timelines[0][1]
    if len(runs) == 1:
        columns = [(f"step {moment.step:,}", moment) for moment in first.moments]
        return {"runs": [("", strip(first, columns))], "notes": [first.note], "kinds": KINDS}
    notes = [f"{features.run.name}: {timeline.note}" for features, timeline in timelines]
    newest = [(f.run.name, f"step {t.moments[-1].step:,}", t) for f, t in timelines]
    if all(timeline.names == first.names for _, timeline in timelines):
        columns = [(f"{name}, {step}", t.moments[-1]) for name, step, t in newest]
        strips = [("", strip(first, columns))]
    else:
        strips = [(name, strip(t, [(step, t.moments[-1])])) for name, step, t in newest]
    return {"runs": strips, "notes": [*notes, *errors], "kinds": KINDS}


def strip(timeline: Timeline, columns: Sequence[tuple[str, Moment]]) -> Content:
    """A row an image, in each column its pictures by kind."""
    rows = [
        {
            "label": label,
            "image": image,
            "cells": [{kind: m.pictures[kind][row] for kind in KINDS} for _, m in columns],
        }
        for row, (label, image) in enumerate(zip(timeline.labels, timeline.images, strict=True))
    ]
    return {"columns": [title for title, _ in columns], "rows": rows}


def channels_section(runs: Sequence[RunFeatures]) -> Content:
    """Entropy of channel attention over depth and training; raises UserError where none has it."""
    numbers = {id(features): number for number, features in enumerate(runs)}
    curves = []
    for features, timeline in timelines_of(runs)[0]:
        if moments := [m for m in timeline.moments if m.entropy]:
            values = [[float(f"{v:.6g}") for v in m.entropy] for m in moments]
            steps = [m.step for m in moments]
            curves.append(Entropy(features.run.name, numbers[id(features)], steps, values))
    if not curves:
        raise UserError("the pictures of the run do not say it")
    return {"figure": entropy_figure(curves)}


def neighbours_section(features: RunFeatures) -> Content:
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
        neighbours = numbers["queries"][images.name(i)]["neighbours"]
        first = classes[i] or row.query.name
        hits = [captioned(row.query.picture, first, "query", images.name(i), "query")]
        for cell, near in zip(row.cells, neighbours, strict=True):
            words, kind = f"{near['similarity']:.2f}", "wrong" if cell.wrong else ""
            hits.append(captioned(cell.picture, words, near["class"] or "", near["image"], kind))
        rows.append(hits)
    wrong = [cell.wrong for row in grid for cell in row.cells]
    others = "the others" if queries is bank else "the training images"
    words = (
        f"{len(chosen)} evenly spaced images of {features.data.name}, and the nearest of {others} "
        f"({len(bank):,}) with the cosine of their features."
    )
    if has_classes(bank.source):
        words += f" {wrong.count(False)} of {len(wrong)} are of the query's class; others have a "
        words += "red frame."
    return {"words": words, "rows": rows}


def captioned(picture: Picture, words: str, more: str, name: str, kind: str) -> Content:
    """A picture with two lines below it."""
    uri = jpeg_uri(thumbnail(picture, NEIGHBOUR_SIDE), 88)
    return {"uri": uri, "words": words, "more": more, "name": name, "kind": kind}


def atlas_section(features: RunFeatures, number: int, count: int) -> Content:
    """The map of a run's images, of several runs a share each; raises UserError for too few."""
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
    return {"words": words, "map": atlas_fragment(atlas, f"atlas-{number}")}
