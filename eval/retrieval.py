"""Retrieval: how well nearest features find images of the same landmark, or of the same class.

`Retrieval` is the revisited Oxford and Paris benchmark (Radenovic et al. 2018, arXiv:1803.11285)
with frozen class tokens, as DINO (arXiv:2104.14294, section 4.2.1). As the benchmark has it, and
not DINO's script, queries are cropped to their box, at the scale that the whole image would have
(`crop_queries=False`: not cropped). Differs: of equally similar images those that are wrong come
first, a truncated file is an error, and EXIF rotation is applied.

`ClassRetrieval` needs class labels only: every test image queries the training images.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.xcit import XCiT

from .estimates import Estimate, grouped
from .features import FeatureSet
from .frozen import Frozen
from .ranking import BLOCK, Places, average_precision, embed, positions, resized
from .search import unit
from .settings import number, several, switch

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
HOME = "http://cmp.felk.cvut.cz/revisitop/"
KINDS = ("easy", "hard", "junk")
SETTINGS = {  # which images are right, and which are passed over
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class Query:
    """An image to search with: its file's stem, its box, and places in the list by kind."""

    name: str
    box: Box
    images: dict[str, Int64[np.ndarray, " _"]]


class Kind:
    """In place of numpy.dtype."""

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


class Array(list[Any]):
    """In place of numpy.ndarray: its values, flat."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        kind, content = state[2], state[4]
        self[:] = content if isinstance(content, list) else kind.read(content)


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): Kind,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
    ("numpy.core.multiarray", "scalar"): lambda kind, content: kind.read(content)[0],
    ("numpy.core.numeric", "_frombuffer"): lambda content, kind, *_: kind.read(content),
    ("__builtin__", "bytes"): lambda: b"",
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy's arrays of these (as lists). A pickle may name
    any function to be called; here the names that numpy needs lead to stand-ins, no other leads
    anywhere.
    """

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, or a refusal."""
        found = STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a list never does")
        return found


def read_ground_truth(file: Path) -> tuple[list[str], list[Query]]:
    """Names of the images that are searched, and the queries.

    Raises:
        MissingPath: no such file.
        UserError: not the benchmark's, or an index that is none.
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
        raise UserError(f"{file}: not a ground truth ({reason}); fetch it from {HOME}") from error
    if not images or not any(len(q.images[kind]) for q in queries for kind in ("easy", "hard")):
        raise UserError(
            f"{file}: no image, or no query with an image to find; fetch it from {HOME}"
        )
    return images, queries


def as_query(name: str, entry: Any, count: int) -> Query:
    """One entry of `gnd`, checked; `count` images are searched."""
    box = tuple(float(side) for side in entry["bbx"])
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"query {name}: bbx={list(box)} is not left, top, right, bottom")
    for kind in KINDS:
        for i in entry[kind]:
            if type(i) is not int or not 0 <= i < count:
                raise ValueError(f"query {name}: {kind} has {i}, and imlist has {count:,} images")
    found = {kind: np.unique(np.array(entry[kind], dtype=np.int64)) for kind in KINDS}
    return Query(name, box, found)


def fitted(
    pixels: Pixels, index: int, size: int, boxes: Sequence[Box] | None = None
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """The long side at most `size`; then, of an image at that scale, what is in its box."""
    scale = min(1.0, size / max(pixels.shape[:2]))
    if boxes is not None:
        left, top, right, bottom = (max(0, round(side)) for side in boxes[index])
        pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
    height, width, _ = pixels.shape
    if not height or not width:
        raise BadImage("the query's box lies outside of it")
    return resized(pixels, max(1, round(scale * width)), max(1, round(scale * height)))


def class_token(
    backbone: XCiT, images: Float[Tensor, "B channels H W"], scales: Sequence[float]
) -> Float[Tensor, "B C"]:
    """Mean class token of the images at several scales."""
    total = torch.zeros((), device=images.device)
    for scale in scales:
        factor = max(scale, 1 / min(images.shape[-2:]))  # a pixel is left
        total = total + backbone(
            images
            if factor == 1.0
            else torch.nn.functional.interpolate(images, scale_factor=factor, mode="bilinear")
        )
    return total / len(scales)


def precision_at(places: Places, k: int) -> float:
    """Share of right images among the first k, or up to the last right one if that is earlier."""
    looked_at = min(int(places[-1]) + 1, k)
    return float((places < looked_at).sum() / looked_at)


class Retrieval:
    """Mean average precision in percent, `roxford_easy`, `roxford_medium`, `roxford_hard`, and of
    the last two mean precision, `roxford_medium_precision_at_1`, `_5`, `_10`. A setting in which no
    query has an image to find is left out.

    Args:
        root: holds gnd_roxford5k.pkl (or another gnd_NAME.pkl) and jpg/NAME.jpg.
        name: what the numbers are called; None: as the ground truth is, `roxford`, `rparis`.
        size: images keep their aspect ratio, their long side is at most so many pixels.
        scales: of the images as the backbone sees them; several are averaged.
        crop_queries: to their boxes; DINO's script leaves them whole.

    Raises:
        MissingPath: the ground truth or an image that it names.
        UserError: a setting out of its range, or a file that is no ground truth.
    """

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        size: int = 512,
        scales: Sequence[float] = (1.0,),
        crop_queries: bool = True,
    ):
        number("retrieval: size", size, int, 1)
        scales = several("retrieval: scales", scales)
        switch("retrieval: crop_queries", crop_queries)
        home = Path(str(root)).expanduser()
        found = sorted(home.glob("gnd_*.pkl"))
        if len(found) != 1:
            raise MissingPath(
                f"root={root}: {len(found)} files gnd_*.pkl, and one is needed beside jpg/, such "
                f"as gnd_roxford5k.pkl of {HOME}"
            )
        images, queries = read_ground_truth(found[0])
        folder = home / "jpg"
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        for stem in [*images, *(q.name for q in queries)]:
            if f"{stem}.jpg" not in there:
                raise MissingPath(f"{folder / stem}.jpg: no such file, and {found[0]} names it")
        self.name = name or re.sub(r"\d+k$", "", found[0].stem.removeprefix("gnd_"))
        self.size = size
        self.scales = tuple(scales)
        self.crop_queries = crop_queries
        self.queries = queries
        self.files = [folder / f"{stem}.jpg" for stem in images]
        self.query_files = [folder / f"{q.name}.jpg" for q in queries]

    def __call__(self, frozen: Frozen) -> Iterator[tuple[str, float]]:
        """(name, percent)."""
        boxes = [q.box for q in self.queries] if self.crop_queries else None
        describe = partial(class_token, scales=self.scales)
        bank, wanted = (
            unit(embed(frozen, files, prepare, describe, f"{self.name}: {what}"))
            for files, prepare, what in (
                (self.files, partial(fitted, size=self.size), "images"),
                (self.query_files, partial(fitted, size=self.size, boxes=boxes), "queries"),
            )
        )
        similarity = wanted @ bank.T  # (Q, N)
        for setting, (right, passed) in SETTINGS.items():
            asked = [
                (row, query)
                for row, query in zip(similarity, self.queries, strict=True)
                if len(gather(query, right))
            ]
            if not asked:
                continue
            places = [positions(r, gather(q, right), gather(q, passed)) for r, q in asked]
            # several queries show one landmark, all_souls_000013 and all_souls_000026
            landmarks = [re.sub(r"_\d+$", "", query.name) for _, query in asked]
            precisions = np.array(list(map(average_precision, places)))
            yield f"{self.name}_{setting}", grouped(precisions, landmarks)
            for k in (1, 5, 10) if setting != "easy" else ():
                first = np.array([precision_at(p, k) for p in places])
                yield f"{self.name}_{setting}_precision_at_{k}", grouped(first, landmarks)


def gather(query: Query, kinds: Sequence[str]) -> Int64[np.ndarray, " _"]:
    """Places of the query's images of these kinds."""
    return np.concatenate([query.images[kind] for kind in kinds])


class ClassRetrieval:
    """`map`, mean average precision, and `recall_at_1` in percent: the training images are ranked
    by cosine similarity to each test image (where there is one set only, all others to each), and
    those of its class are right.

    Average precision is 1 / P sum over the right images of the share of right ones among all that
    are at least as similar; without training images of the class it is 0.

    Args:
        max_bank: of more training images so many are searched, evenly spaced in their order; None:
            all (ImageNet: every query sorts 1.28 million similarities).
    """

    def __init__(self, max_bank: int | None = 100_000):
        if max_bank is not None and max_bank < 1:
            raise UserError(f"max_bank={max_bank}: a number of images from 1, or null for all")
        self.max_bank = max_bank

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """(name, percent).

        Raises:
            UserError: labels that are not one class an image.
        """
        classes = features.train_labels
        if classes.ndim != 1 or classes.dtype.kind not in "iu":
            raise UserError(
                "retrieval by class needs one class an image, and these images have other labels: "
                "leave it out"
            )
        count = len(classes)
        N = min(count, self.max_bank or count)
        kept = np.arange(N) * count // N
        kept = kept[np.argsort(classes[kept], kind="stable")]  # a class is a slice
        bank, labels = torch.from_numpy(unit(features.train[kept])), classes[kept]
        starts = np.searchsorted(labels, features.test_labels, side="left").tolist()
        stops = np.searchsorted(labels, features.test_labels, side="right").tolist()
        precisions: list[float] = []
        nearest = []
        rows_at_once = max(1, BLOCK // N)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy sorts beside itself
            for first in range(0, len(features.test), rows_at_once):
                rows = slice(first, first + rows_at_once)
                similarity = (torch.from_numpy(unit(features.test[rows])) @ bank.T).numpy()
                if features.one_set:  # no image finds itself
                    own = np.flatnonzero((kept >= first) & (kept < first + rows_at_once))
                    similarity[kept[own] - first, own] = -np.inf
                nearest.append(labels[similarity.argmax(axis=1)])
                precisions += pool.map(slice_precision, similarity, starts[rows], stops[rows])
        yield "map", Estimate(np.array(precisions))
        yield "recall_at_1", Estimate(np.concatenate(nearest) == features.test_labels)


def slice_precision(similarity: Float32[np.ndarray, " N"], start: int, stop: int) -> float:
    """Average precision where start..stop are right, other than one of -inf; the similarities are
    sorted in place.
    """
    right = np.sort(similarity[start:stop])
    right = right[right > -np.inf]
    if not len(right):
        return 0.0
    similarity.sort()
    hits = len(right) - np.searchsorted(right, right, side="left")
    as_similar = len(similarity) - np.searchsorted(similarity, right, side="left")
    return float(np.mean(hits / as_similar))
