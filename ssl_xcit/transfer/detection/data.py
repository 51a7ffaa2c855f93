"""Images with objects in boxes, perhaps with masks: COCO json, Pascal VOC xml and YOLO text.

Crowd regions of COCO and objects that VOC calls difficult are no targets, and no false positives.
Annotations are parsed once; masks stay polygons or runs until an image is read.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float32

from ssl_xcit.data.labels import named_classes, normalised
from ssl_xcit.data.photos import CacheFolder
from ssl_xcit.data.picture import as_bad_image, upright
from ssl_xcit.data.sources import Files, Place, Seed, TestFraction
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.annotated import (
    Misfit,
    digest_of_all,
    distinct_names,
    existing_folder,
    inner_folder,
    orientation_between,
    split_rows,
    warn_left_out,
    warn_unlearnt,
)
from ssl_xcit.transfer.composites import composites
from ssl_xcit.transfer.detection.coco import coco_folder, read_coco
from ssl_xcit.transfer.detection.masks import Mask, polygons_mask, runs_from_text, runs_mask
from ssl_xcit.transfer.detection.records import Found, Part
from ssl_xcit.transfer.detection.voc import voc_folder
from ssl_xcit.transfer.detection.yolo import yolo_folder
from ssl_xcit.transfer.task import Instances, TransferData
from ssl_xcit.utils.validation import PLACE, Words

log = logging.getLogger(__name__)
Layout = Literal["auto", "coco", "voc", "yolo"]
Empty = Literal["keep", "drop"]
ClassNames = Annotated[Sequence[str] | None, Words("a list of names")]
Boxes = Float32[np.ndarray, "M 4"]


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
        areas = np.array([obj.area for obj in objects], np.float64)
        self.areas = areas if areas.any() else None
        self.segmentations = None
        if masks:
            self.segmentations = StringArray.of(obj.segmentation or "null" for obj in objects)
        arrays: Sequence[np.ndarray] = (self.sizes, self.ends, self.boxes, self.labels, self.crowd)
        parts = {str(i): array.tobytes() for i, array in enumerate(arrays)}
        parts["files"] = self.images.paths.content.tobytes()
        if self.segmentations is not None:
            parts["masks"] = self.segmentations.content.tobytes()
        if self.areas is not None:
            parts["areas"] = self.areas.tobytes()
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
        areas = None if self.areas is None else self.areas[rows][kept]
        return Instances(boxes, self.labels[rows][kept], masks, self.crowd[rows][kept], areas)


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


LAYOUTS = {
    "coco": (coco_folder, "annotations/*.json (COCO)"),
    "voc": (voc_folder, "JPEGImages/ and Annotations/*.xml (Pascal VOC)"),
    "yolo": (yolo_folder, "images/ and labels/*.txt, or train/images/ and train/labels/ (YOLO)"),
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
    empty: Empty = "keep",
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
        empty: what becomes of training images without objects: `keep` trains on them as background,
            `drop` leaves them out. Crowd regions are no objects here.

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
        without = sum(not record.objects for record in part.records)
        log.info("%s: %s: %d images, %d without objects", name, key, len(part.records), without)
    warn_unlearnt(name, classes, present["train"], present["test"])
    masks = have_masks(parts, name)
    if empty == "drop":
        drop_empty(parts["train"], name)
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


def drop_empty(part: Part, where: str) -> None:
    """Leave images without objects but for crowd regions out, in place, and log how many.

    Raises:
        UserError: no image is left.
    """
    kept = [record for record in part.records if not all(obj.crowd for obj in record.objects)]
    if not kept:
        raise UserError(
            f"{where}: no image of the training part has an object that is no crowd region"
        )
    if dropped := len(part.records) - len(kept):
        part.left_out.append(f"{dropped:,} images without objects")
        log.warning("%s: train: left out %s images without objects", where, f"{dropped:,}")
    part.records = kept


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
