"""What features are worth that nobody trained: the rows that give a trained backbone's numbers a
meaning.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.preprocess import Preprocess, resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.models.xcit import XCiT

from .features import Features, FeatureSet, Rows, as_feature_set, extract_pair


def random_weights(
    backbone: XCiT,
    pair: LabelledPair,
    how: Preprocess,
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
        fresh.to(device), pair, how, batch_size, num_workers, device, title="random weights"
    )


def colour_histogram(
    backbone: XCiT,
    pair: LabelledPair,
    how: Preprocess,
    batch_size: int = 64,
    num_workers: int | None = None,
    bins: int = 8,
    square_root: bool = False,
) -> FeatureSet:
    """Joint RGB histograms of the same pixels, `bins` a channel; the backbone is not used. Of other
    channels than three each has its own.

    `square_root` takes that of every cell (Hellinger's kernel).
    """

    def of(source: Source) -> tuple[Features, Rows]:
        found, rows = [], []
        for i in range(len(source)):
            try:
                pixels = decode(source.read(i), how)
            except BadImage:
                continue  # the backbone's features leave it out too, and say so
            found.append(histogram(resize_center_crop(pixels, pair.resize, pair.size), bins))
            rows.append(i)
        cells = np.stack(found)
        return np.sqrt(cells) if square_root else cells, np.array(rows, dtype=np.int64)

    return as_feature_set(of(pair.train), of(pair.test), pair)


def histogram(image: UInt8[np.ndarray, "H W channels"], bins: int) -> Float32[np.ndarray, " D"]:
    """Share of pixels in each of bins^3 colour cells, or of bins cells a channel."""
    if image.shape[-1] != 3:
        places = image.reshape(-1, image.shape[-1]).astype(np.int64) * bins // 256
        counts = [np.bincount(channel, minlength=bins) for channel in places.T]
        return (np.concatenate(counts) / places.size).astype(np.float32)
    red, green, blue = np.moveaxis(image.astype(np.int64) * bins // 256, -1, 0)
    cells = np.bincount(((red * bins + green) * bins + blue).ravel(), minlength=bins**3)
    return (cells / cells.sum()).astype(np.float32)
