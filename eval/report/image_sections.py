"""Sections of the report about single images: attention and components of fixed images over
training, channel attention.

A run leaves pictures of its way in `RUN/pictures/`; of a run that has none they are drawn by the
newest checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError

from ..viz.dataset import evenly_spaced
from ..viz.markup import esc, file_uri, jpeg_uri, paragraph
from ..viz.pictures import visible
from ..viz.snapshots import FOLDER, INDEX, FixedImage, Snapshots, read_sized
from .run_features import RunFeatures, for_each_run
from .run_reader import Run, is_number, message_of

SIDE = 224  # long side of pictures inside the page
BUDGET = 2_600_000  # bytes of the files of all pictures; moments are left out above it
NUM_IMAGES = 6  # drawn where the run has left none
KINDS = (("attention", "Class attention"), ("pca", "Components of the patches"))


@dataclass
class Moment:
    """Pictures at a step, one of each kind for each image; empty where one is missing."""

    step: int
    attention: list[str]
    pca: list[str]
    entropy: list[float] = field(default_factory=list)


@dataclass
class Timeline:
    """Fixed images, and their pictures at several steps, as URIs."""

    names: list[str]  # of the images
    labels: list[str]  # likewise, for people; images of a class have the same
    images: list[str]  # themselves
    moments: list[Moment]  # by step
    note: str  # where they are from, and what was left out


def timeline_of(features: RunFeatures, budget: int) -> Timeline:
    """The pictures that the run has left, else drawn now.

    Raises:
        UserError: neither can be done.
    """
    recorded = features.once("recorded", lambda: recorded_timeline(features.run, budget))
    return recorded or features.once("drawn", lambda: drawn_timeline(features))


def recorded_timeline(run: Run, budget: int) -> Timeline | None:
    """The timeline in `pictures/index.json`, with as many moments, evenly spaced, as go into the
    budget; None where there is none. Files outside the folder are not read.
    """
    folder = run.path / FOLDER
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        images = [
            (str(entry["name"]), str(entry["label"] or Path(entry["name"]).name), entry["file"])
            for entry in content["images"]
        ]
        moments = [moment for moment in content["moments"] if type(moment["step"]) is int]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{FOLDER}/{INDEX} cannot be read: {message_of(error)}")
        return None
    if not images or not moments:
        return None
    sizes = [
        sum(
            size_of(folder, file)
            for kind, _ in KINDS
            for file in picture_files(m, kind, len(images))
        )
        for m in moments
    ]
    count = len(moments)
    while count > 2 and sum(sizes[i] for i in evenly_spaced(len(moments), count)) > budget:
        count -= 1
    note = "Drawn while the run was training, by the teacher."
    if count < len(moments):
        note += f" {count} of {len(moments)} moments are shown."
    names, labels, files = zip(*images, strict=True)
    return Timeline(
        list(names),
        list(labels),
        [picture_at(folder, str(file)) for file in files],
        [moment_of(folder, moments[i], len(images)) for i in evenly_spaced(len(moments), count)],
        note,
    )


def picture_files(moment: dict[str, Any], kind: str, count: int) -> list[str]:
    """File names of a kind, one for each image; empty where there is none."""
    listed = moment.get(kind)
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    return [*names, *[""] * count][:count]


def moment_of(folder: Path, content: dict[str, Any], count: int) -> Moment:
    """A moment with its pictures."""
    maps, components = (
        [picture_at(folder, name) for name in picture_files(content, kind, count)]
        for kind, _ in KINDS
    )
    entropy = content.get("entropy")
    values = entropy if isinstance(entropy, list) else []
    return Moment(content["step"], maps, components, [float(v) for v in values if is_number(v)])


def path_inside(folder: Path, name: str) -> Path | None:
    """The path of a file of the folder; None for any other place."""
    path = (folder / name).resolve()
    return path if name and path.is_relative_to(folder.resolve()) else None


def size_of(folder: Path, name: str) -> int:
    """Bytes of a file; 0 where there is none."""
    path = path_inside(folder, name)
    return path.stat().st_size if path is not None and path.is_file() else 0


def picture_at(folder: Path, name: str) -> str:
    """A picture as a URI; empty where it cannot be read."""
    path = path_inside(folder, name)
    try:
        return "" if path is None else file_uri(path, SIDE)
    except OSError:
        return ""


def drawn_timeline(features: RunFeatures) -> Timeline:
    """One moment, by the newest checkpoint, of evenly spaced evaluation images.

    Raises:
        UserError: there is no checkpoint, or there are no images.
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
    moment = Moment(
        int(digits) if digits else features.run.step,
        [jpeg_uri(picture) for picture in panels.attention],
        [jpeg_uri(picture) for picture in panels.pca],
        panels.entropy,
    )
    return Timeline(
        [image.name for image in snapshots.images],
        [image.label or Path(image.name).name for image in snapshots.images],
        [jpeg_uri(visible(image.pixels)) for image in snapshots.images],
        [moment],
        f"The run has left no pictures of its way: drawn by {features.checkpoint.name}.",
    )


def pictures_section(runs: Sequence[RunFeatures]) -> str:
    """Rows of images, columns of moments; of several runs a column for the newest of each.

    Raises:
        UserError: no run has pictures.
    """
    timelines, errors = for_each_run(runs, lambda run: timeline_of(run, BUDGET // len(runs)))
    several = len(runs) > 1
    notes = [(f"{f.run.name}: " if several else "") + timeline.note for f, timeline in timelines]
    html = [paragraph(words, "hint") for words in (*notes, *errors)]
    first = timelines[0][1]
    if not several:
        columns = [(f"step {m.step:,}", m) for m in first.moments]
        return "".join([*html, strip(first, columns)])
    newest = [
        (f.run.name, f"step {timeline.moments[-1].step:,}", timeline) for f, timeline in timelines
    ]
    if all(timeline.names == first.names for _, timeline in timelines):
        columns = [(f"{name}, {step}", timeline.moments[-1]) for name, step, timeline in newest]
        return "".join([*html, strip(first, columns)])
    for name, step, timeline in newest:
        html += [f"<h3>{esc(name)}</h3>", strip(timeline, [(step, timeline.moments[-1])])]
    return "".join(html)


def strip(timeline: Timeline, columns: Sequence[tuple[str, Moment]]) -> str:
    """A table of both kinds, of which one is seen where there are several columns; a click enlarges
    a picture.
    """
    switches = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{"false" if n else "true"}">'
        f"{esc(title)}</button>"
        for n, (kind, title) in enumerate(KINDS)
    )
    head = "".join(f"<th>{esc(title)}</th>" for title, _ in columns)
    rows = []
    for row, (label, image) in enumerate(zip(timeline.labels, timeline.images, strict=True)):
        cells = "".join(
            "<td>"
            + "".join(
                img_tag(uris[row], f"{label}: {title.lower()}, {when}", kind)
                for (kind, title), uris in zip(KINDS, (m.attention, m.pca), strict=True)
            )
            + "</td>"
            for when, m in columns
        )
        own = img_tag(image, label, "image")
        rows.append(f'<tr><th scope="row">{own}<span>{esc(label)}</span></th>{cells}</tr>')
    return (
        f'<div class="strip" data-shown="{"attention" if len(columns) > 1 else "both"}">'
        f'<div class="switch">{switches}</div><div class="wide"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def img_tag(uri: str, words: str, kind: str) -> str:
    """An image, or a note that it is missing."""
    if not uri:
        return f'<span class="gap {esc(kind)}">missing</span>'
    return f'<img class="{esc(kind)}" src="{uri}" alt="{esc(words)}" tabindex="0">'


def entropy_data(runs: Sequence[RunFeatures]) -> list[dict[str, Any]]:
    """Entropy of channel attention: for each run steps, and the value of each block at each.

    Raises:
        UserError: it is not known of any run.
    """
    timelines, _ = for_each_run(runs, lambda run: timeline_of(run, BUDGET // len(runs)))
    numbers = {id(features): number for number, features in enumerate(runs)}
    curves = [
        {
            "run": numbers[id(features)],
            "name": features.run.name,
            "steps": [m.step for m in moments],
            "values": [[float(f"{v:.6g}") for v in m.entropy] for m in moments],
        }
        for features, timeline in timelines
        if (moments := [m for m in timeline.moments if m.entropy])
    ]
    if not curves:
        raise UserError("the pictures of the run do not say it")
    return curves
