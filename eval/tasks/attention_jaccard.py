"""Jaccard index of thresholded class attention and masks of objects.

After DINO (arXiv:2104.14294, section 4.2.2, figure 4): of each head's attention of the class token
over the patches the largest values that hold 60 % of the mass make a mask, upsampled by nearest.
Each index of an image's mask but 0 and 255 is an object. Of an object the head with the highest
Jaccard index counts (so the masks choose the head); an image has the mean over its objects, and
the number is the mean over images that have one. Beside it the same of one map, the mean over
heads, which no mask chooses. Differs: pixels of index 255 (VOC's borders) count for neither side,
where DINO's code has them as background; images are squeezed to a square.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count, Text

from ..evaluators.protocol import Fraction, Task
from ..features.extractor import FeatureExtractor
from ..statistics import Estimate
from .masks import (
    IGNORED,
    Directory,
    Mask,
    check_side,
    find_pairs,
    finite,
    read_batches,
    resize_mask,
)


def largest(attention: Float[Tensor, "*maps h w"], mass: float) -> Bool[Tensor, "*maps h w"]:
    """The fewest patches of each map that hold at least the share `mass` of it."""
    flat = attention.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # held by those that are larger
    kept = before < mass * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).view(attention.shape)


def jaccards(maps: Bool[Tensor, "heads h w"], mask: Mask) -> Float[np.ndarray, "objects heads"]:
    """Intersection over union of each object with each map at the mask's size."""
    labelled = mask != IGNORED
    upsampled = [
        resize_mask(one.cpu().numpy().astype(np.uint8), *mask.shape)[labelled] > 0 for one in maps
    ]
    indices = mask[labelled]
    rows = []
    for index in np.setdiff1d(indices, [0]):
        true = indices == index
        rows.append([(one & true).sum() / (one | true).sum() for one in upsampled])
    return np.array(rows).reshape(-1, len(upsampled))


class AttentionJaccard(Task):
    """Jaccard index in percent: `attention_jaccard` of each object's best head,
    `attention_jaccard_mean` of the mean over heads. Raises as `find_pairs` does.

    Args:
        root: images and masks of validation, see `masks.py`.
        size: side of the square that images are squeezed to, a multiple of the patch size.
        mass: share of the attention that is kept.
    """

    def __init__(
        self, root: Directory, size: Count = 480, mass: Fraction = 0.6, name: Text = "attention"
    ):
        self.pairs = find_pairs(root, "val")
        self.root = root
        self.size = size
        self.mass = mass
        self.name = name

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where patches do not tile the images."""
        check_side(self.size, extractor.backbone.patch_size)

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Compare the attention of every image with its objects."""
        self.check(extractor)
        best, mean = [], []
        with extractor.inference() as backbone:
            for images, masks, files in read_batches(
                extractor, self.pairs, self.size, "attention masks"
            ):
                attention = finite(backbone.attention(images).float(), *files)
                both = torch.cat((attention, attention.mean(1, keepdim=True)), dim=1)
                for maps, mask in zip(largest(both, self.mass), masks, strict=True):
                    objects = jaccards(maps, mask)
                    if len(objects):
                        best.append(objects[:, :-1].max(axis=1).mean())
                        mean.append(objects[:, -1].mean())
        if not best:
            raise UserError(f"root={self.root}: no mask has an object (an index of 1 to 254)")
        yield f"{self.name}_jaccard", Estimate(np.array(best))
        yield f"{self.name}_jaccard_mean", Estimate(np.array(mean))
