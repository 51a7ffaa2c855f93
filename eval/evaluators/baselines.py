"""Baselines: features of random weights and colour histograms, measured like the backbone's."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import Float32, UInt8

from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.terminal import track

from ..features.cache import Folder, extract_pair, kept
from ..features.extract import FeatureSet, Parts, Rows, as_feature_set
from ..features.extractor import FeatureExtractor
from .protocol import Seed


def random_weights(
    extractor: FeatureExtractor, kinds: Sequence[str] = ("cls",), seed: Seed = 0
) -> FeatureSet:
    """Features of the same architecture with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = XCiT(**extractor.backbone.architecture)
    untrained = replace(extractor, backbone=fresh.to(extractor.device))
    return extract_pair(untrained, kinds, title="random weights")


def colour_histogram(
    extractor: FeatureExtractor,
    kinds: Sequence[str] = ("cls",),
    bins: Annotated[int, Ge(1), Le(256)] = 8,
    square_root: bool = False,
) -> FeatureSet:
    """Joint RGB histograms of the same pixels, `bins` a channel, kept as features are; the backbone
    is not used. Of other channels than three each has its own.

    `square_root` takes that of every cell (Hellinger's kernel).
    """
    pair = extractor.pair
    assert isinstance(pair, LabelledPair)

    def of(source: Source, part: str) -> tuple[Parts, Rows]:
        title = f"colour histogram: {part} images"

        def fill(folder: Folder, missing: Sequence[str]) -> None:
            parts, rows = histograms(extractor, source, pair, bins, title)
            folder.keep({"cls": (parts["cls"], None), "cls.rows": (rows, None)})

        made_by = {"colour histogram": bins}
        found = kept(extractor, source, pair.resize, pair.size, made_by, fill, title=title)
        parts, rows = found or histograms(extractor, source, pair, bins, title)
        return {"cls": np.sqrt(parts["cls"])} if square_root else parts, rows

    train = of(pair.train, "train")
    test = train if pair.test is pair.train else of(pair.test, "test")
    return as_feature_set(train, test, pair)


def histograms(
    extractor: FeatureExtractor, source: Source, pair: LabelledPair, bins: int, title: str
) -> tuple[Parts, Rows]:
    """Of all images that can be read."""
    cells, rows = [], []
    for i in track(range(len(source)), title, show=extractor.show):
        try:
            pixels = decode(source.read(i), extractor.preprocess)
        except BadImage:
            continue  # the backbone's features leave it out too, and say so
        cells.append(histogram(resize_center_crop(pixels, pair.resize, pair.size), bins))
        rows.append(i)
    return {"cls": np.stack(cells)}, np.array(rows, dtype=np.int64)


def histogram(image: UInt8[np.ndarray, "H W channels"], bins: int) -> Float32[np.ndarray, " D"]:
    """Share of pixels in each of bins^3 colour cells, or of bins cells a channel."""
    if image.shape[-1] != 3:
        places = image.reshape(-1, image.shape[-1]).astype(np.int64) * bins // 256
        counts = [np.bincount(channel, minlength=bins) for channel in places.T]
        return (np.concatenate(counts) / places.size).astype(np.float32)
    red, green, blue = np.moveaxis(image.astype(np.int64) * bins // 256, -1, 0)
    cells = np.bincount(((red * bins + green) * bins + blue).ravel(), minlength=bins**3)
    return (cells / cells.sum()).astype(np.float32)
