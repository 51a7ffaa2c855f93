"""Image files as vectors, and how high the right ones stand in a ranking: what landmark retrieval
and copy detection share.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.data.decode import BadImage, read_image
from ssl_xcit.data.loader import default_workers, look_at_all
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.terminal import track

from .frozen import Frozen

log = logging.getLogger(__name__)
Vectors = Float32[np.ndarray, "_ D"]
Places = Int64[np.ndarray, " P"]
BLOCK = 2**26  # similarities at once, 256 MB


def resized(
    pixels: Pixels, width: int, height: int, how: Image.Resampling = Image.Resampling.LANCZOS
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """To this size, whatever the aspect ratio; any channels."""
    if pixels.shape[1::-1] == (width, height):
        return pixels
    if pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize((width, height), how))
    planes = [Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(p.resize((width, height), how)) for p in planes], axis=-1)


def look(
    files: Sequence[Path],
    prepare: Callable[[Pixels, int], Pixels],
    how: Preprocess,
    index: int,
) -> Pixels | str:
    """An image file as it is shown to the backbone, or why it cannot be used."""
    try:
        return prepare(read_image(files[index], how), index)
    except BadImage as error:
        return str(error)


def embed(
    frozen: Frozen,
    files: Sequence[Path],
    prepare: Callable[[Pixels, int], Pixels],
    describe: Callable[[XCiT, Tensor], Tensor],
    title: str,
    skip_bad: bool = False,
) -> Vectors:
    """A vector of each image file, in their order.

    Args:
        frozen: the backbone.
        files: of any sizes; those that `prepare` makes one size go through it together.
        prepare: (pixels, place in `files`) to pixels.
        describe: (backbone, images (B, channels, H, W)) to vectors (B, D).
        title: of the progress bar.
        skip_bad: leave files out that cannot be read, with a warning.

    Raises:
        RunFailed: a vector is not finite (names the file).
        UserError: a file cannot be read, or none can.
    """
    workers = default_workers() if frozen.num_workers is None else frozen.num_workers
    chunks = look_at_all(partial(look, files, prepare, frozen.how), len(files), workers)
    vectors: dict[int, np.ndarray] = {}
    waiting: dict[tuple[int, ...], dict[int, Pixels]] = {}

    def describe_waiting(shape: tuple[int, ...], backbone: XCiT) -> None:
        batch = waiting.pop(shape)
        found = describe(backbone, frozen.images(*batch.values())).float().cpu().numpy()
        vectors.update(zip(batch, found, strict=True))

    with frozen.looking() as backbone:
        looks = (found for chunk in chunks for found in chunk)
        shown = track(looks, title, len(files), frozen.show)
        for i, found in enumerate(shown):
            if isinstance(found, str):
                if not skip_bad:
                    raise UserError(f"{files[i]}: {found}; the benchmark needs it: fetch it again")
                log.warning("bad image left out: %s (%s)", files[i], found)
                continue
            batch = waiting.setdefault(found.shape, {})
            batch[i] = found
            if len(batch) == frozen.batch_size:
                describe_waiting(found.shape, backbone)
            elif sum(map(len, waiting.values())) >= 4 * frozen.batch_size:
                describe_waiting(max(waiting, key=lambda s: len(waiting[s])), backbone)
        for shape in list(waiting):
            describe_waiting(shape, backbone)
    if not vectors:
        raise UserError(f"none of {len(files):,} images can be read, such as {files[0]}")
    order = sorted(vectors)
    stacked = np.stack([vectors[i] for i in order]).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(stacked).all(axis=1))
    if len(bad):
        raise RunFailed(
            f"{files[order[bad[0]]]}: features that are not finite: the weights are damaged or the "
            "training diverged"
        )
    return stacked


def positions(
    similarity: Float32[np.ndarray, " N"],
    right: Places,
    passed: Int64[np.ndarray, " _"],
) -> Places:
    """Where the right images stand, from 0, ascending, in the ranking without those passed over; of
    equals the wrong come first, so that features which are all the same find nothing.
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
