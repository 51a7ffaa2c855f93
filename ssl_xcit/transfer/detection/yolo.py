"""YOLO's boxes and polygons: a text file for each image, a line for each object."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ssl_xcit.data.folders import image_files
from ssl_xcit.data.labels import normalised
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.annotated import lines_of, listed_names, parts_in, stem_of
from ssl_xcit.transfer.detection.records import (
    Found,
    Object,
    Part,
    Record,
    as_mapping,
    clipped,
    is_polygon,
)
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track


def yolo_folder(home: Path) -> Found | None:
    """Read `labels/*.txt` of `images`, each perhaps with `train` and `test` or `val`, which may
    hold `images` and `labels` as well. An image without a file has no objects.
    """
    places = parts_in(home, "images", "labels")
    if not places or not any((home / places["train"][1]).rglob("*.txt")):
        return None
    names = yolo_names(home)
    parts = {
        part: read_yolo(home, images, labels, names) for part, (images, labels) in places.items()
    }
    return Found(parts, names, shares=True)


def yolo_names(home: Path) -> list[str] | None:
    """Return class names of `data.yaml` or of `classes.txt`; None: there are none.

    Raises:
        UserError: the file cannot be read.
    """
    for file in (home / "data.yaml", home / "dataset.yaml", *sorted(home.glob("*.yaml"))):
        if not file.is_file():
            continue
        try:
            names = as_mapping(yaml.safe_load(file.read_bytes())).get("names")
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file}: not a yaml file ({' '.join(str(error).split())})") from error
        if isinstance(names, Mapping):
            ids = [key for key in names if isinstance(key, int)]
            return [str(names.get(i, i)) for i in range(max(ids, default=-1) + 1)]
        if isinstance(names, list):
            return [str(name) for name in names]
    return listed_names(home) or listed_names(home / "labels")


def read_yolo(home: Path, images: str, labels: str, names: Sequence[str] | None) -> Part:
    """Read the text files of one part."""
    part = Part(home)
    files = {stem_of(name): name for name in image_files(home / images)}
    texts = {
        stem_of(str(file.relative_to(home / labels))): file
        for file in sorted((home / labels).rglob("*.txt"))
        if file.name not in ("classes.txt", "class_names.txt", "labels.txt")
    }
    part.left_out += [f"{texts[key]}: no image" for key in texts if key not in files]
    for key, name in track(files.items(), "annotations", len(files), shown_in_terminal()):
        record = Record(os.path.join(images, name))
        try:
            lines = lines_of(texts[key]) if key in texts else []
        except UserError as error:
            part.left_out.append(str(error))
            continue
        for number, line in enumerate(lines, 1):
            try:
                record.objects.append(yolo_object(line, names))
            except ValueError as error:
                part.left_out.append(f"{texts[key].name}: line {number}: {error}")
        part.records.append(record)
    return part


def yolo_object(line: str, names: Sequence[str] | None) -> Object:
    """Return the object of a line: class, centre and size, or class and a polygon, as shares of the
    sides; raises ValueError.
    """
    first, *rest = line.split()
    if not first.isdecimal() or (names is not None and int(first) >= len(names)):
        count = "a whole number" if names is None else f"one of 0 to {len(names) - 1}"
        raise ValueError(f"class {first} is not {count}")
    name = normalised(names[int(first)]) if names is not None else str(int(first))
    values = [float(v) for v in rest]
    if len(values) != 4 and not is_polygon(values):
        raise ValueError(f"{len(values)} numbers after the class, not 4 or a polygon")
    if max(values) > 2:
        raise ValueError("pixels, where shares of the sides are needed")
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return Object(name, clipped(box, 1, 1))
    xs, ys = values[::2], values[1::2]
    box = (min(xs), min(ys), max(xs), max(ys))
    return Object(name, clipped(box, 1, 1), False, json.dumps([values]))
