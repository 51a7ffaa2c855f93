"""Linear probe on frozen features: many learning rates trained side by side, the test set used
once.

Protocol after DINO (arXiv:2104.14294, section 4.1): SGD, momentum 0.9, no weight decay, cosine to
0, weights N(0, 0.01), bias 0, learning rate times batch / 256. Differs: features are extracted once
without augmentation, and the learning rate is searched, on a held-out part of the training
features. The chosen one is trained again on all of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from ssl_xcit.data.sources import stratified
from ssl_xcit.errors import UserError

from .features import FeatureSet


def train_heads(
    features: Float[Tensor, "N C"],
    classes: Int64[Tensor, " N"],
    num_classes: int,
    lrs: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Float[Tensor, "L K C"], Float[Tensor, "L K"]]:
    """Weights and biases of one linear classifier a learning rate, all on the same batches."""
    generator = torch.Generator().manual_seed(seed)
    N, C = features.shape
    one = 0.01 * torch.randn(num_classes, C, generator=generator)
    weight = one.to(features).repeat(len(lrs), 1, 1).requires_grad_()
    bias = torch.zeros(len(lrs), num_classes).to(features).requires_grad_()
    velocity = [torch.zeros_like(p) for p in (weight, bias)]
    rate = torch.tensor(lrs).to(features) * batch_size / 256
    steps_per_epoch = -(-N // batch_size)
    for step in range(epochs * steps_per_epoch):
        place = step % steps_per_epoch
        if place == 0:
            order = torch.randperm(N, generator=generator).to(features.device)
        rows = order[place * batch_size : (place + 1) * batch_size]
        logits = torch.einsum("bc,lkc->blk", features[rows], weight) + bias
        # heads do not share anything, so the sum of their losses trains each by its own
        loss = cross_entropy(
            logits.flatten(0, 1), classes[rows].repeat_interleave(len(lrs)), reduction="sum"
        ) / len(rows)
        gradients = torch.autograd.grad(loss, (weight, bias))
        lr = rate * 0.5 * (1 + np.cos(np.pi * step / (epochs * steps_per_epoch)))
        with torch.no_grad():
            for p, v, g in zip((weight, bias), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr.view(-1, *[1] * (p.ndim - 1)) * v)
    return weight.detach(), bias.detach()


def scores(
    weight: Float[Tensor, "L K C"],
    bias: Float[Tensor, "L K"],
    features: Float[Tensor, "N C"],
    classes: Int64[Tensor, " N"],
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """Percent of rows that each classifier gets right, and its cross-entropy in nats; a diverged
    one gets 0 and infinity. Class -1 is none that it knows.
    """
    correct = torch.zeros(len(weight), device=features.device)
    loss = torch.zeros(len(weight), device=features.device)
    for rows in torch.arange(len(features), device=features.device).split(4096):
        logits = torch.einsum("nc,lkc->lnk", features[rows], weight) + bias[:, None]
        hits = (logits.argmax(-1) == classes[rows]) & logits.isfinite().all(-1)
        correct += hits.sum(dim=1)
        picked = logits.gather(-1, classes[rows].clamp_min(0).expand(len(weight), -1)[..., None])
        loss += (logits.logsumexp(-1) - picked[..., 0]).sum(dim=1)
    return 100.0 * correct / len(features), (loss / len(features)).nan_to_num(torch.inf)


def best(accuracy: Float[Tensor, " L"], loss: Float[Tensor, " L"], num_rows: int) -> int:
    """Of the classifiers within a standard error of the highest accuracy the one with the lowest
    cross-entropy: few held-out rows do not tell accuracies apart that are close.
    """
    share = accuracy / 100.0
    top = share.max()
    error = (top * (1.0 - top) / num_rows).sqrt()
    return int(torch.where(share >= top - error, loss, torch.inf).argmin())


class LinearProbe:
    """Top-1 accuracy in percent of a linear classifier: `linear`, and the learning rate chosen:
    `linear_lr`.

    Args:
        lrs: learning rates at batch 256 to choose from.
        epochs: passes over the features.
        batch_size: rows a step.
        val_fraction: share of each class of the training features that the choice is made on.
        seed: of initial weights, order and held-out rows.
    """

    def __init__(
        self,
        lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        epochs: int = 100,
        batch_size: int = 128,
        val_fraction: float = 0.2,
        seed: int = 0,
    ):
        if not lrs or min(lrs) <= 0.0 or epochs < 1 or not 0.0 < val_fraction < 1.0:
            raise UserError(
                f"lrs={list(lrs)}, epochs={epochs}, val_fraction={val_fraction}: rates "
                "above 0, at least "
                "one epoch, a share in (0, 1)"
            )
        self.lrs = list(lrs)
        self.epochs = epochs
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose on held-out training rows, train on all, test once."""
        names, ids = np.unique(features.train_labels, return_inverse=True)
        if len(names) < 2:
            raise UserError("the training images have one class only; a linear probe needs two")
        train, classes = torch.from_numpy(features.train), torch.from_numpy(ids)
        held = torch.from_numpy(stratified(ids, self.val_fraction, self.seed))
        options = (len(names), self.epochs, self.batch_size, self.seed)

        def fit(x: Tensor, y: Tensor, lrs: Sequence[float]) -> tuple[Tensor, Tensor]:
            num_classes, epochs, batch_size, seed = options
            return train_heads(x, y, num_classes, lrs, epochs, batch_size, seed)

        weight, bias = fit(train[~held], classes[~held], self.lrs)
        lr = self.lrs[best(*scores(weight, bias, train[held], classes[held]), int(held.sum()))]
        weight, bias = fit(train, classes, [lr])
        # a test class that training lacks can never be right; -1 matches no prediction
        known = np.searchsorted(names, features.test_labels).clip(max=len(names) - 1)
        test_ids = np.where(names[known] == features.test_labels, known, -1)
        accuracy, _ = scores(
            weight, bias, torch.from_numpy(features.test), torch.from_numpy(test_ids)
        )
        yield "linear", float(accuracy[0])
        yield "linear_lr", lr
