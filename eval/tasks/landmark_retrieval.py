"""Landmark retrieval: the revisited Oxford and Paris benchmark (Radenovic et al. 2018,
arXiv:1803.11285) with frozen class tokens, as DINO (arXiv:2104.14294, section 4.2.1).

As the benchmark has it, and not DINO's script, queries are cropped to their box, at the scale that
the whole image would have (`crop_queries=False`: not cropped). Differs: of equally similar images
those that are wrong come first, a truncated file is an error, and EXIF rotation is applied.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.validation import Count, Positive, Text

from ..evaluators.protocol import OneOrMore, Task, as_list
from ..features.extractor import FeatureExtractor
from ..features.neighbors import unit
from ..statistics import grouped
from .masks import Directory, resize_image
from .ranking import Places, average_precision, image_vectors, positions

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
HOME = "http://cmp.felk.cvut.cz/revisitop/"
GROUPS = ("easy", "hard", "junk")
SETTINGS = {  # groups of images that are right, and groups that are passed over
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class Query:
    """A query image: its file's stem, its box, and the images of each group by their index."""

    name: str
    box: Box
    images: dict[str, Int64[np.ndarray, " _"]]


class DtypeStandIn:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def read(self, content: bytes | bytearray | str) -> list[Any]:
        """Numbers or strings from their bytes."""
        if not re.fullmatch(r"[biufSU]\d+", self.code):
            raise pickle.UnpicklingError(f"it has numbers of type {self.code}")
        raw = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(raw, np.dtype(self.order + self.code)).tolist()


class ArrayStandIn(list[Any]):
    """Stands in for numpy.ndarray: its values, flat."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        dtype, content = state[2], state[4]
        self[:] = content if isinstance(content, list) else dtype.read(content)


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): DtypeStandIn,
    ("numpy", "ndarray"): ArrayStandIn,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: ArrayStandIn(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, content: dtype.read(content)[0],
    ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, *_: dtype.read(content),
    ("__builtin__", "bytes"): lambda: b"",
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy's arrays of these (as lists). A pickle may name
    any function to be called; here the names that numpy needs are stand-ins, and all others are
    refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; raises UnpicklingError where there is none."""
        stand_in = STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a list never does")
        return stand_in


def read_ground_truth(file: Path) -> tuple[list[str], list[Query]]:
    """Names of the images that are searched, and the queries; raises MissingPath where there is no
    such file, UserError where it is not the benchmark's, or an index is out of range.
    """
    try:
        with file.open("rb") as stream:
            content = PlainUnpickler(stream, encoding="latin1").load()
        images = [str(name) for name in content["imlist"]]
        names = [str(name) for name in content["qimlist"]]
        pairs = list(zip(names, content["gnd"], strict=True))
        queries = [as_query(name, entry, len(images)) for name, entry in pairs]
    except OSError as error:
        raise MissingPath(f"{file}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises anything
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file}: not a ground truth ({reason}); download it from {HOME}"
        ) from error
    if not images or not any(len(q.images[kind]) for q in queries for kind in ("easy", "hard")):
        raise UserError(
            f"{file}: no image, or no query with an image to find; download it from {HOME}"
        )
    return images, queries


def as_query(name: str, entry: Any, count: int) -> Query:
    """One entry of `gnd`, checked; `count` images are searched."""
    box = tuple(float(side) for side in entry["bbx"])
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"query {name}: bbx={list(box)} is not left, top, right, bottom")
    for group in GROUPS:
        for i in entry[group]:
            if type(i) is not int or not 0 <= i < count:
                raise ValueError(f"query {name}: {group} has {i}, and imlist has {count:,} images")
    images = {group: np.unique(np.array(entry[group], dtype=np.int64)) for group in GROUPS}
    return Query(name, box, images)


def fitted(
    pixels: Pixels, index: int, size: int, boxes: Sequence[Box] | None = None
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """An image whose long side is at most `size`, cropped to its box where it has one."""
    scale = min(1.0, size / max(pixels.shape[:2]))
    if boxes is not None:
        left, top, right, bottom = (max(0, round(side)) for side in boxes[index])
        pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
    height, width, _ = pixels.shape
    if not height or not width:
        raise BadImage("the query's box lies outside of it")
    sides = max(1, round(scale * height)), max(1, round(scale * width))
    return resize_image(pixels, *sides, Image.Resampling.LANCZOS)


def class_token(
    backbone: XCiT, images: Float[Tensor, "B channels H W"], scales: Sequence[float]
) -> Float[Tensor, "B C"]:
    """Mean class token of the images at several scales."""
    total = torch.zeros((), device=images.device)
    for scale in scales:
        factor = max(scale, 1 / min(images.shape[-2:]))  # at least one pixel is left
        scaled = images
        if factor != 1.0:
            scaled = torch.nn.functional.interpolate(images, scale_factor=factor, mode="bilinear")
        total = total + backbone(scaled)
    return total / len(scales)


def precision_at(places: Places, k: int) -> float:
    """Share of right images among the first k, or up to the last right one if that is earlier."""
    count = min(int(places[-1]) + 1, k)
    return float((places < count).sum() / count)


class Retrieval(Task):
    """Mean average precision in percent, `roxford_easy`, `roxford_medium`, `roxford_hard`, and of
    the last two mean precision, `roxford_medium_precision_at_1`, `_5`, `_10`. A setting in which no
    query has an image to find is left out. Raises MissingPath for the ground truth or an image that
    it names, UserError for a file that is no ground truth.

    Args:
        root: holds gnd_roxford5k.pkl (or another gnd_NAME.pkl) and jpg/NAME.jpg.
        name: what the numbers are called; None: as the ground truth is, `roxford`, `rparis`.
        size: images keep their aspect ratio, their long side is at most so many pixels.
        scales: of the images as the backbone sees them; several are averaged.
        crop_queries: to their boxes; DINO's script leaves them whole.
    """

    def __init__(
        self,
        root: Directory,
        name: Text | None = None,
        size: Count = 512,
        scales: OneOrMore[Positive] = (1.0,),
        crop_queries: bool = True,
    ):
        home = Path(str(root)).expanduser()
        truths = sorted(home.glob("gnd_*.pkl"))
        if len(truths) != 1:
            raise MissingPath(
                f"root={root}: {len(truths)} files gnd_*.pkl, and one is needed beside jpg/, such "
                f"as gnd_roxford5k.pkl of {HOME}"
            )
        images, queries = read_ground_truth(truths[0])
        folder = home / "jpg"
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        for stem in [*images, *(q.name for q in queries)]:
            if f"{stem}.jpg" not in there:
                raise MissingPath(f"{folder / stem}.jpg: no such file, but {truths[0]} names it")
        self.name = name or re.sub(r"\d+k$", "", truths[0].stem.removeprefix("gnd_"))
        self.size = size
        self.scales = as_list(scales)
        self.crop_queries = crop_queries
        self.queries = queries
        self.files = [folder / f"{stem}.jpg" for stem in images]
        self.query_files = [folder / f"{q.name}.jpg" for q in queries]

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Rank all images for each query."""
        boxes = [q.box for q in self.queries] if self.crop_queries else None
        describe = partial(class_token, scales=self.scales)
        bank, queries = (
            unit(image_vectors(extractor, files, prepare, describe, f"{self.name}: {part}"))
            for files, prepare, part in (
                (self.files, partial(fitted, size=self.size), "images"),
                (self.query_files, partial(fitted, size=self.size, boxes=boxes), "queries"),
            )
        )
        similarity = queries @ bank.T  # (Q, N)
        for setting, (right, passed) in SETTINGS.items():
            answerable = [
                (row, query)
                for row, query in zip(similarity, self.queries, strict=True)
                if len(images_of(query, right))
            ]
            if not answerable:
                continue
            places = [
                positions(row, images_of(query, right), images_of(query, passed))
                for row, query in answerable
            ]
            # several queries show one landmark, all_souls_000013 and all_souls_000026
            landmarks = [re.sub(r"_\d+$", "", query.name) for _, query in answerable]
            precisions = np.array(list(map(average_precision, places)))
            yield f"{self.name}_{setting}", grouped(precisions, landmarks)
            for k in (1, 5, 10) if setting != "easy" else ():
                first = np.array([precision_at(p, k) for p in places])
                yield f"{self.name}_{setting}_precision_at_{k}", grouped(first, landmarks)


def images_of(query: Query, groups: Sequence[str]) -> Int64[np.ndarray, " _"]:
    """The query's images of some groups."""
    return np.concatenate([query.images[group] for group in groups])
