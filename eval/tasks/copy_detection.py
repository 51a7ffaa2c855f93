"""Copy detection on Copydays (Douze et al. 2009): an original is searched by its altered copies.

DINO's protocol (arXiv:2104.14294, section 4.2.2) after MultiGrain (Berman et al. 2019,
arXiv:1902.05509): squares of 320 pixels whatever the aspect ratio (bicubic), class token and
GeM-pooled patch tokens side by side, whitened, compared by cosine. Differs: the whole ranking
counts (there: the first 20), whitening takes the covariance about the mean (there: about zero) and
leaves directions out in which nothing varies, and of equally similar images the wrong come first.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from ssl_xcit.data.folders import image_files
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.validation import Count, Positive, Text

from ..evaluators.protocol import Task
from ..features.extractor import FeatureExtractor
from ..features.neighbors import SIMILARITIES, unit
from ..statistics import grouped
from .masks import Directory, check_not_below, resize_image
from .ranking import Vectors, average_precision, image_vectors, positions

PER_ORIGINAL = 100  # 200100.jpg is an original, 200101.jpg and on are its copies
MIN_VARIANCE = 1e-5  # of the largest; directions with less are left out


def as_square(pixels: Pixels, index: int, size: int) -> UInt8[np.ndarray, "size size channels"]:
    """`size` x `size`, the aspect ratio is lost."""
    return resize_image(pixels, size, size)


def generalised_mean(
    patches: Float[Tensor, "B C h w"], power: float, least: float = 1e-6
) -> Float[Tensor, "B C"]:
    """(mean over the patches of max(x, least)^p)^(1 / p) (GeM, Radenovic et al. 2018)."""
    return patches.clamp(min=least).pow(power).mean(dim=(2, 3)).pow(1.0 / power)


def token_and_patches(
    backbone: XCiT, images: Float[Tensor, "B channels H W"], gem: float | None
) -> Float[Tensor, "B D"]:
    """The class token, followed by the pooled patch tokens where `gem` is their power."""
    if gem is None:
        return backbone(images)
    cls, patches = backbone.forward_features(images)
    return torch.cat((cls, generalised_mean(patches.float(), gem)), dim=1)


class Whitening(NamedTuple):
    """x -> (x - mean) @ axes has variance 1 along each axis, and no correlation."""

    mean: Float64[np.ndarray, " D"]
    axes: Float64[np.ndarray, "D E"]

    def __call__(self, vectors: Vectors) -> Float32[np.ndarray, "_ E"]:
        """Whitened."""
        return ((vectors - self.mean) @ self.axes).astype(np.float32)


def whitening(vectors: Vectors) -> Whitening:
    """Whitening by PCA: eigenvectors of the covariance over the roots of their eigenvalues, largest
    first; raises UserError where nothing varies.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    centred = vectors - mean
    variance, axes = np.linalg.eigh(centred.T @ centred / max(1, len(vectors) - 1))
    kept = np.flatnonzero(variance > MIN_VARIANCE * variance[-1])[::-1]
    if not len(kept) or variance[-1] <= 0.0:
        raise UserError(
            f"whiten_root: the features of its {len(vectors):,} images are all the same; name a "
            "folder of many different ones"
        )
    return Whitening(mean, axes[:, kept] / np.sqrt(variance[kept]))


def original_of(file: Path) -> int:
    """The number of an image's original; raises UserError where its name is no number."""
    if not (file.stem.isascii() and file.stem.isdigit()):
        raise UserError(
            f"{file}: the name must be a number, as in Copydays: 200101.jpg is a copy of 200100.jpg"
        )
    return int(file.stem) // PER_ORIGINAL


def images_below(root: Path) -> list[Path]:
    """All image files of a folder; raises MissingPath where there is none."""
    return [root / name for name in image_files(root)]


class CopyDetection(Task):
    """Mean average precision in percent of finding the originals of copies, `copy_map`. Raises
    MissingPath for a folder that is missing or has no image, UserError for a file without number,
    or a copy without original.

    Args:
        root: holds original/ and the copies' folders, files named as Copydays does.
        subset: folder of the copies, `strong`, `crops`, `jpegqual`, or one inside, `crops/80`.
        gem: power of the pooled patch tokens beside the class token; None: class token only.
        distractors: a folder of other images to search among (DINO: 10,000); None: none.
        whiten_root: a folder of yet others to learn the whitening from (DINO: 20,000); None: none.
    """

    def __init__(
        self,
        root: Directory,
        subset: Text = "strong",
        size: Count = 320,
        gem: Positive | None = 4.0,
        distractors: Directory | None = None,
        whiten_root: Directory | None = None,
        name: Text = "copy",
    ):
        home = Path(str(root)).expanduser()
        self.name = name
        self.size = size
        self.gem = gem
        self.originals = images_below(home / "original")
        self.copies = images_below(home / str(subset))
        self.distractors, self.whiten_files = (
            [] if folder is None else images_below(Path(str(folder)).expanduser())
            for folder in (distractors, whiten_root)
        )
        numbers = np.array([original_of(file) for file in self.originals])
        self.right = [np.flatnonzero(numbers == original_of(file)) for file in self.copies]
        for file, right in zip(self.copies, self.right, strict=True):
            if not len(right):
                raise UserError(
                    f"{file}: none of {len(numbers):,} files in {home / 'original'} is its "
                    f"original, {original_of(file) * PER_ORIGINAL}"
                )

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where images are smaller than a patch."""
        check_not_below(self.size, extractor.backbone.patch_size, "copy_detection")

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Rank all originals and distractors for each copy; bad distractors only warn."""

        def vectors(files: list[Path], part: str, skip_bad: bool = False) -> Vectors:
            prepare = partial(as_square, size=self.size)
            describe = partial(token_and_patches, gem=self.gem)
            title = f"copies: {part}"
            return image_vectors(extractor, files, prepare, describe, title, skip_bad)

        bank, queries = vectors(self.originals, "originals"), vectors(self.copies, "queries")
        if self.distractors:
            bank = np.concatenate([bank, vectors(self.distractors, "distractors", True)])
        if self.whiten_files:
            whiten = whitening(vectors(self.whiten_files, "whitening", True))
            bank, queries = whiten(bank), whiten(queries)
        bank, queries = unit(bank), unit(queries)
        none = np.empty(0, dtype=np.int64)
        precisions = []
        rows_at_once = max(1, SIMILARITIES // len(bank))
        for first in range(0, len(queries), rows_at_once):
            rows = slice(first, first + rows_at_once)
            for similarity, right in zip(queries[rows] @ bank.T, self.right[rows], strict=True):
                precisions.append(average_precision(positions(similarity, right, none)))
        originals = [original_of(file) for file in self.copies]
        yield f"{self.name}_map", grouped(np.array(precisions), originals)
