"""Built-in images with classes by pixel, instance masks and boxes: cut-outs of the bundled
photographs, pasted over others.

The class is the shape. Two shapes have one of their two textures in common, so texture alone does
not tell all objects apart. Backgrounds are blocks of photographs that give no textures.
Training and test pixels come from the disjoint blocks of `photos.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from ssl_xcit.data.cache import folder_made_once
from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import BLOCK, CacheFolder, blocks, photographs
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.transfer.detection.masks import Mask, box_of, polygons_mask, runs_of
from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track

SIZE = BLOCK  # a background is a block
COUNTS = {"train": 1200, "test": 200}
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")  # classes 1 to 6; 0: background
TEXTURES = {  # photographs, by shape
    "disc": ("brick", "gravel"),
    "star": ("coins", "gravel"),
    "square": ("ihc", "retina"),
    "ring": ("cell", "retina"),
    "triangle": ("chelsea", "flower"),
    "cross": ("coffee", "flower"),
}
BACKGROUNDS = (
    "astronaut", "camera", "china", "grass", "hubble_deep_field", "moon", "motorcycle_left",
    "rocket",
)  # fmt: skip
MAX_OBJECTS = 4
RADIUS = (16.0, 42.0)  # in pixels
SHOWN = 0.4  # share of each object that stays visible
CONTRAST = 8.0  # standard deviation of a texture, of 255
ATTEMPTS = 20  # to place an object, to find a texture
FINE = 4  # subpixels a side, for smooth borders
VERSION = 2  # of the images: a change needs another folder
FOLDER = f"composites-{SIZE}-{VERSION}"
Outline = Float[np.ndarray, "_ 2"]
Texture = UInt8[np.ndarray, "_ _ 3"]


class Piece(NamedTuple):
    """An object that was placed."""

    label: int  # 1 to 6
    outlines: list[Outline]  # (x, y) in pixels; of a ring the inner one as well
    mask: Mask  # of the whole object inside the image


def corners(radii: Sequence[float], count: int) -> Outline:
    """Return points on circles whose radii take turns."""
    angles = np.arange(count) * (2 * math.pi / count)
    lengths = np.resize(np.array(radii), count)
    return np.stack((lengths * np.cos(angles), lengths * np.sin(angles)), axis=1)


def outlines_of(shape: str) -> list[Outline]:
    """Return the outlines of a shape that fits the unit circle; a second one is a hole."""
    arm = 0.33
    cross = [(1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)]
    return {
        "disc": [corners([0.9], 40)],
        "square": [corners([1.0], 4)],
        "triangle": [corners([1.0], 3)],
        "star": [corners([1.0, 0.5], 10)],
        "ring": [corners([0.95], 40), corners([0.5], 40)],
        "cross": [np.array([*cross, *((-x, -y) for x, y in cross)], np.float64)],
    }[shape]


def filled(outlines: Sequence[Outline], height: int = SIZE, width: int = SIZE) -> Mask:
    """Fill a shape but for its hole."""
    outer, *holes = (polygons_mask([outline], height, width) for outline in outlines)
    for hole in holes:
        outer &= ~hole
    return outer


def placed(shape: str, generator: np.random.Generator) -> list[Outline]:
    """Return the outlines of a shape at a random place, in a random size and rotation."""
    low, high = RADIUS
    radius = low * math.exp(generator.uniform(0, math.log(high / low)))
    turn, aspect = generator.uniform(0, 2 * math.pi), math.sqrt(generator.uniform(0.8, 1.25))
    centre = generator.uniform(0.7 * radius, SIZE - 0.7 * radius, 2)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    stretch = np.array([aspect, 1 / aspect]) * radius
    return [((o * stretch) @ matrix + centre).round(2) for o in outlines_of(shape)]


def turned(pixels: Texture, generator: np.random.Generator) -> Texture:
    """Return a square in one of its eight orientations."""
    square = np.rot90(pixels, int(generator.integers(4)))
    return np.ascontiguousarray(square[:, ::-1] if generator.integers(2) else square)


def some_texture(
    photos: Sequence[Sequence[Pixels]], side: int, generator: np.random.Generator
) -> Texture:
    """Cut a square with some contrast from one of the photographs."""
    for _ in range(ATTEMPTS):
        of_one = photos[int(generator.integers(len(photos)))]
        block = of_one[int(generator.integers(len(of_one)))]
        top, left = generator.integers(0, SIZE - side + 1, 2).tolist()
        square = block[top : top + side, left : left + side]
        if square.std(axis=(0, 1)).max() >= CONTRAST:
            break
    return turned(square, generator)


def paste(image: Pixels, outlines: Sequence[Outline], texture: Texture) -> None:
    """Paste a texture where a shape is, with smooth borders, in place."""
    origin = np.floor(outlines[0].min(axis=0)).clip(0, SIZE)
    left, top = origin.astype(int).tolist()
    right, bottom = np.ceil(outlines[0].max(axis=0)).clip(0, SIZE).astype(int).tolist()
    height, width = bottom - top, right - left
    fine = filled([(o - origin) * FINE for o in outlines], height * FINE, width * FINE)
    share = fine.reshape(height, FINE, width, FINE).sum(axis=(1, 3))[..., None]
    under = image[top:bottom, left:right].astype(np.int64)
    over = texture[:height, :width].astype(np.int64)
    whole = FINE * FINE  # in whole numbers, the same on every machine
    mixed = (share * over + (whole - share) * under + whole // 2) // whole
    image[top:bottom, left:right] = mixed.astype(np.uint8)


def composite(
    photos: Mapping[str, Sequence[Pixels]], generator: np.random.Generator
) -> tuple[Pixels, list[Piece]]:
    """Return an image and its objects, the hindmost first.

    Args:
        photos: blocks by photograph, all of training or all of test.
        generator: of this image.
    """
    of_one = photos[BACKGROUNDS[int(generator.integers(len(BACKGROUNDS)))]]
    image = turned(of_one[int(generator.integers(len(of_one)))], generator)
    pieces: list[Piece] = []
    for _ in range(int(generator.integers(1, MAX_OBJECTS + 1))):
        shape = SHAPES[int(generator.integers(len(SHAPES)))]
        for _ in range(ATTEMPTS):
            outlines = placed(shape, generator)
            piece = Piece(1 + SHAPES.index(shape), outlines, filled(outlines))
            visible = visible_masks([*pieces, piece])
            if all(
                mask.sum() >= SHOWN * other.mask.sum()
                for mask, other in zip(visible, [*pieces, piece], strict=True)
            ):
                break
        else:
            continue
        side = min(SIZE, math.ceil(np.ptp(outlines[0], axis=0).max()) + 1)
        paste(
            image,
            outlines,
            some_texture([photos[name] for name in TEXTURES[shape]], side, generator),
        )
        pieces.append(piece)
    return image, pieces


def visible_masks(pieces: Sequence[Piece]) -> list[Bool[np.ndarray, "height width"]]:
    """Return what of each piece those after it leave visible."""
    covered = np.zeros((SIZE, SIZE), bool)
    masks = []
    for piece in reversed(pieces):
        masks.append(piece.mask & ~covered)
        covered |= piece.mask
    return masks[::-1]


def class_mask(pieces: Sequence[Piece]) -> UInt8[np.ndarray, "height width"]:
    """Return class ids by pixel, 0 in the background."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for piece in pieces:
        mask[piece.mask] = piece.label
    return mask


def annotations(pieces: Sequence[Piece], image_id: int, first: int) -> Iterator[dict[str, Any]]:
    """Yield each object as COCO has it: a polygon where it is seen whole, else runs.

    Args:
        image_id: of the image.
        first: id of the first annotation.
    """
    for number, (piece, mask) in enumerate(zip(pieces, visible_masks(pieces), strict=True)):
        box = box_of(mask)
        assert box is not None
        left, top, right, bottom = box
        whole = len(piece.outlines) == 1 and bool((mask == piece.mask).all())
        outline = piece.outlines[0]
        if whole and outline.min() >= 0 and outline.max() <= SIZE:
            segmentation: Any = [[float(v) for v in outline.reshape(-1)]]
        else:
            segmentation = {"size": [SIZE, SIZE], "counts": runs_of(mask)}
        yield {
            "id": first + number,
            "image_id": image_id,
            "category_id": piece.label,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": segmentation,
        }


def write_part(part: str, number: int, photos: Mapping[str, Sequence[Pixels]], out: Path) -> None:
    """Write images, masks and annotations of one part.

    Args:
        part: `train` or `test`.
        number: of the part, for its seeds.
        photos: see `composite`.
        out: folder to write to.
    """
    for kind in ("images", "masks"):
        (out / kind / part).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for i in track(range(COUNTS[part]), f"making {part}ing images", show=shown_in_terminal()):
        image, pieces = composite(photos, np.random.Generator(np.random.Philox([number, i])))
        name = f"{i:04d}.png"
        Image.fromarray(image).save(out / "images" / part / name, compress_level=1)
        Image.fromarray(class_mask(pieces)).save(out / "masks" / part / name)
        images.append({"id": i + 1, "file_name": name, "height": SIZE, "width": SIZE})
        objects += annotations(pieces, i + 1, len(objects) + 1)
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    file = out / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def composites(cache: CacheFolder = None) -> Path:
    """Write `CACHE/composites-128-2/` once, and return it: 1,200 training and 200 test images.

    It holds `images/PART/*.png`, class ids by pixel in `masks/PART/*.png` with `classes.txt`, and
    COCO's `annotations/instances_PART.json`. The folder appears whole or not at all.
    """
    cache = default_cache() if cache is None else Path(cache).expanduser()

    def make(work: Path) -> None:
        photos: dict[str, dict[str, list[Pixels]]] = {part: {} for part in COUNTS}
        for name, file in photographs():
            for test, _, _, block in blocks(read_image(file)):
                photos["test" if test else "train"].setdefault(name, []).append(block)
        for number, part in enumerate(COUNTS):
            write_part(part, number, photos[part], work)
        (work / "classes.txt").write_text("\n".join(("background", *SHAPES)) + "\n")

    return folder_made_once(cache / FOLDER, make)
