"""Vectors of image files, and average precision of a ranking: shared by landmark retrieval and copy
detection.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.loader import parallel_map
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.terminal import track

from ..features.extract import not_finite
from ..features.extractor import FeatureExtractor

log = logging.getLogger(__name__)
Vectors = Float32[np.ndarray, "_ D"]
Places = Int64[np.ndarray, " P"]
Prepare = Callable[[Pixels, int], Pixels]  # (pixels, place of the file) -> pixels


def load_prepared(
    files: Sequence[Path], prepare: Prepare, preprocess: Preprocess, index: int
) -> Pixels | str:
    """An image file as the backbone takes it, or why it cannot be used."""
    try:
        return prepare(read_image(files[index], preprocess), index)
    except BadImage as error:
        return str(error)


def image_vectors(
    extractor: FeatureExtractor,
    files: Sequence[Path],
    prepare: Prepare,
    describe: Callable[[XCiT, Tensor], Tensor],
    title: str,
    skip_bad: bool = False,
) -> Vectors:
    """A vector of each image file, in their order; raises RunFailed where one is not finite (names
    the file), UserError where a file cannot be read, or none can.

    Args:
            files: of any sizes; those that `prepare` makes one size go through it together.
        prepare: from pixels and place in `files` to pixels.
        describe: (backbone, images (B, channels, H, W)) to vectors (B, D).
            skip_bad: skip files that cannot be read, with a warning.
    """
    load = partial(load_prepared, files, prepare, extractor.preprocess)
    chunks = parallel_map(load, len(files), extractor.workers)
    vectors: dict[int, np.ndarray] = {}
    waiting: dict[tuple[int, ...], dict[int, Pixels]] = {}

    def describe_waiting(shape: tuple[int, ...], backbone: XCiT) -> None:
        batch = waiting.pop(shape)
        rows = describe(backbone, extractor.images(*batch.values())).float().cpu().numpy()
        vectors.update(zip(batch, rows, strict=True))

    with extractor.inference() as backbone:
        images = (image for chunk in chunks for image in chunk)
        for i, image in enumerate(track(images, title, len(files), extractor.show)):
            if isinstance(image, str):
                if not skip_bad:
                    raise UserError(
                        f"{files[i]}: {image}; the benchmark needs it: download it again"
                    )
                log.warning("bad image skipped: %s (%s)", files[i], image)
                continue
            batch = waiting.setdefault(image.shape, {})
            batch[i] = image
            if len(batch) == extractor.batch_size:
                describe_waiting(image.shape, backbone)
            elif sum(map(len, waiting.values())) >= 4 * extractor.batch_size:
                describe_waiting(max(waiting, key=lambda s: len(waiting[s])), backbone)
        for shape in list(waiting):
            describe_waiting(shape, backbone)
    if not vectors:
        raise UserError(f"none of {len(files):,} images can be read, such as {files[0]}")
    order = sorted(vectors)
    stacked = np.stack([vectors[i] for i in order]).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(stacked).all(axis=1))
    if len(bad):
        raise not_finite(files[order[bad[0]]])
    return stacked


def positions(
    similarity: Float32[np.ndarray, " N"], right: Places, passed: Int64[np.ndarray, " _"]
) -> Places:
    """Ranks of the right images, from 0, ascending, without those passed over; of equals the wrong
    come first, so that features which are all the same retrieve nothing.
    """
    wrong = np.delete(similarity, np.concatenate([right, passed]))
    wrong.sort()
    ahead = len(wrong) - np.searchsorted(wrong, np.sort(similarity[right])[::-1], side="left")
    return ahead + np.arange(len(right))


def average_precision(places: Places) -> float:
    """1 / P sum over the right images j at places r_j of (j / r_j + (j + 1) / (r_j + 1)) / 2, where
    0 / 0 is 1: the area under precision over recall by trapezoids.
    """
    j = np.arange(len(places))
    before = np.where(places == 0, 1.0, j / np.maximum(places, 1))
    return float(np.mean(before + (j + 1) / (places + 1)) / 2)
