"""The published linear protocols: heads trained on augmented images through the frozen backbone.

DINO (arXiv:2104.14294, section 4.1): SGD with momentum 0.9, no weight decay, 100 epochs, batch 128,
learning rate times batch / 256, cosine to 0; random resized crops of 224 and flips; of XCiT
the final class token. DINOv2 (arXiv:2304.07193, section 7.1): 13 learning rates x {1, 4} last
blocks x {class token, class token and mean patch token}, 12,500 steps. All heads see the same
batches, so many cost one pass of the backbone.

Differs: the head is chosen on held-out training images, where the published code chooses on the
test set; these images are not trained on. XCiT's last four blocks are two with a class token and
two without, whose mean patch tokens stand in (`XCiT.parts`).
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import cv2
import numpy as np
import torch
from annotated_types import Gt, Le, Len
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_xcit.data.decode import decode
from ssl_xcit.data.fused import ATTEMPTS, cut, draw_boxes
from ssl_xcit.data.labels import Labels, label_kind
from ssl_xcit.data.loader import ResilientLoader, loader_options
from ssl_xcit.data.order import crop_seed, image_at
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess, normalise
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import UserError
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import Count, NonNegative, Positive, Text, Words

from ..evaluators.linear import held_out_rows, learnable_classes, right, setting_grid
from ..evaluators.linear_heads import (
    AccuracyMeter,
    LinearHead,
    ParallelHeads,
    cosine_decay,
    known_classes,
)
from ..evaluators.protocol import Fraction, Kinds, OneOrMore, Seed, Task
from ..features.extract import KINDS, batches, forward_parts, join_parts, parts_of
from ..features.extractor import FeatureExtractor
from ..statistics import Estimate

Range = Annotated[
    Sequence[Annotated[float, Gt(0), Le(1)]],
    Len(2, 2),
    Words("[low,high], two numbers above 0 and of at most 1"),
]


class RandomCrops(Dataset[tuple[UInt8[Tensor, "channels size size"], int]]):
    """Random resized crops with flips by position, a pure function of (seed, position), and the
    image's row; -1 where it cannot be read.
    """

    def __init__(
        self, source: Source, size: int, scale: Sequence[float], seed: int, preprocess: Preprocess
    ):
        self.source = source
        self.size = size
        self.scale = np.array([scale])
        self.seed = seed
        self.preprocess = preprocess

    def __getitem__(self, position: int) -> tuple[UInt8[Tensor, "channels size size"], int]:
        N = len(self.source)
        row = image_at(self.seed, position, N)
        try:
            pixels = decode(self.source.read(row), self.preprocess)
        except BadImage:
            empty = torch.zeros(self.preprocess.channels, self.size, self.size, dtype=torch.uint8)
            return empty, -1
        key = np.array([crop_seed(self.seed, position, N), 1], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        shares, aspects = generator.random((2, 1, ATTEMPTS))
        places, flip = generator.random((2, 1)), generator.random() < 0.5
        H, W = pixels.shape[:2]
        box = draw_boxes(H, W, self.scale, shares, aspects, places)[0]
        top, left, height, width = box.tolist()
        crop = cut(pixels, (top, left, top + height, left + width), self.size)
        if flip:
            crop = cv2.flip(crop, 1).reshape(crop.shape)
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), row


class AugmentedProbe(Task):
    """Top-1 accuracy of a linear classifier trained on augmented images: NAME, and NAME_lr, the
    best learning rate; raises UserError where settings do not go together.

    Args:
        lrs: learning rates to choose from, at a batch of 256.
        weight_decays: to choose from.
        kinds: of features to choose from, see `KINDS`.
        epochs: passes over the training images; None: `steps` counts, and the other way round.
        scale: share of the image's area in a crop.
        val_fraction: share of the training images that decides, and is not trained on.
        seed: of initial weights, order, crops and held-out images.
    """

    def __init__(
        self,
        name: Text,
        lrs: OneOrMore[Positive],
        weight_decays: OneOrMore[NonNegative] = (0.0,),
        kinds: Kinds = ("cls",),
        epochs: Positive | None = 100,
        steps: Count | None = None,
        batch_size: Count = 128,
        scale: Range = (0.08, 1.0),
        val_fraction: Fraction = 0.1,
        seed: Seed = 0,
    ):
        if (epochs is None) == (steps is None):
            raise UserError(f"{name}: set epochs={epochs} or steps={steps}, the other to null")
        if scale[0] > scale[1]:
            raise UserError(f"{name}: scale=[{scale[0]},{scale[1]}] must not fall: [low,high]")
        self.name = name
        self.grid = setting_grid(lrs, weight_decays, kinds)
        self.epochs, self.steps = epochs, steps
        self.batch_size = batch_size
        self.scale = tuple(scale)
        self.val_fraction = val_fraction
        self.seed = seed

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where there are no classes to learn, or no test images."""
        pair = extractor.pair
        if pair is None or label_kind(pair.train.labels) != "classes":
            raise UserError(f"tasks: {self.name} needs labelled images: eval_data.root=DIR")
        if pair.test is pair.train:
            raise UserError(f"tasks: {self.name} needs test images: eval_data.test_fraction=0.2")

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Train on a part of the training images, choose on the rest, test once."""
        self.check(extractor)
        pair = extractor.pair
        assert pair is not None
        assert pair.train.labels is not None
        names, ids = learnable_classes(pair.train.labels)
        held = held_out_rows(ids, self.val_fraction, self.seed)
        heads = self.train(extractor, pair, ids, np.flatnonzero(~held), len(names))
        meter = AccuracyMeter(heads)
        val = Subset(pair.train, np.flatnonzero(held))
        for features, classes in self.plain_features(extractor, val, ids[held], heads.kinds, "val"):
            meter.add(features, classes)
        place = meter.best()
        setting = heads.settings[place]
        weight, bias = heads.one(place)
        self.chosen = setting._asdict()
        self.head = LinearHead(
            weight.cpu(), bias.cpu(), setting.kind, "classes", names.tolist(),
            pair.test.class_names, self.chosen,
        )  # fmt: skip
        assert pair.test.labels is not None
        known = known_classes(names, pair.test.labels)
        hits = [
            right(self.head, features[setting.kind], classes)
            for features, classes in self.plain_features(
                extractor, pair.test, known, [setting.kind], "test"
            )
        ]
        yield str(self.name), Estimate(np.concatenate(hits))
        yield f"{self.name}_lr", setting.lr

    def train(
        self,
        extractor: FeatureExtractor,
        pair: LabelledPair,
        ids: Labels,
        rows: Int64[np.ndarray, " M"],
        num_classes: int,
    ) -> ParallelHeads:
        """Train all heads on random crops of some rows of the training images."""
        N, B = len(rows), self.batch_size
        length = self.steps if self.epochs is None else self.epochs * N / B
        steps = max(1, round(length or 0))
        dims = {kind: extractor.backbone.embed_dim * len(parts) for kind, parts in KINDS.items()}
        heads = ParallelHeads(self.grid, dims, num_classes, self.seed, extractor.device)
        parts = parts_of(heads.kinds)
        dataset = RandomCrops(
            Subset(pair.train, rows), pair.size, self.scale, self.seed, extractor.preprocess
        )
        classes = torch.from_numpy(ids[rows])

        def make(first: int) -> DataLoader:
            return DataLoader(
                dataset,
                B,
                sampler=range(first * B, steps * B),
                generator=torch.Generator(),
                **loader_options(extractor.workers),
            )

        title = f"{self.name}: {len(self.grid)} heads"
        crops: ResilientLoader[list[Tensor]] = ResilientLoader(make, steps)
        loader = track(crops, title, steps, extractor.show)
        with extractor.in_eval_mode() as backbone:
            for step, (pixels, image_rows) in enumerate(loader):
                good = image_rows >= 0
                if not good.any():
                    continue
                images = normalise(pixels[good].to(extractor.device), extractor.preprocess)
                features = join_parts(
                    forward_parts(backbone, images, parts), heads.kinds, extractor.device
                )
                targets = classes[image_rows[good]].to(extractor.device)
                heads.step_(features, targets, B / 256 * cosine_decay(step, steps))
        return heads

    def plain_features(
        self,
        extractor: FeatureExtractor,
        source: Source,
        classes: Labels,
        kinds: Sequence[str],
        part: str,
    ) -> Iterator[tuple[dict[str, Tensor], Int64[Tensor, " B"]]]:
        """Features by kind and classes of the readable images of a source, not augmented."""
        pair, start = extractor.pair, 0
        assert pair is not None
        options = (pair.resize, pair.size, parts_of(kinds), f"{self.name}: {part} images")
        device = "cpu" if part == "test" else extractor.device
        for features, good in batches(extractor, source, *options):
            here = torch.from_numpy(classes[start : start + len(good)])
            start += len(good)
            if good.any():
                readable = {name: values[good] for name, values in features.items()}
                yield join_parts(readable, kinds, device), here[good].to(device)
