"""Gather the images, thumbnails and classes of a data set for its map."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.sources import Source
from ssl_xcit.utils.terminal import track

from ..online import thinned
from .atlas import squared
from .dataset import DataSet, ImageFeatures
from .pictures import Picture, missing_picture, visible

log = logging.getLogger(__name__)
AHEAD = 64  # thumbnails that are made in advance
SIDES = ((2_500, 64), (8_000, 48))  # of thumbnails, up to so many images; 32 beyond


def chosen_sources(data: DataSet, part: str, most: int) -> list[tuple[str, Source]]:
    """Images by their part, evenly spaced ones where they are too many; the part has no name where
    there is one set only.
    """
    sources = {"train": data.images, "test": data.images if data.others is None else data.others}
    if data.others is None:
        sources = {"": data.images}
    elif part != "all":
        sources = {part: sources[part]}
    total = sum(map(len, sources.values()))
    if total <= most:
        return list(sources.items())
    log.warning("%d of %d images are shown: max_images=%d", most, total, most)
    shares = {name: max(1, round(most * len(source) / total)) for name, source in sources.items()}
    return [(name, thinned(source, shares[name])) for name, source in sources.items()]


def unread_names(source: Source, images: ImageFeatures) -> list[str]:
    """Names of the images that could not be read."""
    return [source.name(int(i)) for i in np.setdiff1d(np.arange(len(source)), images.rows)]


def thumbnail_of(images: ImageFeatures, i: int, side: int) -> Picture:
    """The part of image i that the backbone saw, small; grey where it cannot be read any more."""
    share = min(1.0, images.size / images.resize)  # of the short side
    try:
        content = images.source.read(int(images.rows[i]))
        picture = open_picture(content, images.extractor.preprocess)
        short = share * min(picture.height, picture.width)
        pixels = visible(picture.pixels(max(1.0, short / (2 * side))))
    except BadImage:
        return missing_picture(side)
    short = max(1, round(share * min(pixels.shape[:2])))
    top, left = ((edge - short) // 2 for edge in pixels.shape[:2])
    return squared(pixels[top : top + short, left : left + short], side)


def thumbnails(sets: Sequence[ImageFeatures], side: int, show: bool) -> Iterator[Picture]:
    """Thumbnails of all images in their order; several are read at a time."""
    todo = [(images, i) for images in sets for i in range(len(images))]
    waiting: deque[Future[Picture]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for place in track(range(-AHEAD, len(todo)), "thumbnails", show=show):
            if place + AHEAD < len(todo):
                waiting.append(pool.submit(thumbnail_of, *todo[place + AHEAD], side))
            if place >= 0:
                yield waiting.popleft().result()


def classes_of(sets: Sequence[ImageFeatures]) -> tuple[list[int] | None, list[str]]:
    """A class id of each image, and the names by id; None where an image has no class."""
    words = [images.class_of(i) for images in sets for i in range(len(images))]
    known: list[str] = list(
        dict.fromkeys(str(name) for images in sets for name in images.source.class_names)
    )
    ids = {name: n for n, name in enumerate(known)}
    classes = []
    for word in words:
        if word is None:
            return None, []
        classes.append(ids.setdefault(word, len(ids)))
    return classes, list(ids)


def side_of(count: int) -> int:
    """Side of thumbnails in pixels, so that the page stays small."""
    return next((side for most, side in SIDES if count <= most), 32)
