"""Images with objects in boxes, perhaps with masks: COCO json, Pascal VOC xml and YOLO text.

Crowd regions of COCO and objects that VOC calls difficult are no targets, and no false positives.
Annotations are parsed once; masks stay polygons or runs until an image is read.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from jaxtyping import Float32

from ssl_xcit.data.decode import as_bad_image, upright
from ssl_xcit.data.folders import TEST_NAMES, TRAIN_NAMES, image_files
from ssl_xcit.data.identity import UNKNOWN, sizes_of
from ssl_xcit.data.labels import named_classes, normalised
from ssl_xcit.data.photos import CacheFolder
from ssl_xcit.data.sources import Files, Place, Seed, TestFraction
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.transfer.annotated import (
    Misfit,
    digest_of_all,
    distinct_names,
    existing_folder,
    inner_folder,
    lines_of,
    listed_names,
    orientation_between,
    parts_in,
    split_rows,
    stem_of,
    warn_left_out,
    warn_unlearnt,
)
from ssl_xcit.transfer.composites import composites
from ssl_xcit.transfer.detection.masks import Mask, polygons_mask, runs_from_text, runs_mask
from ssl_xcit.transfer.task import Instances, TransferData
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import PLACE, Words

log = logging.getLogger(__name__)
Layout = Literal["auto", "coco", "voc", "yolo"]
ClassNames = Annotated[Sequence[str] | None, Words("a list of names")]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Boxes = Float32[np.ndarray, "M 4"]
OTHER_JSON = ("captions", "image_info", "panoptic", "person_keypoints", "stuff")  # of COCO
ROBOFLOW = "_annotations.coco.json"
MAX_SIDE = 2**24  # pixels, as 32 bits of floating point tell them apart
TRIED = 16  # images of a json that are looked for in each folder


class Object(NamedTuple):
    """An annotated object."""

    name: str  # of its class
    box: Box
    crowd: bool = False
    segmentation: str | None = None  # json of polygons or runs as COCO has them; None: a box only


@dataclass
class Record:
    """An image with its objects."""

    file: str  # below the folder of the images
    height: int = 0  # in pixels, as annotated; 0: not known
    width: int = 0  # likewise
    objects: list[Object] = field(default_factory=list)


@dataclass
class Part:
    """The images for training or for testing."""

    folder: Path
    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Found(NamedTuple):
    """What a layout has in a folder."""

    parts: dict[str, Part]  # `train` and `test`, or `train` alone
    names: list[str] | None  # of classes in their order; None: those of the objects
    shares: bool = False  # whether coordinates are shares of the image's sides, or else pixels


class DetectionImages:
    """Images with their objects, which are kept in a few arrays that loader processes share."""

    def __init__(self, part: Part, class_names: Sequence[str], masks: bool, shares: bool):
        records = part.records
        objects = [obj for record in records for obj in record.objects]
        ids = {name: i for i, name in enumerate(class_names)}
        self.images = Files([record.file for record in records], str(part.folder))
        self.class_names = tuple(class_names)
        self.left_out = tuple(part.left_out)
        self.shares = shares
        self.sizes = np.array([(r.height, r.width) for r in records], np.int32).reshape(-1, 2)
        self.ends = np.cumsum([len(record.objects) for record in records], dtype=np.int64)
        self.boxes = np.array([obj.box for obj in objects], np.float32).reshape(-1, 4)
        self.labels = np.array([ids[obj.name] for obj in objects], np.int64)
        self.crowd = np.array([obj.crowd for obj in objects], bool)
        self.segmentations = None
        if masks:
            self.segmentations = StringArray.of(obj.segmentation or "null" for obj in objects)
        arrays: Sequence[np.ndarray] = (self.sizes, self.ends, self.boxes, self.labels, self.crowd)
        parts = {str(i): array.tobytes() for i, array in enumerate(arrays)}
        parts["files"] = self.images.paths.content.tobytes()
        if self.segmentations is not None:
            parts["masks"] = self.segmentations.content.tobytes()
        self.digest = digest_of_all(parts | {"classes": "\0".join(self.class_names).encode()})

    def read_target(self, index: int, height: int, width: int) -> Instances:
        """Read the objects of an image; raises BadImage as `AnnotatedSource` says."""
        rows = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        boxes, turn = self.boxes[rows], 1
        stored = height, width
        if self.sizes[index].all():
            stored = int(self.sizes[index][0]), int(self.sizes[index][1])
            turn = orientation_between(self.images, index, stored, (height, width))
        scale = np.array(stored[::-1] if self.shares else (1, 1), np.float32)
        limits = np.array(stored[::-1], np.float32)
        boxes = np.clip(boxes * np.tile(scale, 2), 0, np.tile(limits, 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # where the size was not known before
        masks = None
        if self.segmentations is not None:
            made = [
                object_mask(json.loads(self.segmentations[rows.start + i]), boxes[i], stored, scale)
                for i in np.flatnonzero(kept).tolist()
            ]
            masks = np.array(made, bool).reshape(-1, *stored)
            if turn > 1:
                pixels = masks.view(np.uint8).transpose(1, 2, 0)
                masks = np.ascontiguousarray(upright(pixels, turn).transpose(2, 0, 1)).view(bool)
        boxes = upright_boxes(boxes[kept], turn, *stored)
        return Instances(boxes, self.labels[rows][kept], masks, self.crowd[rows][kept])


def upright_boxes(boxes: Boxes, turn: int, height: int, width: int) -> Boxes:
    """Turn boxes in an image as stored, of this size, as `decode.upright` turns its pixels."""
    left, top, right, bottom = boxes.T
    if turn > 4:  # rows of the file are columns of the image
        left, top, right, bottom = top, left, bottom, right
        height, width = width, height
    if turn in (2, 3, 6, 7):
        left, right = width - right, width - left
    if turn in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return np.ascontiguousarray(np.stack((left, top, right, bottom), axis=1), np.float32)


def object_mask(
    segmentation: Any, box: Float32[np.ndarray, "4"], size: tuple[int, int], scale: np.ndarray
) -> Mask:
    """Return the mask of an object; one without any pixel, or of a crowd without runs, is its box.

    Raises:
        BadImage: its runs are not those of an image of this size.
    """
    height, width = size
    mask = np.zeros(size, bool)
    if isinstance(segmentation, Mapping):
        with as_bad_image():
            counts, shape = segmentation["counts"], segmentation.get("size", [height, width])
            if list(shape) != [height, width]:
                raise Misfit(f"a mask of {shape[-1]} x {shape[0]} pixels, not {width} x {height}")
            try:
                counts = runs_from_text(counts) if isinstance(counts, str) else counts
                mask = runs_mask(np.array(counts, np.int64).reshape(-1), height, width)
            except (ValueError, TypeError, OverflowError) as error:
                raise Misfit(f"a mask of {error}") from error
    elif segmentation is not None:
        polygons = (np.array(points, np.float64).reshape(-1, 2) * scale for points in segmentation)
        mask = polygons_mask(polygons, height, width)
    if not mask.any():
        left, top = np.floor(box[:2]).astype(int)
        right, bottom = np.ceil(box[2:]).astype(int)
        mask[top:bottom, left:right] = True
    return mask


def clipped(box: Sequence[float], height: float, width: float) -> Box:
    """Return the part of a box inside the image; of a size of 0, which is not known, all of it.

    Raises:
        ValueError: nothing is left, or it has no area.
    """
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise ValueError("box with numbers that are not finite")
    left, top, right, bottom = (float(v) for v in box)
    if not (left < right and top < bottom):
        raise ValueError("box of no area")
    if height and width:
        left, right = max(left, 0.0), min(right, float(width))
        top, bottom = max(top, 0.0), min(bottom, float(height))
        if not (left < right and top < bottom):
            raise ValueError("box outside the image")
    return left, top, right, bottom


# COCO


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


def coco(home: Path) -> Found | None:
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


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Return a row of json, empty if it is no mapping."""
    return row if isinstance(row, Mapping) else {}


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
    return record, Object(names[category], inside, bool(row.get("iscrowd", 0)), mask)


def is_polygon(points: Any) -> bool:
    """Whether these are coordinates of three points or more."""
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(v, int | float) and math.isfinite(v) for v in points)
    )


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


# Pascal VOC


def voc(home: Path) -> Found | None:
    """Read `Annotations/*.xml` of `JPEGImages`, by `ImageSets/Main/PART.txt`; without these lists
    all of them.
    """
    images = next((home / n for n in ("JPEGImages", "images") if (home / n).is_dir()), None)
    xml = next((home / n for n in ("Annotations", "annotations") if (home / n).is_dir()), None)
    if images is None or xml is None:
        return None
    annotated = {file.stem: file for file in sorted(xml.glob("*.xml"))}
    if not annotated:
        return None
    files = {os.path.basename(stem_of(name)): name for name in image_files(images)}
    lists = {}
    for name in ("train", "val", "trainval", "test"):
        file = home / "ImageSets" / "Main" / f"{name}.txt"
        if file.is_file():
            keys = [line.split()[0] for line in lines_of(file)]
            if any(key in annotated for key in keys):  # VOC's test lists come without
                lists[name] = keys
    test = next((name for name in ("test", "val") if name in lists), None)
    first = ("trainval", "train") if test == "test" else ("train", "trainval")
    train = next((name for name in first if name in lists), None)
    if train is None:
        parts = {"train": read_voc(list(annotated), annotated, files, images)}
        parts["train"].left_out += [f"{files[k]}: no xml" for k in files if k not in annotated]
        return Found(parts, None)
    parts = {"train": read_voc(lists[train], annotated, files, images)}
    if test is not None:
        parts["test"] = read_voc(lists[test], annotated, files, images)
    return Found(parts, None)


def read_voc(
    keys: Sequence[str], annotated: Mapping[str, Path], files: Mapping[str, str], images: Path
) -> Part:
    """Read the xml files of images by their names without endings."""
    part = Part(images)
    for key in track(keys, "annotations", show=shown_in_terminal()):
        if key not in annotated or key not in files:
            part.left_out.append(f"{key}: no {'image' if key in annotated else 'xml'}")
            continue
        file = annotated[key]
        try:
            root = ElementTree.fromstring(file.read_bytes())
        except (OSError, ElementTree.ParseError, ValueError) as error:
            part.left_out.append(f"{file.name}: not whole as xml ({error})")
            continue
        height, width = (whole(root.findtext(f"size/{side}")) for side in ("height", "width"))
        record = Record(files[key], height, width)
        for number, node in enumerate(root.iter("object"), 1):
            try:
                record.objects.append(voc_object(node, record))
            except ValueError as error:
                part.left_out.append(f"{file.name}: object {number}: {error}")
        part.records.append(record)
    return part


def whole(text: str | None) -> int:
    """Return a number of pixels; 0: none is given, or none that can be."""
    try:
        number = round(float(text or 0))
    except (ValueError, OverflowError):
        return 0
    return number if 0 < number < MAX_SIDE else 0


def voc_object(node: ElementTree.Element, record: Record) -> Object:
    """Return an object, whose first pixel is 1 in the file; raises ValueError."""
    name = normalised(node.findtext("name") or "")
    if not name:
        raise ValueError("no name")
    try:
        left, top, right, bottom = (
            float(node.findtext(f"bndbox/{side}") or "")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError as error:
        raise ValueError("no box of 4 numbers") from error
    box = clipped((left - 1, top - 1, right, bottom), record.height, record.width)
    return Object(name, box, whole(node.findtext("difficult")) == 1)


# YOLO


def yolo(home: Path) -> Found | None:
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


LAYOUTS = {
    "coco": (coco, "annotations/*.json (COCO)"),
    "voc": (voc, "JPEGImages/ and Annotations/*.xml (Pascal VOC)"),
    "yolo": (yolo, "images/ and labels/*.txt, or train/images/ and train/labels/ (YOLO)"),
}


IMAGES_OF = {"data.root": "data.images", "data.test_root": "data.test_images"}


def found_in(root: Place, images: Place, layout: str, key: str) -> Found:
    """Return what a folder, or a json file, has.

    Args:
        root: the folder or file.
        images: folder of the images of a json file.
        layout: which to look for, or `auto`.
        key: setting that named it.

    Raises:
        UserError: no such layout, or nothing in it.
    """
    path = Path(str(root)).expanduser()
    folder = None if images is None else existing_folder(images, IMAGES_OF[key])
    if path.suffix.lower() == ".json":
        part, names = read_coco(path, folder)
        return Found({"train": part}, names)
    if folder is not None:
        raise UserError(f"{IMAGES_OF[key]}={images} is for a json file: {key}=FILE.json")
    readers = list(LAYOUTS.values()) if layout == "auto" else [LAYOUTS[layout]]

    def first(home: Path) -> Found | None:
        return next((found for read, _ in readers if (found := read(home)) is not None), None)

    match = inner_folder(existing_folder(root, key), first)
    if match is None:
        looked_for = "; ".join(words for _, words in readers)
        raise UserError(f"{key}={root}: no images with objects in it; looked for {looked_for}")
    return match[1]


def detection_data(
    root: Place = None,
    test_root: Place = None,
    layout: Annotated[Layout, PLACE] = "auto",
    images: Place = None,
    test_images: Place = None,
    class_names: ClassNames = None,
    test_fraction: TestFraction = 0.2,
    seed: Seed = 0,
    cache: CacheFolder = None,
) -> TransferData:
    """Return images with objects to train and to test on.

    Args:
        root: a folder of one of the layouts, or a json file of COCO's; None: the built-in
            composites.
        test_root: likewise, to test on; None: the test part of `root`, or a share of it.
        layout: `coco`, `voc` or `yolo`; `auto`: the first that is there.
        images: folder of the images of a json file; None: one of the usual places beside it.
        test_images: likewise of `test_root`.
        class_names: the classes to use, in this order: objects of others are left out. In YOLO's
            layout without names, the names of 0, 1, ...; None: all.
        test_fraction: share to test on where nothing else is named.
        seed: of the choice of these.
        cache: where the built-in composites are written to.

    Raises:
        UserError: no layout, annotations that cannot be read, or a part without any object.
    """
    if root is None:
        if test_root is not None:
            raise UserError("data.test_root is given without data.root; give both")
        root, name = str(composites(cache)), "built-in composites"
    else:
        name = str(root)
    found = found_in(root, images, layout, "data.root")
    parts, names = dict(found.parts), found.names
    shares = dict.fromkeys(("train", "test"), found.shares)
    if test_root is not None:
        other = found_in(test_root, test_images or None, layout, "data.test_root")
        parts["test"] = other.parts.get("test") or other.parts["train"]
        shares["test"] = other.shares
        if names is not None and other.names is not None:
            names = names + [n for n in other.names if n not in names]
    elif "test" not in parts:
        train = parts["train"]
        halves = split_rows(train.records, test_fraction, seed, name)
        parts["test"] = Part(train.folder, halves["test"])
        parts["train"] = Part(train.folder, halves["train"], train.left_out)
    classes = chosen_classes(parts, names, class_names, name)
    present = {}
    for key, part in parts.items():
        warn_left_out(f"{name}: {key}", part.left_out)
        names_there = {obj.name for record in part.records for obj in record.objects}
        if not names_there:
            reason = f" ({part.left_out[0]})" if part.left_out else ""
            raise UserError(f"{name}: no image of the {key}ing part has an object{reason}")
        present[key] = np.array([c in names_there for c in classes])
        empty = sum(not record.objects for record in part.records)
        log.info("%s: %s: %d images, %d without objects", name, key, len(part.records), empty)
    warn_unlearnt(name, classes, present["train"], present["test"])
    masks = have_masks(parts, name)
    made = {key: DetectionImages(part, classes, masks, shares[key]) for key, part in parts.items()}
    return TransferData(made["train"], made["test"], name)


def chosen_classes(
    parts: Mapping[str, Part], names: Sequence[str] | None, wanted: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """Return the classes in their order, and leave objects of others out, in place.

    Args:
        parts: of the data.
        names: of the layout; None: those of the objects.
        wanted: of the setting; None: all.
        where: the data, for messages.
    """
    rows = [record for part in parts.values() for record in part.records]
    found = {obj.name for record in rows for obj in record.objects}
    if wanted is None:
        known = [normalised(n) for n in names] if names is not None else []
        return distinct_names(named_classes(sorted(found), known)[1], where)
    chosen = distinct_names(wanted, "data.class_names")
    if names is None and all(n.isdecimal() for n in found):  # numbers of YOLO
        by_id = {str(i): name for i, name in enumerate(chosen)}
        for record in rows:
            record.objects = [o._replace(name=by_id.get(o.name, o.name)) for o in record.objects]
    for part in parts.values():
        dropped = 0
        for record in part.records:
            kept = [obj for obj in record.objects if obj.name in chosen]
            dropped += len(record.objects) - len(kept)
            record.objects = kept
        if dropped:
            part.left_out.append(f"{dropped:,} objects of classes not in data.class_names")
    return chosen


def have_masks(parts: Mapping[str, Part], where: str) -> bool:
    """Whether objects have masks: more than half of each part's, crowd regions aside. Then those
    without one are left out, in place; where there are some, but too few, it is logged.
    """
    lacking = {
        key: [o.segmentation is None for r in part.records for o in r.objects if not o.crowd]
        for key, part in parts.items()
    }
    if not all(2 * sum(without) < max(1, len(without)) for without in lacking.values()):
        if not all(all(without) for without in lacking.values()):
            words = (f"{sum(w):,} of {len(w):,} {key}ing objects" for key, w in lacking.items())
            log.warning(
                "%s: boxes are used without masks, which %s lack", where, " and ".join(words)
            )
        return False
    for key, part in parts.items():
        if dropped := sum(lacking[key]):
            part.left_out.append(f"{dropped:,} objects without a mask")
            log.warning("%s: %s: left out %s objects without a mask", where, key, f"{dropped:,}")
        for record in part.records:
            record.objects = [o for o in record.objects if o.crowd or o.segmentation is not None]
    return True
