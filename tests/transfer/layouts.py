"""Small data sets of segmentation and detection in every layout, written to a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32


def picture(path: Path, seed: int = 0, height: int = HEIGHT, width: int = WIDTH, turn: int = 1):
    """Write an image of noise, perhaps with an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[274] = turn
    image.save(path, exif=exif)
    return path


def ids(seed: int = 0, height: int = HEIGHT, width: int = WIDTH, values=(0, 1, 2)) -> np.ndarray:
    """A mask of blocks that has all of these values."""
    blocks = np.random.default_rng(seed).permuted(np.resize(values, (6, 8)))
    mask = blocks.repeat(-(-height // 6), axis=0).repeat(-(-width // 8), axis=1)[:height, :width]
    return mask.astype(np.uint16 if max(values) > 255 else np.uint8)


def mask(path: Path, values: np.ndarray, palette: bool = False):
    """Write a mask as grey values or palette indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)
    return path


def mask_folders(root: Path, parts: dict[str, int], values=(0, 1, 2), names=None) -> Path:
    """`images/PART`, `masks/PART`; a part `` lies in the folders themselves."""
    for part, count in parts.items():
        for i in range(count):
            picture(root / "images" / part / f"{i}.jpg", i)
            mask(root / "masks" / part / f"{i}.png", ids(i, values=values))
    if names is not None:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def ade20k(root: Path, train: int = 3, test: int = 2) -> Path:
    """Values of 0 (no class) to 150, with `objectInfo150.txt`."""
    for part, count in (("training", train), ("validation", test)):
        for i in range(count):
            picture(root / "images" / part / f"ADE_{i:08d}.jpg", i)
            values = ids(i, values=(0, 1, 150))
            mask(root / "annotations" / part / f"ADE_{i:08d}.png", values)
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i}\t0.1\t5\t5\t0\tthing {i}, kind {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def cityscapes(root: Path, kind: str = "labelIds", values=(0, 7, 33, 255)) -> Path:
    """Two training images and one to validate on."""
    for part, city, count in (("train", "ulm", 2), ("val", "bonn", 1), ("test", "rome", 1)):
        for i in range(count):
            stem = f"{city}_{i:06d}_000019"
            picture(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", i)
            if part != "test":
                mask(
                    root / "gtFine" / part / city / f"{stem}_gtFine_{kind}.png",
                    ids(i, values=values),
                )
                mask(root / "gtFine" / part / city / f"{stem}_gtFine_color.png", ids(i))
    return root


def voc_masks(root: Path, train: int = 3, test: int = 2) -> Path:
    """Palette masks of 0 to 20 and 255, lists, and an image without a mask."""
    keys = [f"2007_{i:06d}" for i in range(train + test)]
    for i, key in enumerate(keys):
        picture(root / "JPEGImages" / f"{key}.jpg", i)
        mask(root / "SegmentationClass" / f"{key}.png", ids(i, values=(0, 15, 255)), palette=True)
    picture(root / "JPEGImages" / "2008_000001.jpg")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, chosen in (("train", keys[:train]), ("val", keys[train:]), ("trainval", keys)):
        (lists / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    return root


def square(number: int, image: int, category: int, box=(4, 5, 10, 8), **more: Any) -> dict:
    """An annotation of COCO's: left, top, width, height."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    row = {"id": number, "image_id": image, "category_id": category, "bbox": list(box)}
    return row | {"area": width * height, "iscrowd": 0, "segmentation": outline} | more


def coco_json(file: Path, images: list, objects: list, categories=((1, "cat"), (2, "dog"))) -> Path:
    """A json; images as (id, name)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in images]
    names = [{"id": i, "name": name} for i, name in categories]
    file.write_text(json.dumps({"images": rows, "annotations": objects, "categories": names}))
    return file


def coco(root: Path, train: int = 3, test: int = 2, **options: Any) -> Path:
    """`annotations/instances_PART2017.json` and `PART2017/`; an object of each class an image."""
    for part, count in (("train2017", train), ("val2017", test)):
        names = [(i + 1, f"{i:012d}.jpg") for i in range(count)]
        for i, name in names:
            picture(root / part / name, i)
        objects = [square(2 * i + c, i, c + 1) for i, _ in names for c in range(2)]
        coco_json(root / "annotations" / f"instances_{part}.json", names, objects, **options)
    (root / "annotations" / "captions_train2017.json").write_text("{}")
    return root


def voc_xml(file: Path, objects: list, size=(HEIGHT, WIDTH)) -> Path:
    """An xml; objects as (name, (xmin, ymin, xmax, ymax), difficult)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"]
    for name, corners, difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        parts.append(
            f"<object><name>{name}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{box}</bndbox></object>"
        )
    file.write_text(f"<annotation>{''.join(parts)}</annotation>")
    return file


def voc_boxes(root: Path, train: int = 3, test: int = 2, lists=("train", "val")) -> Path:
    """A person and a difficult dog an image."""
    keys = [f"2007_{i:06d}" for i in range(train + test)]
    for i, key in enumerate(keys):
        picture(root / "JPEGImages" / f"{key}.jpg", i)
        objects = [("person", (1, 1, 10, 12), 0), ("dog", (5, 6, WIDTH, HEIGHT), 1)]
        voc_xml(root / "Annotations" / f"{key}.xml", objects)
    for name, chosen in zip(lists, (keys[:train], keys[train:]), strict=False):
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(chosen) + "\n")
    return root


def yolo(root: Path, train: int = 3, test: int = 2, polygons: bool = False, inside=False) -> Path:
    """Objects of two classes in `images/PART`, `labels/PART`, or `inside` `PART/images`."""
    for part, count in (("train", train), ("val", test)):
        for i in range(count):
            places = (part, "{}") if inside else ("{}", part)
            images, labels = (
                root / places[0].format(kind) / places[1].format(kind)
                for kind in ("images", "labels")
            )
            picture(images / f"{i}.jpg", i)
            labels.mkdir(parents=True, exist_ok=True)
            line = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75" if polygons else "0 0.5 0.5 0.5 0.5"
            other = "1 0 0 0.5 0 0 0.5" if polygons else "1 0.25 0.25 0.5 0.5"
            (labels / f"{i}.txt").write_text(f"{line}\n{other}\n")
    (root / "data.yaml").write_text("train: images/train\nnames:\n  0: cat\n  1: dog\n")
    return root
