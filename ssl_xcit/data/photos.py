"""Built-in photographs: 64 x 64 windows cut from 17 images that scikit-image and scikit-learn carry
in their wheels.

The label is the photograph. A photograph is divided into blocks of 128 x 128; every third block
along the diagonals is for testing, and windows stay inside their block, so training and test pixels
are disjoint.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from ssl_xcit.data.cache import folder_made_once
from ssl_xcit.data.decode import read_image
from ssl_xcit.data.folders import class_folders, folder
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.data.sources import Files, LabelledPair
from ssl_xcit.errors import MissingPath
from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.validation import PLACE, Words

SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")
SIZE, BLOCK, STRIDE = 64, 128, 32
FOLDER = f"photos-{SIZE}-{BLOCK}-{STRIDE}"
MAX_BLOCKS = 16  # of one photograph, evenly spaced: the largest would make up a third of the set
CacheFolder = Annotated[str | Path | None, PLACE, Words("a folder or null")]


def photographs() -> Iterator[tuple[str, Path]]:
    """Yield name and file of each; none is imported or downloaded."""
    for package, inside, files in (
        ("skimage", "data", SKIMAGE),
        ("sklearn", "datasets/images", SKLEARN),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise MissingPath(
                f"data=photos needs {package}'s images: pip install scikit-image scikit-learn"
            )
        for name in files:
            yield Path(name).stem, Path(spec.origin).parent / inside / name


def blocks(image: Pixels) -> Iterator[tuple[bool, int, int, Pixels]]:
    """Yield (for testing, top, left, (128, 128, 3) block) of a photograph."""
    rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    places = [(r, c) for r in range(rows) for c in range(columns)]
    if len(places) > MAX_BLOCKS:
        places = [
            places[i] for i in np.linspace(0, len(places) - 1, MAX_BLOCKS).round().astype(int)
        ]
    for number, (r, c) in enumerate(places):
        test = (r + c if len(places) == rows * columns else number) % 3 == 2
        top, left = r * BLOCK, c * BLOCK
        yield test, top, left, image[top : top + BLOCK, left : left + BLOCK]


def windows(image: Pixels) -> Iterator[tuple[bool, int, int, Pixels]]:
    """Yield (for testing, top, left, (64, 64, 3) window) of a photograph."""
    steps = range(0, BLOCK - SIZE + 1, STRIDE)
    for test, top, left, block in blocks(image):
        for down in steps:
            for right in steps:
                window = block[down : down + SIZE, right : right + SIZE]
                yield test, top + down, left + right, window


def cut_photos(cache: str | Path | None = None) -> Path:
    """Cut PNG files into `CACHE/photos-64-128-32/{train,test}/PHOTOGRAPH/`, once.

    The folder appears whole or not at all.
    """
    cache = default_cache() if cache is None else Path(cache).expanduser()

    def make(work: Path) -> None:
        for name, file in photographs():
            for test, top, left, pixels in windows(read_image(file)):
                out = work / ("test" if test else "train") / name / f"{top:04d}_{left:04d}.png"
                out.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(out)

    return folder_made_once(cache / FOLDER, make)


def photos(cache: CacheFolder = None) -> Files:
    """Return the training windows, without labels."""
    return folder(str(cut_photos(cache) / "train"))


def labelled_photos(cache: CacheFolder = None) -> LabelledPair:
    """Return training and test windows with the photograph as class."""
    root = cut_photos(cache)
    train = class_folders(root / "train")
    test = class_folders(root / "test", train.class_names)
    return LabelledPair(train, test, "built-in photos", resize=SIZE, size=SIZE)
