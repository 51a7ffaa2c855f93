"""Images with a class for each pixel: layouts of ADE20k, Cityscapes, Pascal VOC, and plain folders.

A mask is a file of whole numbers: PNG or TIFF of grey values (8 or 16 bits) or of palette indices.
"""

import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Shaped, UInt8
from PIL import Image

from ssl_xcit.data.decode import read_file
from ssl_xcit.data.folders import image_files
from ssl_xcit.data.identity import index_of
from ssl_xcit.data.labels import normalised
from ssl_xcit.data.photos import CacheFolder
from ssl_xcit.data.picture import BadImage, as_bad_image, check_size, upright
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Files, Place, Seed, TestFraction
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.transfer.annotated import (
    Misfit,
    check_known_classes,
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
from ssl_xcit.transfer.task import IGNORED, Task, TransferData
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import PLACE, Words

log = logging.getLogger(__name__)
UNKNOWN = 254  # in `lookup`: a value of mask files that is no class
MAX_VALUES = 2**16  # of a mask file of 16 bits
MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp")
MASK_FORMATS = ("PNG", "TIFF", "BMP")
COMPARED = 1_000  # images up to which all masks are read to compare the classes of both parts
Value = Annotated[int, Ge(0), Le(MAX_VALUES - 1)]
Pairs = list[tuple[str, str]]  # paths of image and mask, below the root
Layout = Literal["auto", "ade20k", "cityscapes", "voc", "folders"]
Ignore = Annotated[
    Value | Sequence[Value] | None, Words("a value of the mask files, a list of these or null")
]
ClassNames = Annotated[
    Sequence[str] | Mapping[int, str] | None, Words("a list of names, or names by mask value")
]

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES = {  # values of `labelIds` that are trained on
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
ADE20K_CLASSES = 150


class Found(NamedTuple):
    """What a layout has in a folder."""

    parts: dict[str, Pairs]  # `train` and `test`, or `train` alone
    names: dict[int, str] | None  # by value; None: whatever values the masks have
    ignored: Sequence[int]  # values that are no class
    left_out: list[str]


class SegmentationImages:
    """Images with a class id for each pixel."""

    def __init__(
        self,
        root: Path,
        pairs: Pairs,
        class_names: Sequence[str],
        lookup: UInt8[np.ndarray, "65536"],
        left_out: Sequence[str],
    ):
        self.images = Files([image for image, _ in pairs], str(root))
        self.masks = Files([mask for _, mask in pairs], str(root))
        self.class_names = tuple(class_names)
        self.lookup = lookup  # class id, IGNORED or UNKNOWN by value of the mask files
        self.left_out = tuple(left_out)
        self.digest = digest_of_all(
            {
                "masks": index_of(self.masks).digest() if pairs else "",
                "values": lookup.tobytes(),
                "classes": "\0".join(self.class_names),
            }
        )

    def read_target(self, index: int, height: int, width: int) -> UInt8[np.ndarray, "height width"]:
        """Read class ids from 0, or IGNORED; raises BadImage as `AnnotatedSource` says."""
        name = self.masks.name(index)
        with named(name):
            values = read_values(name)
            turn = orientation_between(self.images, index, values.shape, (height, width))
            ids = self.lookup[values]
            if (ids == UNKNOWN).any():
                unknown = np.unique(values[ids == UNKNOWN])[:5]
                known = np.flatnonzero(self.lookup < UNKNOWN)
                raise Misfit(
                    f"values {', '.join(map(str, unknown))} are no class: those of "
                    f"{len(self.class_names)} classes are {known[0]} to {known[-1]}; name all "
                    "classes with data.class_names, or set data.ignore=VALUE"
                )
        return upright(ids[..., None], turn)[..., 0]


@contextmanager
def named(path: str) -> Iterator[None]:
    """Put the name of a mask before what is wrong with it."""
    try:
        yield
    except BadImage as error:
        raise type(error)(f"mask {path}: {error}") from error


def read_values(path: str) -> Shaped[np.ndarray, "height width"]:
    """Read the values of a mask file as they are stored: unsigned, of 8 or 16 bits.

    Raises:
        BadImage: it cannot be read, or has colours.
    """
    content = read_file(path)
    with as_bad_image():
        image = Image.open(io.BytesIO(content), formats=MASK_FORMATS)
        check_size(*image.size, Preprocess())
        image.load()
        values = np.asarray(image)
    colours = values[..., : 1 if image.mode == "LA" else 3]
    if image.mode in ("LA", "RGB", "RGBA") and (colours == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3:
        raise Misfit(
            f"of colours ({image.mode}): a class id for each pixel is needed, as grey values or "
            "palette indices; convert it, for example with "
            "PIL.Image.fromarray(ids).save('mask.png')"
        )
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "i" and values.size and 0 <= values.min() <= values.max() < MAX_VALUES:
        return values.astype(np.uint16)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype not in (np.uint8, np.uint16):
        raise Misfit(f"values of type {values.dtype}: whole numbers of 0 to 65535 are needed")
    return values


def matched(images: Mapping[str, str], masks: Mapping[str, str], left_out: list[str]) -> Pairs:
    """Return (image, mask) of equal keys; add what has no partner to `left_out`."""
    left_out += [f"{images[key]}: no mask" for key in images if key not in masks]
    left_out += [f"{masks[key]}: no image" for key in masks if key not in images]
    return [(images[key], masks[key]) for key in images if key in masks]


def by_stem(root: Path, folder: str, key: Callable[[str], str | None] = stem_of) -> dict[str, str]:
    """Return paths below the root of all images of one of its folders, by what their names have in
    common with others; those without are left out. Empty: no image there.
    """
    try:
        files = image_files(root / folder)
    except MissingPath:
        return {}
    keys = ((key(name), os.path.join(folder, name)) for name in files)
    return {name: path for name, path in keys if name is not None}


def mask_key(path: str) -> str | None:
    """Return what a mask has in common with its image; None: it is no mask's name."""
    stem, ending = os.path.splitext(path)
    return stem.removesuffix("_mask") if ending.lower() in MASK_ENDINGS else None


def ade20k(root: Path) -> Found | None:
    """Return pairs of `images/training`, `annotations/training` and `validation`; value 0 has no
    class. Names are read from `objectInfo150.txt`.
    """
    folders = {"train": "training", "test": "validation"}
    if not any(has_both(root, "images", "annotations", folder) for folder in folders.values()):
        return None
    left_out: list[str] = []
    parts = {
        part: matched(
            by_stem(root, f"images/{folder}"),
            by_stem(root, f"annotations/{folder}", mask_key),
            left_out,
        )
        for part, folder in folders.items()
        if (root / "annotations" / folder).is_dir()
    }
    names = [str(i) for i in range(1, ADE20K_CLASSES + 1)]
    if (root / "objectInfo150.txt").is_file():
        rows = [line.split("\t") for line in lines_of(root / "objectInfo150.txt")]
        read = {row[0].strip(): row[-1].strip() for row in rows}
        names = [f"{i}: {read[i]}" if read.get(i) in names else read.get(i, i) for i in names]
    return Found(parts, dict(enumerate(names, 1)), [0], left_out)


def has_both(root: Path, images: str, masks: str, part: str) -> bool:
    """Whether both folders have a part of this name."""
    return all((root / kind / part).is_dir() for kind in (images, masks))


def cityscapes(root: Path) -> Found | None:
    """Return pairs of `leftImg8bit/PART/CITY/*_leftImg8bit.png` and `gtFine/PART/CITY/*_gtFine_*`,
    where `labelTrainIds` is used before `labelIds`: 19 classes.
    """
    there = [part for part in ("train", "val") if has_both(root, "leftImg8bit", "gtFine", part)]
    if not there:
        return None
    left_out: list[str] = []
    parts: dict[str, Pairs] = {}
    has_train_ids = any((root / "gtFine" / there[0]).glob("*/*_gtFine_labelTrainIds.png"))
    ending = "_gtFine_labelTrainIds.png" if has_train_ids else "_gtFine_labelIds.png"
    for part, folder in (("train", "train"), ("test", "val")):
        images = by_stem(root, f"leftImg8bit/{folder}", ending_with("_leftImg8bit.png"))
        masks = by_stem(root, f"gtFine/{folder}", ending_with(ending))
        if masks:
            parts[part] = matched(images, masks, left_out)
    names = dict(enumerate(CITYSCAPES.values())) if has_train_ids else CITYSCAPES
    return Found(parts, names, [v for v in range(256) if v not in names], left_out)


def ending_with(ending: str) -> Callable[[str], str | None]:
    """Return a function of a path: it without this ending; None: it has another."""
    return lambda path: path.removesuffix(ending) if path.endswith(ending) else None


def voc(root: Path) -> Found | None:
    """Return pairs of `JPEGImages`, `SegmentationClass` by `ImageSets/Segmentation/PART.txt`;
    without a list for training all pairs but those for testing. 255 has no class.
    """
    if not all((root / kind).is_dir() for kind in ("JPEGImages", "SegmentationClass")):
        return None
    left_out: list[str] = []
    images, masks = by_stem(root, "JPEGImages"), by_stem(root, "SegmentationClass", mask_key)
    images, masks = (
        {os.path.basename(key): path for key, path in files.items()} for files in (images, masks)
    )
    lists = {"train": "train", "test": "val"}
    parts: dict[str, Pairs] = {}
    for part, name in lists.items():
        file = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if file.is_file():
            keys = [line.split()[0] for line in lines_of(file)]
            for key in keys:
                for kind, known in (("image", images), ("mask", masks)):
                    if key not in known:
                        left_out.append(f"{file}: {key}: no {kind}")
            parts[part] = [(images[k], masks[k]) for k in keys if k in images and k in masks]
    if "train" not in parts:  # thousands of VOC's images have no mask, by design
        left_out += [f"{masks[key]}: no image" for key in masks if key not in images]
        tested = {image for image, _ in parts.get("test", [])}
        parts["train"] = [
            (images[k], masks[k]) for k in images if k in masks and images[k] not in tested
        ]
    return Found(parts, dict(enumerate(VOC)), [IGNORED], left_out)


def folders(root: Path) -> Found | None:
    """Return pairs of `images`, `masks`, each perhaps with `train` and `test` or `val`, which may
    hold `images` and `masks` as well. 255 has no class.
    """
    places = parts_in(root, "images", "masks")
    if not places:
        return None
    left_out: list[str] = []
    parts = {}
    for part, (images, masks) in places.items():
        found = by_stem(root, masks, mask_key)
        if not found and (others := by_stem(root, masks)):
            raise UserError(
                f"{root / next(iter(others.values()))}: masks are to be PNG or TIFF files: others "
                "change the class ids"
            )
        parts[part] = matched(by_stem(root, images), found, left_out)
    return Found(parts, None, [IGNORED], left_out)


LAYOUTS: dict[str, tuple[Callable[[Path], Found | None], str]] = {
    "ade20k": (ade20k, "images/training/ and annotations/training/ (ADE20k)"),
    "cityscapes": (cityscapes, "leftImg8bit/train/ and gtFine/train/ (Cityscapes)"),
    "voc": (voc, "JPEGImages/ and SegmentationClass/ (Pascal VOC)"),
    "folders": (folders, "images/ and masks/, or train/images/ and train/masks/"),
}


def found_in(root: Place, layout: str, key: str, part: str = "train") -> tuple[Path, Found]:
    """Return the folder that has the layout, and what is there.

    Args:
        root: the folder.
        layout: which to look for, or `auto`.
        key: setting that named it.
        part: that is needed: `train`; or `test`, in place of which `train` is taken.

    Raises:
        UserError: no such layout, or nothing in it.
    """
    home = existing_folder(root, key)
    readers = list(LAYOUTS.values()) if layout == "auto" else [LAYOUTS[layout]]

    def first(folder: Path) -> Found | None:
        return next((found for read, _ in readers if (found := read(folder)) is not None), None)

    match = inner_folder(home, first)
    if match is None:
        looked_for = "; ".join(words for _, words in readers)
        raise UserError(f"{key}={root}: no images with masks in it; looked for {looked_for}")
    parts = match[1].parts
    if part == "train" and not parts.get("train") and parts.get("test"):
        raise UserError(
            f"{key}={root}: {len(parts['test']):,} images to test on, and none to train on; name "
            "a folder that has some"
        )
    if not parts.get("train") and not parts.get("test"):
        examples = "; ".join(match[1].left_out[:2]) or "the folders are empty"
        raise UserError(
            f"{key}={root}: no image has a mask of its name ({examples}); a.jpg needs a.png"
        )
    return match


def segmentation_data(
    root: Place = None,
    test_root: Place = None,
    layout: Annotated[Layout, PLACE] = "auto",
    class_names: ClassNames = None,
    ignore: Ignore = None,
    test_fraction: TestFraction = 0.2,
    seed: Seed = 0,
    cache: CacheFolder = None,
) -> TransferData:
    """Return images with masks to train and to test on.

    Args:
        root: a folder of one of the layouts; None: the built-in composites.
        test_root: likewise, to test on; None: the test part of `root`, or a share of it.
        layout: `ade20k`, `cityscapes`, `voc` or `folders`; `auto`: the first that is there.
        class_names: of the mask values from 0 on, those of `ignore` passed over, or by value; None:
            as the layout has them, or the lines of `classes.txt` in `root`, or else the values that
            the masks have.
        ignore: values without a class; None: 0 in ADE20k's layout, else 255.
        test_fraction: share to test on where nothing else is named.
        seed: of the choice of these.
        cache: where the built-in composites are written to.

    Raises:
        UserError: no layout, no pair of image and mask, fewer than two classes or more than 254, or
            a mask that cannot be read while the classes are counted.
    """
    if root is None:
        if test_root is not None:
            raise UserError("data.test_root is given without data.root; give both")
        root, name = str(composites(cache)), "built-in composites"
    else:
        name = str(root)
    home, found = found_in(root, layout, "data.root")
    places = {"train": home, "test": home}
    parts, left_out = dict(found.parts), {"train": list(found.left_out), "test": []}
    if test_root is not None:
        places["test"], other = found_in(test_root, layout, "data.test_root", "test")
        parts["test"] = other.parts.get("test") or other.parts["train"]
        left_out["test"] = other.left_out
    elif not parts.get("test"):
        parts = split_rows(parts["train"], test_fraction, seed, name)
    for lines in left_out.values():
        warn_left_out(name, lines)
    ignored = ignored_values(ignore, found, class_names)
    by_value = names_by_value(home, found, class_names, ignored)
    masks = {part: [str(places[part] / mask) for _, mask in parts[part]] for part in places}
    present = None
    if by_value is None or sum(map(len, masks.values())) <= COMPARED:
        present = {part: values_in(files) for part, files in masks.items()}
    if by_value is None:
        assert present is not None
        seen = present["train"] | present["test"]
        by_value = {int(v): str(v) for v in np.flatnonzero(seen) if v not in ignored}
        log.info("%s: %d classes, the values of its masks", name, len(by_value))
    names = distinct_names(list(by_value.values()), name)
    if not 2 <= len(names) < UNKNOWN:
        passed = ", ".join(map(str, ignored[:3]))
        raise UserError(
            f"{name}: {len(names)} classes: {', '.join(names[:3])} without those ignored "
            f"({passed}); 2 to {UNKNOWN - 1} are needed: set data.ignore=[] to ignore no value"
        )
    lookup = np.full(MAX_VALUES, UNKNOWN, np.uint8)
    lookup[list(ignored)] = IGNORED
    lookup[list(by_value)] = np.arange(len(by_value))
    if present is not None:
        train, test = (present[part][list(by_value)] for part in ("train", "test"))
        warn_unlearnt(name, names, train, test)
    made = {
        part: SegmentationImages(places[part], parts[part], names, lookup, left_out[part])
        for part in places
    }
    return TransferData(made["train"], made["test"], name)


def segmentation_test(
    task: Task,
    root: Place = None,
    layout: Annotated[Layout, PLACE] = "auto",
    class_names: ClassNames = None,
    ignore: Ignore = None,
) -> SegmentationImages:
    """Return images with masks to test a segmenter on, with its classes, some of which may be in no
    mask: the test part of a folder where it has one, else all.

    Args:
        task: the segmenter.
        root: a folder of one of the layouts.
        layout: see `segmentation_data`, as of `ignore`.
        class_names: likewise; None: the lines of `classes.txt` in `root`, the layout's where those
            of the segmenter are among them, or else the segmenter's: numbers are mask values, names
            are of the values from 0 on.

    Raises:
        UserError: see `segmentation_data`; classes that the segmenter does not know.
    """
    home, found = found_in(root, layout, "data.root", "test")
    pairs, where = found.parts.get("test") or found.parts["train"], str(root)
    warn_left_out(where, found.left_out)
    own = list(task.class_names)
    named = listed_names(home) if class_names is None else class_names
    if named is None and not set(own) <= {normalised(n) for n in (found.names or {}).values()}:
        named = {int(name): name for name in own} if all(n.isdecimal() for n in own) else own
    ignored = ignored_values(ignore, found, named)
    by_value = names_by_value(home, found, named, ignored) or {}
    names = distinct_names(list(by_value.values()), where)
    ids = {name: i for i, name in enumerate(own)}
    lookup = np.full(MAX_VALUES, UNKNOWN, np.uint8)
    lookup[list(ignored)] = IGNORED
    lookup[list(by_value)] = [ids.get(name, UNKNOWN) for name in names]
    if not set(names) <= set(own):
        masks = [os.path.join(home, mask) for _, mask in pairs]
        present = values_in(masks)[list(by_value)]
        known = [name for name, there in zip(names, present, strict=True) if there]
        check_known_classes(where, known, own)
    return SegmentationImages(home, pairs, own, lookup, found.left_out)


def ignored_values(ignore: Any, found: Found, class_names: Any) -> list[int]:
    """Return the values without a class: by the layout all that no name is given for."""
    if ignore is None:
        named = class_names if isinstance(class_names, Mapping) else ()
        return [value for value in found.ignored if value not in named]
    return [ignore] if isinstance(ignore, int) else list(ignore)


def names_by_value(
    home: Path, found: Found, class_names: Any, ignored: Sequence[int]
) -> dict[int, str] | None:
    """Return class names by mask value, in order of the values; None: they are to be counted."""
    given = listed_names(home) if class_names is None else class_names
    if given is None:
        named = found.names
    elif isinstance(given, Mapping):
        named = {int(value): str(name) for value, name in given.items()}
    else:
        known = sorted(found.names or {})
        values: Iterator[int] = (v for v in range(MAX_VALUES) if v not in ignored)
        if len(known) == len(given):  # of the layout, which may have gaps
            values = iter(known)
        named = {value: str(name) for value, name in zip(values, given, strict=False)}
    if named is None:
        return None
    return {value: named[value] for value in sorted(named) if value not in ignored}


def values_in(masks: Sequence[str]) -> np.ndarray:
    """Return (65536,) whether a value is in any of the masks; those that cannot be read are left to
    training, which skips and logs them.
    """
    present = np.zeros(MAX_VALUES, bool)
    for path in track(masks, "classes of masks", show=shown_in_terminal()):
        try:
            present[np.unique(read_values(path))] = True
        except Misfit as error:
            raise UserError(f"mask {path}: {error}") from error
        except BadImage:
            continue
    return present
