"""Frozen features of labelled images: extracted once, then every evaluator works on the arrays."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64
from rich.progress import track
from torch import nn

from ssl_xcit.data.module import plain_loader
from ssl_xcit.data.preprocess import Preprocess, normalise
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import UserError

Features = Float32[np.ndarray, "_ C"]
Rows = Int64[np.ndarray, " _"]  # which images of a source the features are of


@dataclass(frozen=True)
class FeatureSet:
    """Features and class ids of the images to learn from and of those to be tested on."""

    train: Float32[np.ndarray, "N C"]
    train_labels: Int64[np.ndarray, " N"]
    test: Float32[np.ndarray, "M C"]
    test_labels: Int64[np.ndarray, " M"]


@runtime_checkable
class Evaluator(Protocol):
    """Yields (name, value) pairs for one set of features; accuracies are in percent."""

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Measure."""
        ...


@torch.inference_mode()
def extract(
    backbone: nn.Module,
    source: Source,
    resize: int,
    size: int,
    how: Preprocess,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    title: str | None = None,
) -> tuple[Features, Rows]:
    """The backbone's class token of every readable image, in the source's order, and which.

    Images: short side to `resize`, central `size` x `size`, read and normalised as `how` says. The
    backbone is put in eval mode for the time being, and no random number is drawn.

    Args:
        title: shows a progress bar under this name.

    Raises:
        UserError: a feature is not finite (names the image), or no image can be read.
    """
    loader = plain_loader(source, resize, size, batch_size, num_workers, how)
    shown = title is not None and sys.stdout.isatty()
    batches = track(loader, title or "", transient=True, disable=not shown)
    was_training = backbone.training
    backbone.eval()
    parts, readable = [], []
    try:
        for pixels, good in batches:
            images = normalise(pixels.to(device, non_blocking=True), how)
            parts.append(backbone(images).float().cpu().numpy())
            readable.append(good.numpy())
    finally:
        backbone.train(was_training)
    rows = np.flatnonzero(np.concatenate(readable))
    if not len(rows):
        raise UserError(f"none of {len(source):,} images can be read, such as {source.name(0)}")
    features = np.concatenate(parts)[rows]
    bad = rows[~np.isfinite(features).all(axis=1)]
    if len(bad):
        raise UserError(
            f"{len(bad):,} of {len(features):,} images have features that are not finite, such as "
            f"{source.name(int(bad[0]))}: the weights are damaged or the training diverged"
        )
    return features, rows


def extract_pair(
    backbone: nn.Module,
    pair: LabelledPair,
    how: Preprocess,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    title: str | None = None,
) -> FeatureSet:
    """`extract` of both parts."""

    def part(source: Source, what: str) -> tuple[Features, Rows]:
        shown = f"{title}: {what} features" if title else None
        return extract(
            backbone, source, pair.resize, pair.size, how, batch_size, num_workers, device, shown
        )

    return as_feature_set(part(pair.train, "train"), part(pair.test, "test"), pair)


def as_feature_set(
    train: tuple[Features, Rows],
    test: tuple[Features, Rows],
    pair: LabelledPair,
) -> FeatureSet:
    """Features of some rows of both parts, with those rows' labels."""
    assert pair.train.labels is not None
    assert pair.test.labels is not None
    return FeatureSet(train[0], pair.train.labels[train[1]], test[0], pair.test.labels[test[1]])
