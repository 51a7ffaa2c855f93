"""Images with index masks: pairs found by file stem, indices read as they are, sizes by nearest.

Layouts below a root, SPLIT being train or val (ADE20K's training and validation are known too):

    images/SPLIT/NAME.jpg  masks/SPLIT/NAME.png            (or annotations/SPLIT/, as ADE20K)
    JPEGImages/NAME.jpg    SegmentationClass/NAME.png      ImageSets/Segmentation/SPLIT.txt  (VOC)
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.data.decode import read_file, read_image
from ssl_xcit.data.folders import image_files
from ssl_xcit.data.picture import BadImage, as_bad_image, check_size
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.hardware import usable_cores
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import Words

from ..features.extract import not_finite
from ..features.extractor import FeatureExtractor

IGNORED = 255  # an index that no class has: pixels without a label
NUM_INDICES = 256
SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}
VOC_LISTS = Path("ImageSets", "Segmentation")
GREY_STEPS = {2: 85, 4: 17}  # bits of a grey PNG: Pillow stretches them to 0..255 by this factor
Mask = UInt8[np.ndarray, "H W"]
Directory = Annotated[str | int | float | Path, Words("a folder")]


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


def existing_folder(root: Directory) -> Path:
    """The folder that `root` names; raises MissingPath."""
    home = Path(str(root)).expanduser()
    if not home.is_dir():
        raise MissingPath(f"root={root}: no such folder")
    return home


def find_pairs(root: Directory, split: str) -> list[Pair]:
    """Image and mask of every name of a split (`train` or `val`), sorted; raises MissingPath for
    none of the layouts, an empty folder, or an image or mask without partner, UserError for two
    files of one stem.
    """
    home = existing_folder(root)
    if (home / VOC_LISTS).is_dir():
        return listed_pairs(home, split)
    masks = next((home / n for n in ("masks", "annotations") if (home / n).is_dir()), None)
    if masks is None or not (home / "images").is_dir():
        raise MissingPath(
            f"root={root} must hold images/{split} and masks/{split} (or annotations/), or VOC's "
            "JPEGImages, SegmentationClass and ImageSets/Segmentation"
        )
    return pairs_by_stem(split_folder(home / "images", split), split_folder(masks, split))


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split; raises MissingPath."""
    for name in SPLITS[split]:
        if (folder / name).is_dir():
            return folder / name
    raise MissingPath(f"{folder}: no folder {' or '.join(SPLITS[split])} in it")


def pairs_by_stem(images: Path, masks: Path) -> list[Pair]:
    """All files of two folders, in pairs by their path without extension."""
    by_folder = {folder: by_stem(folder) for folder in (images, masks)}
    for folder, other in ((images, masks), (masks, images)):
        alone = sorted(by_folder[folder].keys() - by_folder[other].keys())
        if alone:
            raise MissingPath(
                f"{by_folder[folder][alone[0]]} has no partner {alone[0]}.* in {other} "
                f"({len(alone):,} such files): add it, or remove the file"
            )
    return [Pair(by_folder[images][s], by_folder[masks][s]) for s in sorted(by_folder[images])]


def by_stem(folder: Path) -> dict[str, Path]:
    """Image files below a folder by their path without extension."""
    files: dict[str, Path] = {}
    for name in image_files(folder):
        stem = os.path.splitext(name)[0]
        if stem in files:
            raise UserError(f"{files[stem]} and {name} have one stem: keep one of them")
        files[stem] = folder / name
    return files


def listed_pairs(home: Path, split: str) -> list[Pair]:
    """Pairs of the names in VOC's list of a split."""
    names = read_names(home / VOC_LISTS / f"{split}.txt")
    pairs = [
        Pair(home / "JPEGImages" / f"{n}.jpg", home / "SegmentationClass" / f"{n}.png")
        for n in sorted(names)
    ]
    for pair in pairs:
        for path in pair:
            if not path.is_file():
                raise MissingPath(f"{path}: no such file, but {VOC_LISTS / split}.txt names it")
    return pairs


def read_names(path: Path) -> list[str]:
    """Names from a file, one a line; raises MissingPath where there is none."""
    try:
        names = path.read_text().split()
    except OSError as error:
        raise MissingPath(f"{path}: no such file; it must list names, one a line") from error
    if not names:
        raise MissingPath(f"{path}: no names in it")
    return names


def read_mask(path: Path, preprocess: Preprocess) -> Mask:
    """The indices of a palette or grey PNG, never their colours; raises UserError where it cannot
    be read, has colours, or an index above 255.
    """
    try:
        content = read_file(path)
        with as_bad_image():
            mask = Image.open(io.BytesIO(content), formats=("PNG",))
            check_size(*mask.size, preprocess)
            indices = np.asarray(mask)
    except BadImage as error:
        raise UserError(f"{path}: not readable as a PNG mask: {error}") from error
    if mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
        raise UserError(
            f"{path}: a mask holds indices, but this one has mode {mask.mode}: save it as a "
            "palette or grey PNG"
        )
    if int(indices.max()) >= NUM_INDICES:
        raise UserError(f"{path}: index {int(indices.max())}; indices must be {IGNORED} or lower")
    bits = content[24]
    steps = GREY_STEPS.get(bits, 1) if mask.mode == "L" else 1
    return indices.astype(np.uint8) // np.uint8(steps)


def read_pair(pair: Pair, preprocess: Preprocess) -> tuple[Pixels, Mask]:
    """An image and its mask; raises UserError where one cannot be read, or their sizes differ."""
    try:
        image = read_image(pair.image, preprocess)
    except BadImage as error:
        raise UserError(f"{pair.image}: {error}; repair it, or remove it with its mask") from error
    mask = read_mask(pair.mask, preprocess)
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{pair.mask} has {mask.shape[1]} x {mask.shape[0]} pixels and its image "
            f"{image.shape[1]} x {image.shape[0]}: make them the same"
        )
    return image, mask


def resize_image(
    image: UInt8[np.ndarray, "H W channels"],
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "{height} {width} channels"]:
    """An image of this size, antialiased, whatever its aspect ratio; any number of channels."""
    if image.shape[:2] == (height, width):
        return image
    planes = [image] if image.shape[-1] == 3 else list(np.moveaxis(image, -1, 0))
    resized = [
        np.array(Image.fromarray(np.ascontiguousarray(p)).resize((width, height), resampling))
        for p in planes
    ]
    return resized[0] if image.shape[-1] == 3 else np.stack(resized, axis=-1)


def resize_mask(mask: Mask, height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """A mask of this size: the index at the centre of each new pixel."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def check_side(size: int, patch_size: int) -> None:
    """Raise UserError where patches do not tile a side."""
    if size % patch_size:
        fit = max(1, round(size / patch_size)) * patch_size
        raise UserError(f"size={size} must be a multiple of the patch size {patch_size}; try {fit}")


def check_not_below(size: int, patch_size: int, task: str) -> None:
    """Raise UserError where images are smaller than a patch."""
    if size < patch_size:
        raise UserError(f"{task}: size={size} must be at least the patch size {patch_size}")


def finite(features: Float[Tensor, "*shape"], *files: Path) -> Float[Tensor, "*shape"]:
    """The features, of one image or of a batch; raises RunFailed where one is not finite."""
    if not features.isfinite().all():
        good = features.isfinite().flatten(1).all(dim=1).tolist()
        raise not_finite(files[0] if len(files) == 1 else files[good.index(False)])
    return features


def read_batches(
    extractor: FeatureExtractor, pairs: Sequence[Pair], size: int, title: str
) -> Iterator[tuple[Float[Tensor, "B channels size size"], list[Mask], list[Path]]]:
    """The backbone's input, images squeezed to squares; the masks as they are; images' files."""

    def read(pair: Pair) -> tuple[Pixels, Mask]:
        image, mask = read_pair(pair, extractor.preprocess)
        return resize_image(image, size, size), mask

    threads = usable_cores() if extractor.num_workers is None else extractor.num_workers
    starts = range(0, len(pairs), extractor.batch_size)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in track(starts, title, show=extractor.show):
            here = pairs[start : start + extractor.batch_size]
            batch = list(pool.map(read, here))
            images = extractor.images(*(image for image, _ in batch))
            yield images, [mask for _, mask in batch], [pair.image for pair in here]
