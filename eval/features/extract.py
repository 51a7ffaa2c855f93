"""Extract features of images with a frozen backbone, once for all evaluators.

A backbone gives several parts of an image (`XCiT.parts`); a kind of features is one of them, or
several joined.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from ssl_xcit.data.crop_dataset import plain_loader
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.terminal import track

from .extractor import Device, FeatureExtractor

Features = Float[np.ndarray, "_ C"]
Rows = Int64[np.ndarray, " _"]  # which images of a source the features are of
Parts = dict[str, Features]
Kind = Literal["cls", "patch", "cls_patch", "last4", "last4_patch"]
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

    Labels are class ids; or (N, K) of 0 and 1 where an image may have several; or numbers, (N,) or
    (N, D).
    """

    train: Float[np.ndarray, "N C"]  # class tokens
    train_labels: Shaped[np.ndarray, "N *K"]
    test: Float[np.ndarray, "M C"]  # the same array as `train` where there is one set only
    test_labels: Shaped[np.ndarray, "M *K"]
    more: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # other parts
    class_names: Sequence[str] = ()  # by class id
    ranks: bool = False  # all ranks have them, and measure them together

    @property
    def one_set(self) -> bool:
        """Whether there are no test images, so that each image is tested on all others."""
        return self.test is self.train

    def usable(self, kinds: Sequence[str]) -> list[str]:
        """Those of the kinds whose parts are all there; the class token where none is."""
        known = {"cls", *self.more}
        return [kind for kind in kinds if known.issuperset(KINDS[kind])] or ["cls"]

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


def parts_of(kinds: Sequence[str]) -> list[str]:
    """Parts that some kinds are made of; the class token always."""
    return list(dict.fromkeys(["cls", *(part for kind in kinds for part in KINDS[kind])]))


def join_parts(
    parts: Mapping[str, Tensor], kinds: Sequence[str], device: Device = "cpu"
) -> dict[str, Tensor]:
    """Features by kind, (B, D) each, from those by part."""
    return {
        kind: torch.cat([parts[name] for name in KINDS[kind]], dim=1).to(device) for kind in kinds
    }


def forward_parts(backbone: XCiT, images: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    """Parts of a batch, (B, C) float32 on the CPU."""
    with torch.inference_mode():
        if list(parts) == ["cls"]:
            features = {"cls": backbone(images)}
        else:
            whole = backbone.parts(images)
            # a network of one block has no block before it
            features = {name: whole.get(name, whole["block_1"]) for name in parts}
        return {name: value.float().cpu() for name, value in features.items()}


def batches(
    extractor: FeatureExtractor,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Parts (B, C) of every image in the source's order, and (B,) whether it could be read.

    Images: short side to `resize`, central `size` x `size`, read and normalised as
    `extractor.preprocess` says. Several devices take batches in turns. The backbone is in eval mode
    for the time being, and no random number is drawn.
    """
    preprocess = extractor.preprocess
    loader = plain_loader(
        source, resize, size, extractor.batch_size, extractor.num_workers, preprocess
    )
    visible = title is not None and extractor.show

    def run(replica: tuple[XCiT, Device], pixels: Tensor) -> dict[str, Tensor]:
        backbone, device = replica
        images = normalise(pixels.to(device, non_blocking=True), preprocess)
        return forward_parts(backbone, images, parts)

    with extractor.in_eval_mode(), ExitStack() as stack:
        # a replica takes one batch at a time
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in extractor.replicas]
        for copied, _ in extractor.replicas[1:]:
            copied.eval()
        waiting: deque[tuple[Future[dict[str, Tensor]], Tensor]] = deque()
        for number, (pixels, readable) in enumerate(track(loader, title or "", show=visible)):
            turn = number % len(pools)
            if len(pools) == 1:
                yield run(extractor.replicas[0], pixels), readable
                continue
            waiting.append((pools[turn].submit(run, extractor.replicas[turn], pixels), readable))
            if len(waiting) > 2 * len(pools):
                done, good = waiting.popleft()
                yield done.result(), good
        for done, good in waiting:
            yield done.result(), good


def not_finite(where: object) -> RunFailed:
    """The error to raise where features are not finite."""
    return RunFailed(
        f"{where}: features that are not finite: the weights are damaged or the training diverged"
    )


def check_features(
    features: Features, rows: Rows, source: Source, readable: Bool[np.ndarray, " _"] | None = None
) -> None:
    """Raise RunFailed, naming an image, where those of `readable` (None: all) are not finite."""
    blocks = [features[start : start + 65_536] for start in range(0, len(features), 65_536)]
    sound = np.concatenate([np.isfinite(block).all(axis=1) for block in blocks])
    if readable is not None:
        sound |= ~readable
    bad = rows[~sound]
    if len(bad):
        example = source.name(int(bad[0]))
        raise not_finite(f"{len(bad):,} of {len(features):,} images, such as {example}")


def extract(
    extractor: FeatureExtractor,
    source: Source,
    resize: int,
    size: int,
    parts: Sequence[str] = ("cls",),
    title: str | None = None,
) -> tuple[Parts, Rows]:
    """The backbone's parts of every readable image, in the source's order, and which; see `batches`
    and `XCiT.parts`. With `extractor.ranks` they take batches in turns, the same ones as a single
    process, and all get the whole, to the last bit the same. Raises RunFailed where a feature is
    not finite (names the image), UserError where no image can be read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if extractor.ranks else (0, 1)
    turn = np.arange(len(source)) // extractor.batch_size % ranks
    share = np.flatnonzero(turn == rank)
    mine = Subset(source, share) if extractor.ranks else source
    empty = np.zeros((0, extractor.backbone.embed_dim), np.float32)
    collected: dict[str, list[np.ndarray]] = {name: [empty] for name in parts}
    readable = [np.zeros(0, bool)]
    if len(mine):
        for batch, kept in batches(extractor, mine, resize, size, parts, title):
            for name, tensor in batch.items():
                collected[name].append(tensor.numpy())
            readable.append(kept.numpy())
    whole = {name: np.concatenate(arrays) for name, arrays in collected.items()}
    good = np.concatenate(readable)
    if extractor.ranks:
        shares: list[Any] = [None] * ranks
        dist.all_gather_object(shares, (whole, good))
        order = np.argsort(np.concatenate([np.flatnonzero(turn == r) for r in range(ranks)]))
        whole = {name: np.concatenate([part[name] for part, _ in shares])[order] for name in parts}
        good = np.concatenate([mask for _, mask in shares])[order]
    rows = np.flatnonzero(good)
    if not len(rows):
        raise UserError(f"none of {len(source):,} images can be read, such as {source.name(0)}")
    if len(rows) < len(good):
        whole = {name: values[rows] for name, values in whole.items()}
    for values in whole.values():
        check_features(values, rows, source)
    return whole, rows


def as_feature_set(
    train: tuple[Parts, Rows], test: tuple[Parts, Rows], pair: LabelledPair, ranks: bool = False
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
        ranks,
    )
