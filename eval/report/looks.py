"""The parts of the report that show how single images are looked at: attention and components of
fixed images over time, channel attention.

A run leaves pictures of its way in `RUN/pictures/`; of a run that has none they are drawn by the
newest checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_xcit.errors import UserError

from ..views.data_set import evenly
from ..views.markup import esc, file_uri, jpeg_uri, paragraph
from ..views.pictures import visible
from ..views.snapshots import FOLDER, INDEX, Shown, Snapshots, read_sized
from .features import Seen
from .run import Run, is_number, one_line

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
class Film:
    """Fixed images, and what was seen of them at several steps; pictures are URIs.

    Args:
        names: of the images.
        labels: likewise, for people; images of a class have the same.
        images: themselves.
        moments: by step.
        note: where they are from, and what was left out.
    """

    names: list[str]
    labels: list[str]
    images: list[str]
    moments: list[Moment]
    note: str


def film_of(seen: Seen, budget: int) -> Film:
    """What the run has left, else drawn now.

    Raises:
        UserError: neither can be done.
    """
    kept = seen.once("kept film", lambda: kept_film(seen.run, budget))
    return kept if kept is not None else seen.once("film", lambda: drawn_film(seen))


def kept_film(run: Run, budget: int) -> Film | None:
    """From `pictures/index.json`, with as many moments, evenly spaced, as go into the budget; None
    where there are none. Files outside the folder are not looked at.
    """
    folder = run.path / FOLDER
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        images = [
            (str(each["name"]), str(each["label"] or Path(each["name"]).name), str(each["file"]))
            for each in content["images"]
        ]
        moments = [one for one in content["moments"] if type(one["step"]) is int]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{FOLDER}/{INDEX} cannot be read: {one_line(error)}")
        return None
    if not images or not moments:
        return None
    weights = [
        sum(size_of(folder, file) for kind, _ in KINDS for file in files_of(one, kind, len(images)))
        for one in moments
    ]
    count = len(moments)
    while count > 2 and sum(weights[i] for i in evenly(len(moments), count)) > budget:
        count -= 1
    chosen = [moments[i] for i in evenly(len(moments), count)]
    note = "Drawn while the run was training, by the teacher."
    if count < len(moments):
        note += f" {count} of {len(moments)} moments are shown."
    return Film(
        [name for name, _, _ in images],
        [label for _, label, _ in images],
        [picture_at(folder, file) for _, _, file in images],
        [moment_of(folder, one, len(images)) for one in chosen],
        note,
    )


def files_of(moment: dict[str, Any], kind: str, count: int) -> list[str]:
    """One for each image."""
    found = moment.get(kind)
    names = [str(name) for name in found] if isinstance(found, list) else []
    return [*names, *[""] * count][:count]


def moment_of(folder: Path, content: dict[str, Any], count: int) -> Moment:
    """With its pictures."""
    maps, components = (
        [picture_at(folder, name) for name in files_of(content, kind, count)] for kind, _ in KINDS
    )
    entropy = content.get("entropy")
    values = entropy if isinstance(entropy, list) else []
    return Moment(content["step"], maps, components, [float(v) for v in values if is_number(v)])


def inside(folder: Path, name: str) -> Path | None:
    """A file of the folder; None for any other place."""
    path = (folder / name).resolve()
    return path if name and path.is_relative_to(folder.resolve()) else None


def size_of(folder: Path, name: str) -> int:
    """Bytes; 0 where there is no file."""
    path = inside(folder, name)
    return path.stat().st_size if path is not None and path.is_file() else 0


def picture_at(folder: Path, name: str) -> str:
    """As a URI; empty where it cannot be read."""
    path = inside(folder, name)
    if path is None:
        return ""
    try:
        return file_uri(path, SIDE)
    except OSError:
        return ""


def drawn_film(seen: Seen) -> Film:
    """One moment, by the newest checkpoint, of evenly spaced evaluation images.

    Raises:
        UserError: there is no checkpoint, or there are no images.
    """
    shelf, frozen = seen.queries, seen.frozen
    chosen = evenly(len(shelf), NUM_IMAGES)
    patch = frozen.backbone.patch_size
    side = max(SIDE // patch, 1) * patch
    artist = Snapshots(images=len(chosen), size=SIDE)
    artist.shown = [
        Shown(
            shelf.name(i),
            shelf.class_of(i),
            read_sized(shelf.source, int(shelf.rows[i]), frozen.how, side, patch),
        )
        for i in chosen
    ]
    looked = artist.seen(frozen)
    number = "".join(c for c in seen.checkpoint.stem if c.isdigit())
    moment = Moment(
        int(number) if number else seen.run.step,
        [jpeg_uri(picture) for picture in looked.attention],
        [jpeg_uri(picture) for picture in looked.pca],
        looked.entropy,
    )
    return Film(
        [shown.name for shown in artist.shown],
        [shown.label or Path(shown.name).name for shown in artist.shown],
        [jpeg_uri(visible(shown.pixels)) for shown in artist.shown],
        [moment],
        f"The run has left no pictures of its way: drawn by {seen.checkpoint.name}.",
    )


def strip_part(seen: Sequence[Seen]) -> str:
    """Rows of images, columns of moments; of several runs a column for the newest of each.

    Raises:
        UserError: no run has pictures.
    """
    films, missing = films_of(seen)
    names = {id(film): each.run.name for each, film in films}
    notes = [
        paragraph((f"{names[id(film)]}: " if len(seen) > 1 else "") + film.note, "hint")
        for _, film in films
    ]
    notes += [paragraph(words, "hint") for words in missing]
    if len(seen) == 1:
        ((_, film),) = films
        columns = [(f"step {m.step:,}", m) for m in film.moments]
        return "".join(notes) + strip(film.labels, film.images, columns)
    first = films[0][1]
    if all(film.names == first.names for _, film in films):
        columns = [
            (f"{names[id(f)]}, step {f.moments[-1].step:,}", f.moments[-1]) for _, f in films
        ]
        return "".join(notes) + strip(first.labels, first.images, columns)
    return "".join(notes) + "".join(
        f"<h3>{esc(names[id(film)])}</h3>"
        + strip(film.labels, film.images, [(f"step {film.moments[-1].step:,}", film.moments[-1])])
        for _, film in films
    )


def films_of(seen: Sequence[Seen]) -> tuple[list[tuple[Seen, Film]], list[str]]:
    """Those that there are, and why others are missing.

    Raises:
        UserError: there is none.
    """
    films, missing = [], []
    for each in seen:
        try:
            films.append((each, film_of(each, BUDGET // len(seen))))
        except Exception as error:
            if len(seen) == 1:
                raise
            missing.append(f"{each.run.name}: {one_line(error)}")
    if not films:
        raise UserError("; ".join(missing))
    return films, missing


def strip(
    labels: Sequence[str], images: Sequence[str], columns: Sequence[tuple[str, Moment]]
) -> str:
    """Both kinds, of which one is seen where there are several columns; a click makes a picture
    large.
    """
    switches = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{"false" if n else "true"}">'
        f"{esc(title)}</button>"
        for n, (kind, title) in enumerate(KINDS)
    )
    head = "".join(f"<th>{esc(title)}</th>" for title, _ in columns)
    rows = []
    for row, (label, image) in enumerate(zip(labels, images, strict=True)):
        cells = "".join(
            "<td>"
            + "".join(
                picture(uris[row], f"{label}: {title.lower()}, {when}", kind)
                for (kind, title), uris in zip(KINDS, (m.attention, m.pca), strict=True)
            )
            + "</td>"
            for when, m in columns
        )
        own = picture(image, label, "image")
        rows.append(f'<tr><th scope="row">{own}<span>{esc(label)}</span></th>{cells}</tr>')
    return (
        f'<div class="strip" data-shown="{"attention" if len(columns) > 1 else "both"}">'
        f'<div class="switch">{switches}</div><div class="wide"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def picture(uri: str, words: str, kind: str) -> str:
    """An image, or that there is none."""
    if not uri:
        return f'<span class="gap {esc(kind)}">missing</span>'
    return f'<img class="{esc(kind)}" src="{uri}" alt="{esc(words)}" tabindex="0">'


def entropy_data(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Of channel attention: for each run steps, and the entropy of each block at each.

    Raises:
        UserError: it is not known of any run.
    """
    found = []
    for number, each in enumerate(seen):
        try:
            moments = [m for m in film_of(each, BUDGET // len(seen)).moments if m.entropy]
        except Exception:
            if len(seen) == 1:
                raise
            continue
        if moments:
            found.append(
                {
                    "run": number,
                    "name": each.run.name,
                    "steps": [m.step for m in moments],
                    "values": [[float(f"{v:.6g}") for v in m.entropy] for m in moments],
                }
            )
    if not found:
        raise UserError("the pictures of the run do not say it")
    return found
