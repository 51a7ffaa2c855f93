"""COCO's annotations of objects: a json for each part, beside the images or in `annotations`.

Class ids may have gaps. Regions that are annotated as crowd stay apart from other objects.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_xcit.data.folders import TEST_NAMES, TRAIN_NAMES
from ssl_xcit.data.identity import UNKNOWN, sizes_of
from ssl_xcit.data.labels import normalised
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.transfer.detection.records import (
    MAX_SIDE,
    Found,
    Object,
    Part,
    Record,
    as_mapping,
    clipped,
    is_polygon,
)

OTHER_JSON = ("captions", "image_info", "panoptic", "person_keypoints", "stuff")  # of COCO
ROBOFLOW = "_annotations.coco.json"
TRIED = 16  # images of a json that are looked for in each folder


def coco_files(home: Path) -> dict[str, Path] | None:
    """Return the json files for training and for testing; None: there are none.

    Raises:
        UserError: several could be meant.
    """
    files = [
        *sorted(home.glob("annotations/*.json")),
        *sorted(home.glob("*.json")),
        *sorted(home.glob(f"*/{ROBOFLOW}")),
    ]
    files = [
        file
        for file in files
        if not file.name.startswith(OTHER_JSON)
        and (file.parent != home or b'"annotations"' in file.read_bytes())
    ]
    instances = [file for file in files if file.name.startswith("instances")]
    files = instances or files
    if not files:
        return None
    by_name: dict[str, list[Path]] = {}
    for file in files:
        name = file.parent.name if file.name == ROBOFLOW else file.stem
        for word in re.split(r"[^a-z]+", name.lower()):
            by_name.setdefault(word, []).append(file)
    chosen = {
        part: next((by_name[name] for name in names if name in by_name), [])
        for part, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES))
    }
    if not chosen["train"] and len(files) == 1:
        chosen = {"train": files, "test": []}
    if len(chosen["train"]) != 1 or len(chosen["test"]) > 1:
        shown = ", ".join(str(file.relative_to(home)) for file in files[:5])
        raise UserError(
            f"{home}: which file is for training, which for testing ({shown})? Name them: "
            "data.root=FILE.json data.test_root=FILE.json"
        )
    return {part: matches[0] for part, matches in chosen.items() if matches}


def coco_folder(home: Path) -> Found | None:
    """Read COCO's json files in a folder or in its `annotations`."""
    files = coco_files(home)
    if files is None:
        return None
    parts, names = {}, []
    for part, file in files.items():
        parts[part], of_part = read_coco(file)
        names += [name for name in of_part if name not in names]
    return Found(parts, names)


def read_json(file: Path) -> dict[str, Any]:
    """Read annotations.

    Raises:
        UserError: no file, no json, cut short, or without what COCO's have.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise MissingPath(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not whole as json ({error}): was it cut short? Copy it again"
        ) from error
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise UserError(f"{file}: not COCO's annotations of objects: no list `{missing[0]}`")
    assert isinstance(content, dict)
    return content


def read_coco(file: Path, images: Path | None = None) -> tuple[Part, list[str]]:
    """Return the images of a json with their objects, and class names in order of their ids.

    Args:
        file: the json.
        images: folder of the images; None: the first of the usual ones that has them.

    Raises:
        UserError: see `read_json`; two classes or two images have one id, or no image is there.
    """
    content = read_json(file)
    names = category_names(content["categories"], file)
    left_out: list[str] = []
    records: dict[Any, Record] = {}
    by_file: dict[str, Record] = {}
    for row in content["images"]:
        name, key = as_mapping(row).get("file_name"), as_mapping(row).get("id")
        if not isinstance(name, str) or not name or not isinstance(key, int | str):
            left_out.append(f"{file.name}: an image without file_name or id")
            continue
        if key in records and records[key].file != name:
            raise UserError(f"{file}: image id {key} stands for {records[key].file} and {name}")
        sides = [row.get(side) for side in ("height", "width")]
        known = all(isinstance(side, int) and 0 < side < MAX_SIDE for side in sides)
        record = Record(name, *(sides if known else (0, 0)))
        if name in by_file and key not in records:
            left_out.append(f"{file.name}: image id {key}: {name} has another id as well")
        records[key] = by_file.setdefault(name, record)
    folder = images or images_of(file, list(by_file))
    sizes = sizes_of([str(folder / name) for name in by_file])
    absent = {name for name, size in zip(by_file, sizes, strict=True) if size == UNKNOWN}
    left_out += [f"{file.name}: {name}: no such image in {folder}" for name in absent]
    if len(absent) == len(by_file):
        raise UserError(
            f"{file}: none of its {len(by_file):,} images is in {folder}, such as "
            f"{next(iter(by_file), '')}; name their folder with data.images=DIR"
        )
    seen: set[tuple[Any, ...]] = set()
    for place, row in enumerate(content["annotations"]):
        where = f"{file.name}: annotation {as_mapping(row).get('id', f'number {place + 1}')}"
        try:
            record, made = coco_object(as_mapping(row), records, names, seen)
        except (ValueError, OverflowError) as error:
            left_out.append(f"{where}: {error}")
        else:
            record.objects.append(made)
    kept = [record for record in by_file.values() if record.file not in absent]
    return Part(folder, kept, sorted(left_out)), list(dict.fromkeys(names.values()))


def category_names(rows: Sequence[Any], file: Path) -> dict[Any, str]:
    """Return class names by id, in order of the ids, which may have gaps.

    Raises:
        UserError: an id is there twice, or a category has none.
    """
    names: dict[Any, str] = {}
    for row in rows:
        key, name = as_mapping(row).get("id"), as_mapping(row).get("name")
        if not isinstance(key, int) or name is None:
            raise UserError(f"{file}: a category without id or name: {str(row)[:80]}")
        if names.get(key, normalised(str(name))) != normalised(str(name)):
            raise UserError(f"{file}: category id {key} stands for {names[key]} and {name}")
        names[key] = normalised(str(name))
    return dict(sorted(names.items()))


def coco_object(
    row: Mapping[str, Any],
    records: Mapping[Any, Record],
    names: Mapping[Any, str],
    seen: set[tuple[Any, ...]],
) -> tuple[Record, Object]:
    """Return an annotation with the image that it belongs to.

    Args:
        row: of the json.
        records: images by id.
        names: class names by id.
        seen: what came before, to which it is added.

    Raises:
        ValueError: it cannot be used; says why.
    """
    image, category, box = row.get("image_id"), row.get("category_id"), row.get("bbox")
    if not isinstance(image, int | str) or image not in records:
        raise ValueError(f"image {image} is not in the file")
    if not isinstance(category, int) or category not in names:
        raise ValueError(f"category {category} is not in the file")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError("no box of 4 numbers")
    record = records[image]
    if not all(isinstance(v, int | float) for v in box):
        raise ValueError("no box of 4 numbers")
    left, top, width, height = box
    inside = clipped((left, top, left + width, top + height), record.height, record.width)
    key = (str(row.get("id")), image, category, *box)
    if key in seen:
        raise ValueError("the same as one before")
    seen.add(key)
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [points for points in segmentation if is_polygon(points)]
    elif not (isinstance(segmentation, Mapping) and "counts" in segmentation):
        segmentation = None
    mask = json.dumps(segmentation) if segmentation else None
    area = row.get("area")
    if not (isinstance(area, int | float) and 0 < area <= MAX_SIDE**2):
        area = 0.0
    crowd = bool(row.get("iscrowd", 0))
    return record, Object(names[category], inside, crowd, mask, float(area))


def images_of(file: Path, names: Sequence[str]) -> Path:
    """Return the folder, of those usual beside a json, that has most of some of these images."""
    part = re.sub(r"^(instances|annotations?)_?", "", file.stem)
    homes = (
        [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
    )
    inside = [part, f"images/{part}", "images", f"{part}/images", ""]
    folders = [home / name for home in reversed(homes) for name in inside]
    tried = names[:: max(1, len(names) // TRIED)]
    hits = [sum((folder / name).is_file() for name in tried) for folder in folders]
    return folders[int(np.argmax(hits))]
