"""Frozen features of labelled images: extracted once, then every evaluator works on the arrays.

A backbone gives several parts of an image (`XCiT.parts`); a kind of features is one of them, or
several joined.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from ssl_xcit.data.module import plain_loader
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.terminal import track

from .frozen import Device, Frozen

Features = Float[np.ndarray, "_ C"]
Rows = Int64[np.ndarray, " _"]  # which images of a source the features are of
Parts = dict[str, Features]
KINDS: dict[str, tuple[str, ...]] = {  # kind: the parts that it joins
    "cls": ("cls",),
    "patch": ("patch",),
    "cls_patch": ("cls", "patch"),
    "last4": ("cls", "cls_1", "block_1", "block_2"),
    "last4_patch": ("cls", "cls_1", "block_1", "block_2", "patch"),
}


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of the images to learn from and of those to be tested on.

    Args:
        train: class tokens.
        train_labels: class ids; or (N, K) of 0 and 1 where an image may have several labels; or
            numbers, (N,) or (N, D).
        test: as `train`; the same array where there is one set only.
        test_labels: as `train_labels`.
        more: the other parts by name, of training and test images.
        class_names: by class id.
    """

    train: Float[np.ndarray, "N C"]
    train_labels: Shaped[np.ndarray, "N *K"]
    test: Float[np.ndarray, "M C"]
    test_labels: Shaped[np.ndarray, "M *K"]
    more: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    @property
    def one_set(self) -> bool:
        """There are no test images, so each is tested on all others."""
        return self.test is self.train

    def has(self, kind: str) -> bool:
        """Whether all parts of a kind are there."""
        return all(part == "cls" or part in self.more for part in parts_of([kind]))

    def of(self, kind: str) -> "FeatureSet":
        """The same images by another kind of features."""
        if kind == "cls":
            return self
        pairs = [(self.train, self.test) if p == "cls" else self.more[p] for p in KINDS[kind]]
        if len(pairs) == 1:
            return replace(self, train=pairs[0][0], test=pairs[0][1])
        train = np.concatenate([pair[0] for pair in pairs], axis=1)
        test = train if self.one_set else np.concatenate([pair[1] for pair in pairs], axis=1)
        return replace(self, train=train, test=test)


@runtime_checkable
class Evaluator(Protocol):
    """Yields (name, value) pairs for one set of features; accuracies are in percent.

    What reads other parts than the class token says so by an attribute `kinds`.
    """

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Measure."""
        ...


def parts_of(kinds: Sequence[str]) -> list[str]:
    """The parts that some kinds are made of; the class token always.

    Raises:
        UserError: no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"features={kind}: one of {', '.join(KINDS)}")
    return list(dict.fromkeys(["cls", *(part for kind in kinds for part in KINDS[kind])]))


def kinds_of(evaluators: Mapping[str, Evaluator | None]) -> list[str]:
    """What several evaluators read."""
    kinds = [kind for e in evaluators.values() for kind in getattr(e, "kinds", ("cls",))]
    return list(dict.fromkeys(kinds))


def looked_at(backbone: XCiT, images: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    """The parts of a batch, (B, C) float32 on the CPU."""
    with torch.inference_mode():
        if list(parts) == ["cls"]:
            found = {"cls": backbone(images)}
        else:
            found = backbone.parts(images)
            # a network of one block has no block before it
            found = {name: found.get(name, found["block_1"]) for name in parts}
        return {name: value.float().cpu() for name, value in found.items()}


def batches(
    frozen: Frozen,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Parts (B, C) of every image in the source's order, and (B,) whether it could be read.

    Images: short side to `resize`, central `size` x `size`, read and normalised as `frozen.how`
    says. Several devices take batches in turns. The backbone is in eval mode for the time being,
    and no random number is drawn.
    """
    loader = plain_loader(source, resize, size, frozen.batch_size, frozen.num_workers, frozen.how)
    shown = title is not None and frozen.show

    def run(where: tuple[XCiT, Device], pixels: Tensor) -> dict[str, Tensor]:
        backbone, device = where
        images = normalise(pixels.to(device, non_blocking=True), frozen.how)
        return looked_at(backbone, images, parts)

    with frozen.in_eval_mode(), ExitStack() as stack:
        # a replica takes one batch at a time
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in frozen.replicas]
        for copied, _ in frozen.replicas[1:]:
            copied.eval()
        waiting: deque[tuple[Future[dict[str, Tensor]], Tensor]] = deque()
        for number, (pixels, good) in enumerate(track(loader, title or "", show=shown)):
            turn = number % len(pools)
            if len(pools) == 1:
                yield run(frozen.replicas[0], pixels), good
                continue
            waiting.append((pools[turn].submit(run, frozen.replicas[turn], pixels), good))
            if len(waiting) > 2 * len(pools):
                done, readable = waiting.popleft()
                yield done.result(), readable
        for done, readable in waiting:
            yield done.result(), readable


def check_features(
    features: Features, rows: Rows, source: Source, readable: Bool[np.ndarray, " _"] | None = None
) -> None:
    """Of readable images: all, or those that `readable` names.

    Raises:
        RunFailed: one is not finite (names the image).
    """
    finite = [
        np.isfinite(features[start : start + 65_536]).all(axis=1)
        for start in range(0, len(features), 65_536)
    ]
    sound = np.concatenate(finite) if readable is None else np.concatenate(finite) | ~readable
    bad = rows[~sound]
    if len(bad):
        raise RunFailed(
            f"{len(bad):,} of {len(features):,} images have features that are not finite, such as "
            f"{source.name(int(bad[0]))}: the weights are damaged or the training diverged"
        )


def extract(
    frozen: Frozen,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
) -> tuple[Parts, Rows]:
    """The backbone's parts of every readable image, in the source's order, and which; see
    `batches`. With `frozen.ranks` each takes a share, and all get the whole.

    Args:
        title: shows a progress bar under this name.

    Raises:
        RunFailed: a feature is not finite (names the image).
        UserError: no image can be read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if frozen.ranks else (0, 1)
    share = np.array_split(np.arange(len(source)), ranks)[rank]
    mine = Subset(source, share) if frozen.ranks else source
    empty = np.zeros((0, frozen.backbone.embed_dim), np.float32)
    found: dict[str, list[np.ndarray]] = {name: [empty] for name in parts}
    readable = [np.zeros(0, bool)]
    if len(mine):
        for part, kept in batches(frozen, mine, resize, size, parts, title):
            for name, tensor in part.items():
                found[name].append(tensor.numpy())
            readable.append(kept.numpy())
    whole = {name: np.concatenate(arrays) for name, arrays in found.items()}
    good = np.concatenate(readable)
    if frozen.ranks:
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, (whole, good))
        whole = {name: np.concatenate([each[0][name] for each in everyone]) for name in parts}
        good = np.concatenate([each[1] for each in everyone])
    rows = np.flatnonzero(good)
    if not len(rows):
        raise UserError(f"none of {len(source):,} images can be read, such as {source.name(0)}")
    if len(rows) < len(good):
        whole = {name: values[rows] for name, values in whole.items()}
    for values in whole.values():
        check_features(values, rows, source)
    return whole, rows


def as_feature_set(
    train: tuple[Parts, Rows], test: tuple[Parts, Rows], pair: LabelledPair
) -> FeatureSet:
    """Features of some rows of both parts, with those rows' labels."""
    assert pair.train.labels is not None
    assert pair.test.labels is not None
    return FeatureSet(
        train[0]["cls"],
        pair.train.labels[train[1]],
        test[0]["cls"],
        pair.test.labels[test[1]],
        {name: (train[0][name], test[0][name]) for name in train[0] if name != "cls"},
        pair.train.class_names if len(pair.test.class_names) == 0 else pair.test.class_names,
    )
