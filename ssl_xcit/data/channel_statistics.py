"""Mean and standard deviation of each channel of a source, from counts of its pixel values."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.loader import ResilientLoader, parallel_map
from ssl_xcit.data.picture import BadImage, DeepRange
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError

Counts = Int64[np.ndarray, "channels 256"]
CountedImage = tuple[Counts, DeepRange | None] | str  # or why it cannot be read


class ChannelStatistics(NamedTuple):
    """Moments by channel, of values in 0..1; the bad images, and the range of deep ones."""

    mean: np.ndarray
    std: np.ndarray
    num_images: int
    bad: list[str]
    deep: list[DeepRange]


def count_values(
    source: Source, preprocess: Preprocess, indices: Int64[np.ndarray, " M"], place: int
) -> CountedImage:
    """Count how often each value occurs in each channel of an image."""
    index = int(indices[place])
    try:
        picture = open_picture(source.read(index), preprocess)
        pixels = picture.pixels()
    except BadImage as error:
        return f"{source.name(index)} ({error})"
    channels = pixels.reshape(-1, pixels.shape[-1]).T
    return np.stack([np.bincount(channel, minlength=256) for channel in channels]), picture.deep


def count_all(
    source: Source, preprocess: Preprocess, max_images: int, num_workers: int | None, timeout: float
) -> ResilientLoader[list[CountedImage]]:
    """Count the values of at most so many images, evenly spaced, in lists."""
    count = min(max_images, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
    task = partial(count_values, source, preprocess, indices)
    return parallel_map(task, len(indices), num_workers, timeout=timeout)


def measure(chunks: Iterable[list[CountedImage]], channels: int) -> ChannelStatistics:
    """Add the counts up; every image counts by its pixels, and whole numbers make it exact.

    Raises:
        UserError: no image can be read, or a channel is constant.
    """
    total, num_images = np.zeros((channels, 256), np.int64), 0
    bad: list[str] = []
    deep: list[DeepRange] = []
    for image in (image for chunk in chunks for image in chunk):
        if isinstance(image, str):
            bad.append(image)
        else:
            num_images += 1
            total += image[0]
            deep += [image[1]] if image[1] is not None else []
    if not num_images:
        raise UserError(f"none of {len(bad):,} images can be read, such as {bad[0]}")
    mean, std = moments(total)
    if (std == 0.0).any():
        raise UserError(
            f"channel {int(std.argmin())} has the same value everywhere: is "
            "preprocess.value_range right?"
        )
    return ChannelStatistics(mean, std, num_images, bad, deep)


def moments(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, of values in 0..1."""
    values = np.arange(256) / 255.0
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
