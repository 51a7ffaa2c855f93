"""Masks over the patches of images: blocks (BEiT, arXiv:2106.08254, algorithm 1) or single patches.

Which images are masked and how much is as in iBOT (arXiv:2111.07832) and DINOv2 (arXiv:2304.07193).
Differs: each masked image has exactly its number of patches, since the last block is cut where it
would exceed it; and the share of masked images is that of every batch, as nearly as whole images
allow, instead of on average only.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_xcit.errors import UserError

ASPECT = (0.3, 1 / 0.3)  # of a block, height by width
ATTEMPTS = 100  # blocks tried an image, before single patches make up the number


def sample_masks(
    num_images: int,
    grid: tuple[int, int],
    ratio: tuple[float, float],
    probability: float,
    generator: torch.Generator | None,
    blocks: bool,
    own: Int64[np.ndarray, " n"] | None = None,
) -> Bool[Tensor, "n h w"]:
    """Masks on the CPU, true where a patch is masked.

    An image has a mask with the given probability: of B images, probability * B have one, rounded
    up or down at random. Their ratios are uniform and spread evenly: of n masked images, one in
    each n-th part of the range, in random order. An image then has round(ratio * h * w) masked
    patches, which may be none where the ratio is small.

    Args:
        num_images: B, of all ranks and parts of a batch.
        grid: rows h and columns w of patches.
        ratio: lowest and highest share of an image's patches that are masked (iBOT: 0.1 to 0.5).
        probability: of an image to have a mask (iBOT: 0.5).
        generator: of which one number is drawn; None: torch's global one.
        blocks: mask rectangles; otherwise single patches at random.
        own: images whose masks are wanted; None: all. The others' do not change them.

    Raises:
        UserError: a ratio or the probability is not within 0 to 1, or the lowest ratio is above the
            highest.
    """
    check_ratio(ratio, probability)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    rng = np.random.Generator(np.random.Philox(seed))
    num_masked = math.floor(num_images * probability + rng.random())
    low, high = ratio
    shares = np.zeros(num_images)
    spread = (np.arange(num_masked) + rng.random(num_masked)) / max(num_masked, 1)
    shares[rng.permutation(num_images)[:num_masked]] = low + (high - low) * spread
    own = np.arange(num_images) if own is None else own
    masks = np.zeros((len(own), *grid), dtype=np.bool_)
    for mask, image in zip(masks, own, strict=True):
        count = round(float(shares[image]) * mask.size)
        of_image = np.random.Generator(np.random.Philox(key=[seed, image]))
        if blocks:
            mask_blocks_(mask, count, of_image)
        mask_patches_(mask, count, of_image)
    return torch.from_numpy(masks)


def check_ratio(ratio: tuple[float, float], probability: float) -> None:
    """Raise UserError for what is no range of shares or no probability."""
    low, high = ratio
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(
            f"mask ratio {low:g} to {high:g}: two shares within 0 to 1, the lower one first; iBOT "
            "has [0.1, 0.5]"
        )
    if not 0.0 <= probability <= 1.0:
        raise UserError(f"mask probability {probability:g}: within 0 to 1; iBOT has 0.5")


def mask_patches_(mask: Bool[np.ndarray, "h w"], count: int, rng: np.random.Generator) -> None:
    """Mask random patches until there are `count`."""
    free = np.flatnonzero(~mask)
    missing = count - (mask.size - len(free))
    if missing:
        mask.flat[rng.choice(free, missing, replace=False)] = True


def mask_blocks_(mask: Bool[np.ndarray, "h w"], count: int, rng: np.random.Generator) -> None:
    """Mask rectangles until there are `count` patches, or `ATTEMPTS` were made; they may overlap.

    Of the last one, only as many patches are taken as are missing, row by row from either end.
    """
    missing = count
    for *draws, end in rng.random((ATTEMPTS, 5)).tolist():
        if not missing:
            return
        block = random_block(draws, missing, mask.shape)
        if block is None:
            continue
        inside = mask[block] if end < 0.5 else mask[block][::-1, ::-1]
        rows, columns = np.nonzero(~inside)
        inside[rows[:missing], columns[:missing]] = True
        missing -= min(len(rows), missing)


def random_block(
    draws: list[float], missing: int, shape: tuple[int, ...]
) -> tuple[slice, slice] | None:
    """Rows and columns of a rectangle from four uniform numbers in [0, 1): of area, aspect, top and
    left.

    The area is uniform between (min(h, w) // 3)^2, at least 1, and the number of missing patches,
    the aspect log-uniform within `ASPECT`, both before rounding to whole patches, and the place
    uniform where it fits. None: it is larger than the grid.
    """
    least = max(1, (min(shape) // 3) ** 2)
    area = least + draws[0] * max(0, missing - least)
    low, high = map(math.log, ASPECT)
    aspect = math.exp(low + draws[1] * (high - low))
    height = max(1, round(math.sqrt(area * aspect)))
    width = max(1, round(math.sqrt(area / aspect)))
    if height > shape[0] or width > shape[1]:
        return None
    top = int(draws[2] * (shape[0] - height + 1))
    left = int(draws[3] * (shape[1] - width + 1))
    return slice(top, top + height), slice(left, left + width)


def patch_weights(mask: Bool[Tensor, "B h w"]) -> Float[Tensor, " M"]:
    """1 / (masked patches of its image) of each masked patch, in the order of `mask.nonzero()`."""
    counts = mask.sum(dim=(1, 2))
    return (1.0 / counts).repeat_interleave(counts)
