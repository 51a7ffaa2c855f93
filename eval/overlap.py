"""Test images that are training images as well: by content, and nearly so by features.

Either makes k-NN and probes look better than they are.
"""

import logging
from pathlib import Path

import numpy as np

from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.terminal import say

from .feature_cache import digests_of
from .features import FeatureSet
from .search import nearest, similarities

log = logging.getLogger(__name__)
FEW = 0.01  # share of the test images up to which they are mentioned, and no warning


def same_content(pair: LabelledPair, cache: Path | None, show: bool = False) -> int:
    """Number of test images whose stored bytes are those of a training image; of one set that is
    tested on itself, of images that are there more than once. Says so where there are any.

    Args:
        pair: the images.
        cache: see `feature_cache.digests_of`.
        show: progress bars.
    """
    titles = ("hashing train images", "hashing test images") if show else (None, None)
    train = digests_of(pair.train, cache, titles[0]).each
    if pair.test is pair.train:
        known, counts = np.unique(train, return_counts=True)
        again = np.isin(train, known[counts > 1]) & (train != b"")
        what = "images are there more than once"
    else:
        test = digests_of(pair.test, cache, titles[1]).each
        again = np.isin(test, train) & (test != b"")
        what = "test images are also training images"
    if count := int(again.sum()):
        first, share = pair.test.name(int(again.argmax())), count / len(again)
        sentence = (
            f"{count:,} of {len(again):,} {what}, by content (such as {first}): k-NN and probes "
            f"find their copies, which may be {100 * share:.2g} points of their accuracy"
        )
        log.warning("%s", sentence) if share > FEW else say(sentence)
    return count


def similar(features: FeatureSet, threshold: float) -> int:
    """Number of test images whose class token has a cosine above `threshold` with that of a
    training image, of one set with that of another image.
    """
    itself = np.arange(len(features.test)) if features.one_set else None
    _, indices = nearest(features.train, features.test, 1, itself=itself)
    return int((similarities(features.train, features.test, indices) > threshold).sum())


def remark(knn: float, row: str) -> None:
    """Say of a k-NN accuracy in percent that it is too good."""
    if knn >= 100.0:
        log.warning(
            "%s: k-NN of %g %%: are test images near copies of training images, such as frames of "
            "a video? evaluation.near_duplicates=0.98 counts them", row, knn,
        )  # fmt: skip
