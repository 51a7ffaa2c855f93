"""Pascal VOC's boxes: an xml file for each image. Difficult objects are read as crowd regions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from ssl_xcit.data.folders import image_files
from ssl_xcit.data.labels import normalised
from ssl_xcit.transfer.annotated import lines_of, stem_of
from ssl_xcit.transfer.detection.records import MAX_SIDE, Found, Object, Part, Record, clipped
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track


def voc_folder(home: Path) -> Found | None:
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
