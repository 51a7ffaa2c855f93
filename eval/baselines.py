"""What features are worth that nobody trained: the rows that give a trained backbone's numbers a
meaning.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.multicrop import resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.models.xcit import XCiT

from .features import Features, FeatureSet, Rows, as_feature_set, extract_pair


def random_weights(
    backbone: XCiT,
    pair: LabelledPair,
    batch_size: int = 64,
    num_workers: int | None = None,
    seed: int = 0,
) -> FeatureSet:
    """Features of the same architecture with fresh weights."""
    device = backbone.cls_token.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = XCiT(**backbone.architecture)
    return extract_pair(
        fresh.to(device), pair, batch_size, num_workers, device, title="random weights"
    )


def colour_histogram(
    backbone: XCiT,
    pair: LabelledPair,
    batch_size: int = 64,
    num_workers: int | None = None,
    bins: int = 8,
    square_root: bool = False,
) -> FeatureSet:
    """Joint RGB histograms of the same pixels, `bins` a channel; the backbone is not used.

    `square_root` takes that of every cell (Hellinger's kernel).
    """

    def of(source: Source) -> tuple[Features, Rows]:
        found, rows = [], []
        for i in range(len(source)):
            try:
                pixels = source.read(i)
            except BadImage:
                continue  # the backbone's features leave it out too, and say so
            found.append(histogram(resize_center_crop(pixels, pair.resize, pair.size), bins))
            rows.append(i)
        cells = np.stack(found)
        return np.sqrt(cells) if square_root else cells, np.array(rows, dtype=np.int64)

    return as_feature_set(of(pair.train), of(pair.test), pair)


def histogram(image: UInt8[np.ndarray, "H W 3"], bins: int) -> Float32[np.ndarray, " D"]:
    """Share of pixels in each of bins^3 colour cells."""
    red, green, blue = np.moveaxis(image.astype(np.int64) * bins // 256, -1, 0)
    cells = np.bincount(((red * bins + green) * bins + blue).ravel(), minlength=bins**3)
    return (cells / cells.sum()).astype(np.float32)
