"""Linear probe on frozen features: a grid of settings trained side by side, the test set used once.

Protocol after DINO (arXiv:2104.14294, section 4.1), see `heads.py`. Differs: features are extracted
once without augmentation (`protocols.py` has the published form), and learning rate, weight decay
and kind of features are searched, on a held-out part of the training features. The chosen setting
is trained again on all of them.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_xcit.data.sources import Labels, stratified
from ssl_xcit.errors import UserError

from .estimates import Estimate
from .features import FeatureSet, parts_of
from .heads import Heads, LinearHead, Setting, Tally, cosine, known_classes
from .settings import several

ROWS = 4096  # at once, where nothing is trained


def train_heads(
    features: dict[str, Tensor],
    classes: Int64[Tensor, " N"],
    num_classes: int,
    settings: Sequence[Setting],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Heads:
    """One linear classifier a setting, on the rows of (N, D) features by kind."""
    dims = {kind: x.shape[1] for kind, x in features.items()}
    heads = Heads(settings, dims, num_classes, seed)
    order_of = torch.Generator().manual_seed(seed + 1)
    N = len(classes)
    per_epoch = -(-N // batch_size)
    for step in range(epochs * per_epoch):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(N, generator=order_of)
        rows = order[place * batch_size : (place + 1) * batch_size]
        x = {kind: features[kind][rows] for kind in heads.kinds}
        rate = batch_size / 256 * cosine(step, epochs * per_epoch)
        heads.step_(x, classes[rows], rate)
    return heads


def tallied(heads: Heads, features: dict[str, Tensor], classes: Int64[Tensor, " N"]) -> Tally:
    """All heads on all rows."""
    tally = Tally(heads)
    for rows in torch.arange(len(classes)).split(ROWS):
        tally.add({kind: features[kind][rows] for kind in heads.kinds}, classes[rows])
    return tally


def right(head: LinearHead, x: Tensor, classes: Int64[Tensor, " Q"]) -> Bool[np.ndarray, " Q"]:
    """Which rows a head classifies as they are; a diverged head none."""
    logits = torch.cat([head(rows) for rows in x.split(ROWS)])
    return ((logits.argmax(dim=1) == classes) & logits.isfinite().all(dim=1)).numpy()


def held_out_rows(classes: Labels, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """`stratified`; raises UserError where no class has two images."""
    held = stratified(classes, fraction, seed)
    if not held.any():
        raise UserError(
            "every class has one training image only, and a second is needed to be held out"
        )
    return held


class LinearProbe:
    """Top-1 accuracy of a linear classifier: `linear`, and the learning rate chosen: `linear_lr`.

    Args:
        lrs: learning rates to choose from, at a batch of 256.
        weight_decays: to choose from; the published protocol has 0.
        kinds: of features to choose from; the published protocol has the class token for XCiT.
        epochs: passes over the training features.
        batch_size: rows a step.
        val_fraction: share of the training rows that decides.
        seed: of initial weights, order and held-out rows.

    Attributes:
        head: the last classifier made.
        chosen: its setting.
    """

    def __init__(
        self,
        lrs: float | Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        weight_decays: float | Sequence[float] = (0.0,),
        kinds: str | Sequence[str] = ("cls",),
        epochs: int = 100,
        batch_size: int = 128,
        val_fraction: float = 0.2,
        seed: int = 0,
    ):
        whole = type(epochs) is int and type(batch_size) is int and min(epochs, batch_size) >= 1
        if not whole or not 0.0 < val_fraction < 1.0:
            raise UserError(
                f"linear: epochs={epochs}, batch_size={batch_size}, val_fraction={val_fraction}: "
                "whole numbers from 1, a share in (0, 1)"
            )
        lrs = several("linear.lrs", lrs)
        weight_decays = several("linear.weight_decays", weight_decays, low=0.0)
        kinds = several("linear.kinds", kinds, str)
        parts_of(kinds)
        self.grid = [Setting(k, lr, wd) for k, wd, lr in product(kinds, weight_decays, lrs)]
        self.kinds = tuple(kinds)
        self.epochs = epochs
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.head: LinearHead | None = None
        self.chosen: dict[str, object] = {}

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose on held-out training rows, train on all, test once."""
        names, ids = np.unique(features.train_labels, return_inverse=True)
        if len(names) < 2:
            raise UserError("the training images have one class only; a linear probe needs two")
        if features.one_set:
            return  # nothing to be tested on
        kinds = [kind for kind in self.kinds if features.has(kind)] or ["cls"]
        grid = [s for s in self.grid if s.kind in kinds]
        train = {kind: as_tensor(features.of(kind).train) for kind in kinds}
        classes = torch.from_numpy(ids.astype(np.int64))
        held = torch.from_numpy(held_out_rows(classes.numpy(), self.val_fraction, self.seed))

        def fit(rows: Tensor, settings: Sequence[Setting]) -> Heads:
            x = {s.kind: train[s.kind][rows] for s in settings}
            options = (self.epochs, self.batch_size, self.seed)
            return train_heads(x, classes[rows], len(names), settings, *options)

        setting = grid[0]
        if len(grid) > 1:
            heads = fit(~held, grid)
            x = {kind: train[kind][held] for kind in kinds}
            setting = heads.settings[tallied(heads, x, classes[held]).best()]
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
