"""Linear probe on frozen features: a grid of settings trained side by side, the test set used once.

Protocol after DINO (arXiv:2104.14294, section 4.1), see `linear_heads.py`. Differs: features are
extracted once without augmentation (`tasks/linear_augmented.py` has the published form), and
learning rate, weight decay and kind of features are searched, on a held-out part of the training
features. The chosen setting is trained again on all of them.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_xcit.data.sources import Labels, stratified
from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count, NonNegative, Positive

from ..features.extract import FeatureSet
from ..statistics import Estimate
from .linear_heads import (
    AccuracyMeter,
    HeadSetting,
    LinearHead,
    ParallelHeads,
    cosine_decay,
    known_classes,
)
from .protocol import Evaluator, Fraction, Kinds, OneOrMore, Seed, as_list

ROWS = 4096  # at once, where nothing is trained


def train_heads(
    features: dict[str, Tensor],
    classes: Int64[Tensor, " N"],
    num_classes: int,
    settings: Sequence[HeadSetting],
    epochs: int,
    batch_size: int,
    seed: int,
) -> ParallelHeads:
    """Train one linear classifier a setting on the rows of (N, D) features by kind."""
    dims = {kind: x.shape[1] for kind, x in features.items()}
    heads = ParallelHeads(settings, dims, num_classes, seed)
    order_of = torch.Generator().manual_seed(seed + 1)
    N = len(classes)
    per_epoch = -(-N // batch_size)
    for step in range(epochs * per_epoch):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(N, generator=order_of)
        rows = order[place * batch_size : (place + 1) * batch_size]
        x = {kind: features[kind][rows] for kind in heads.kinds}
        rate = batch_size / 256 * cosine_decay(step, epochs * per_epoch)
        heads.step_(x, classes[rows], rate)
    return heads


def measure(
    heads: ParallelHeads, features: dict[str, Tensor], classes: Int64[Tensor, " N"]
) -> AccuracyMeter:
    """Accuracy and cross-entropy of all heads on all rows."""
    meter = AccuracyMeter(heads)
    for rows in torch.arange(len(classes)).split(ROWS):
        meter.add({kind: features[kind][rows] for kind in heads.kinds}, classes[rows])
    return meter


def right(head: LinearHead, x: Tensor, classes: Int64[Tensor, " Q"]) -> Bool[np.ndarray, " Q"]:
    """Which rows a head classifies correctly; a diverged head none."""
    logits = torch.cat([head(rows) for rows in x.split(ROWS)])
    return ((logits.argmax(dim=1) == classes) & logits.isfinite().all(dim=1)).numpy()


def held_out_rows(classes: Labels, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """`stratified`; raises UserError where no class has two images."""
    held = stratified(classes, fraction, seed)
    if not held.any():
        raise UserError(
            "every class has one training image only; one of two or more is held out to choose by"
        )
    return held


def setting_grid(
    lrs: OneOrMore[float], weight_decays: OneOrMore[float], kinds: OneOrMore[str]
) -> list[HeadSetting]:
    """All combinations."""
    combinations = product(as_list(kinds), as_list(weight_decays), as_list(lrs))
    return [HeadSetting(kind, lr, decay) for kind, decay, lr in combinations]


def learnable_classes(labels: np.ndarray) -> tuple[np.ndarray, Int64[np.ndarray, " N"]]:
    """(sorted class ids, place of each image's class in them); UserError for a single class."""
    names, places = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise UserError("the training images have one class only; a linear probe needs two")
    return names, places.astype(np.int64)


class LinearProbe(Evaluator):
    """Top-1 accuracy of a linear classifier: `linear`, and the best learning rate: `linear_lr`.

    Args:
        lrs: learning rates to choose from, at a batch of 256.
        weight_decays: to choose from; the published protocol has 0.
        kinds: of features to choose from; the published protocol has the class token for XCiT.
        val_fraction: share of the training rows that decides.
        seed: of initial weights, order and held-out rows.
    """

    def __init__(
        self,
        lrs: OneOrMore[Positive] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        weight_decays: OneOrMore[NonNegative] = (0.0,),
        kinds: Kinds = ("cls",),
        epochs: Count = 100,
        batch_size: Count = 128,
        val_fraction: Fraction = 0.2,
        seed: Seed = 0,
    ):
        self.grid = setting_grid(lrs, weight_decays, kinds)
        self.kinds = as_list(kinds)
        self.epochs = epochs
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose on held-out training rows, train on all, test once."""
        names, ids = learnable_classes(features.train_labels)
        if features.one_set:
            return  # nothing to be tested on
        kinds = features.usable(self.kinds)
        grid = [s for s in self.grid if s.kind in kinds]
        train = {kind: as_tensor(features.of(kind).train) for kind in kinds}
        classes = torch.from_numpy(ids)
        held = torch.from_numpy(held_out_rows(ids, self.val_fraction, self.seed))

        def fit(rows: Tensor, settings: Sequence[HeadSetting]) -> ParallelHeads:
            x = {s.kind: train[s.kind][rows] for s in settings}
            options = (self.epochs, self.batch_size, self.seed)
            return train_heads(x, classes[rows], len(names), settings, *options)

        setting = grid[0]
        if len(grid) > 1:
            heads = fit(~held, grid)
            x = {kind: train[kind][held] for kind in kinds}
            setting = heads.settings[measure(heads, x, classes[held]).best()]
        weight, bias = fit(torch.ones_like(held), [setting]).one(0)
        self.chosen = setting._asdict()
        self.head = LinearHead(
            weight, bias, setting.kind, "classes", names.tolist(), features.class_names, self.chosen
        )
        test = as_tensor(features.of(setting.kind).test)
        known = torch.from_numpy(known_classes(names, features.test_labels))
        yield "linear", Estimate(right(self.head, test, known))
        yield "linear_lr", setting.lr


def as_tensor(array: np.ndarray) -> Tensor:
    """float32, in memory."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
