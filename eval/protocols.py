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
from itertools import product

import cv2
import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.fused import ATTEMPTS, cut, draw_boxes
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.loader import Restarting, default_workers, loader_options
from ssl_xcit.data.order import crop_seed, image_at
from ssl_xcit.data.preprocess import Preprocess, normalise
from ssl_xcit.data.sources import LabelledPair, Source, Subset
from ssl_xcit.errors import UserError
from ssl_xcit.terminal import track

from .estimates import Estimate
from .features import KINDS, batches, looked_at, parts_of
from .frozen import Frozen
from .heads import Heads, LinearHead, Setting, Tally, cosine, known_classes
from .knn import Labels
from .linear import held_out_rows, right
from .settings import several


class RandomCrops(Dataset[tuple[UInt8[Tensor, "channels size size"], int]]):
    """Random resized crops with flips by position, a pure function of (seed, position), and the
    image's row; -1 where it cannot be read.
    """

    def __init__(
        self, source: Source, size: int, scale: Sequence[float], seed: int, how: Preprocess
    ):
        self.source = source
        self.size = size
        self.scale = np.array([scale])
        self.seed = seed
        self.how = how

    def __getitem__(self, position: int) -> tuple[UInt8[Tensor, "channels size size"], int]:
        N = len(self.source)
        row = image_at(self.seed, position, N)
        try:
            pixels = decode(self.source.read(row), self.how)
        except BadImage:
            empty = torch.zeros(self.how.channels, self.size, self.size, dtype=torch.uint8)
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


class AugmentedProbe:
    """Top-1 accuracy of a linear classifier trained on augmented images: NAME, and NAME_lr, the
    learning rate chosen.

    Args:
        name: what the numbers are called.
        lrs: learning rates to choose from, at a batch of 256.
        weight_decays: to choose from.
        kinds: of features to choose from, see `KINDS`.
        epochs: passes over the training images; or else
        steps: so many steps.
        batch_size: images a step.
        scale: share of the image's area in a crop.
        val_fraction: share of the training images that decides, and is not trained on.
        seed: of initial weights, order, crops and held-out images.

    Attributes:
        head: the last classifier made.
        chosen: its setting.
    """

    def __init__(
        self,
        name: str,
        lrs: float | Sequence[float],
        weight_decays: float | Sequence[float] = (0.0,),
        kinds: str | Sequence[str] = ("cls",),
        epochs: float | None = 100,
        steps: int | None = None,
        batch_size: int = 128,
        scale: float | Sequence[float] = (0.08, 1.0),
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        length = steps if epochs is None else epochs
        if (epochs is None) == (steps is None) or length is None or length <= 0:
            raise UserError(f"epochs={epochs}, steps={steps}: one of them, above 0")
        scale = several(f"{name}.scale", scale)
        if (
            type(batch_size) is not int
            or batch_size < 1
            or not 0.0 < val_fraction < 1.0
            or len(scale) != 2
            or not scale[0] <= scale[1] <= 1.0
        ):
            raise UserError(
                f"{name}: batch_size={batch_size}, val_fraction={val_fraction}, scale={scale}: at "
                "least one image, a share in (0, 1), 0 < low <= high <= 1"
            )
        lrs = several(f"{name}.lrs", lrs)
        weight_decays = several(f"{name}.weight_decays", weight_decays, low=0.0)
        kinds = several(f"{name}.kinds", kinds, str)
        parts_of(kinds)
        self.name = name
        self.grid = [Setting(k, lr, wd) for k, wd, lr in product(kinds, weight_decays, lrs)]
        self.epochs, self.steps = epochs, steps
        self.batch_size = batch_size
        self.scale = scale
        self.val_fraction = val_fraction
        self.seed = seed
        self.head: LinearHead | None = None
        self.chosen: dict[str, object] = {}

    def check(self, frozen: Frozen) -> None:
        """Before anything is measured.

        Raises:
            UserError: there are no classes to learn, or no test images.
        """
        pair = frozen.pair
        if pair is None or label_kind(pair.train.labels) != "classes":
            raise UserError(f"tasks: {self.name} needs labelled images: eval_data.root=DIR")
        if pair.test is pair.train:
            raise UserError(f"tasks: {self.name} needs test images: eval_data.test_fraction=0.2")

    def __call__(self, frozen: Frozen) -> Iterator[tuple[str, float]]:
        """Train on a part of the training images, choose on the rest, test once."""
        self.check(frozen)
        pair = frozen.pair
        assert pair is not None
        assert pair.train.labels is not None
        names, ids = np.unique(pair.train.labels, return_inverse=True)
        ids = ids.astype(np.int64)
        held = held_out_rows(ids, self.val_fraction, self.seed)
        heads = self.trained(frozen, pair, ids, np.flatnonzero(~held), len(names))
        tally = Tally(heads)
        val = Subset(pair.train, np.flatnonzero(held))
        for features, classes in self.looked_through(frozen, val, ids[held], heads.kinds, "val"):
            tally.add(features, classes)
        place = tally.best()
        setting = heads.settings[place]
        weight, bias = heads.one(place)
        self.chosen = setting._asdict()
        self.head = LinearHead(
            weight.cpu(), bias.cpu(), setting.kind, "classes", names.tolist(),
            pair.test.class_names, self.chosen,
        )  # fmt: skip
        assert pair.test.labels is not None
        known = known_classes(names, pair.test.labels)
        found = [
            right(self.head, features[setting.kind], classes)
            for features, classes in self.looked_through(
                frozen, pair.test, known, [setting.kind], "test"
            )
        ]
        yield self.name, Estimate(np.concatenate(found))
        yield f"{self.name}_lr", setting.lr

    def trained(
        self,
        frozen: Frozen,
        pair: LabelledPair,
        ids: Labels,
        rows: Int64[np.ndarray, " M"],
        num_classes: int,
    ) -> Heads:
        """All heads, on random crops of some rows of the training images."""
        N, B = len(rows), self.batch_size
        length = self.steps if self.epochs is None else self.epochs * N / B
        steps = max(1, round(length or 0))
        heads = Heads(self.grid, self.dims(frozen), num_classes, self.seed, frozen.device)
        parts = parts_of(heads.kinds)
        dataset = RandomCrops(
            Subset(pair.train, rows), pair.size, self.scale, self.seed, frozen.how
        )
        classes = torch.from_numpy(ids[rows])
        workers = default_workers() if frozen.num_workers is None else frozen.num_workers

        def make(first: int) -> DataLoader:
            return DataLoader(
                dataset,
                B,
                sampler=range(first * B, steps * B),
                generator=torch.Generator(),
                **loader_options(workers),
            )

        title = f"{self.name}: {len(self.grid)} heads"
        crops: Restarting[list[Tensor]] = Restarting(make, steps)
        loader = track(crops, title, steps, frozen.show)
        with frozen.in_eval_mode() as backbone:
            for step, (pixels, which) in enumerate(loader):
                good = which >= 0
                if not good.any():
                    continue
                images = normalise(pixels[good].to(frozen.device), frozen.how)
                found = looked_at(backbone, images, parts)
                features = joined(found, heads.kinds, frozen.device)
                wanted = classes[which[good]].to(frozen.device)
                heads.step_(features, wanted, B / 256 * cosine(step, steps))
        return heads

    def dims(self, frozen: Frozen) -> dict[str, int]:
        """Numbers of each kind of features."""
        return {kind: frozen.backbone.embed_dim * len(parts) for kind, parts in KINDS.items()}

    def looked_through(
        self, frozen: Frozen, source: Source, classes: Labels, kinds: Sequence[str], what: str
    ) -> Iterator[tuple[dict[str, Tensor], Int64[Tensor, " B"]]]:
        """Features by kind and classes of the readable images of a source, not augmented."""
        pair, start = frozen.pair, 0
        assert pair is not None
        options = (pair.resize, pair.size, parts_of(kinds), f"{self.name}: {what} images")
        for found, good in batches(frozen, source, *options):
            here = torch.from_numpy(classes[start : start + len(good)])
            start += len(good)
            if good.any():
                device = "cpu" if what == "test" else frozen.device
                kept = {name: values[good] for name, values in found.items()}
                yield joined(kept, kinds, device), here[good].to(device)


def joined(
    parts: dict[str, Tensor], kinds: Sequence[str], device: torch.device | str
) -> dict[str, Tensor]:
    """Kinds of features from their parts."""
    return {
        kind: torch.cat([parts[name] for name in KINDS[kind]], dim=1).to(device) for kind in kinds
    }
