"""Leakage between the parts of a data set: test images that are also training images, by content,
and near duplicates, by features. Either makes k-NN and probes look better than they are.
"""

import logging
from pathlib import Path

import numpy as np

from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.utils.terminal import say

from .cache import digests_of
from .extract import FeatureSet
from .neighbors import nearest

log = logging.getLogger(__name__)
MINOR = 0.01  # share of the test images up to which it is a remark, and not a warning


def count_copies(pair: LabelledPair, cache: Path | None, show: bool = False) -> int:
    """Number of test images whose stored bytes are those of a training image; of one set that is
    tested on itself, of images that are there more than once. Says so where there are any. For
    `cache` see `digests_of`.
    """
    titles = ("hashing train images", "hashing test images") if show else (None, None)
    train = digests_of(pair.train, cache, titles[0]).images
    if pair.test is pair.train:
        known, counts = np.unique(train, return_counts=True)
        again = np.isin(train, known[counts > 1]) & (train != b"")
        subject = "images are there more than once"
    else:
        test = digests_of(pair.test, cache, titles[1]).images
        again = np.isin(test, train) & (test != b"")
        subject = "test images are also training images"
    if count := int(again.sum()):
        first, share = pair.test.name(int(again.argmax())), count / len(again)
        sentence = (
            f"{count:,} of {len(again):,} {subject}, by content (such as {first}): k-NN and probes "
            f"find their copies, which may be {100 * share:.2g} points of their accuracy"
        )
        log.warning("%s", sentence) if share > MINOR else say(sentence)
    return count


def count_near_duplicates(features: FeatureSet, threshold: float) -> int:
    """Number of test images whose class token has a cosine above `threshold` with that of a
    training image, of one set with that of another image.
    """
    itself = np.arange(len(features.test)) if features.one_set else None
    similarity, _ = nearest(features.train, features.test, 1, itself)
    return int((similarity > threshold).sum())


def warn_if_perfect(knn: float, row: str) -> None:
    """Warn of a k-NN accuracy in percent that is too good."""
    if knn >= 100.0:
        log.warning(
            "%s: k-NN of %g %%: are test images near copies of training images, such as frames of "
            "a video? evaluation.near_duplicates=0.98 counts them", row, knn,
        )  # fmt: skip
