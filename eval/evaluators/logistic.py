"""Regularised linear models on frozen features, solved rather than trained: the same answer every
time, no learning rate.

Multinomial logistic regression for classes, a binary one a label for several labels an image, both
by L-BFGS along a path of regularisation, each from the solution before; ridge regression in closed
form for numbers. The strength is chosen on a held-out part of the training images, the model fitted
again on all of them, the test images used once.

Minimised is loss + strength / 2 |W|^2, the loss a mean over images, the bias free, with features
divided by the root of their total variance. scikit-learn's C is 1 / (strength N). L-BFGS works on
weights that are scaled by the curvature where it starts: another path to the same minimum, in a
sixth of the steps.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ssl_xcit.data.sources import some_rows
from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Positive

from ..features.extract import FeatureSet
from ..statistics import Estimate, mean
from .linear import as_tensor, held_out_rows, learnable_classes
from .linear_heads import LinearHead, known_classes
from .protocol import Evaluator, Fraction, Kinds, OneOrMore, Seed, as_list

Error = Callable[[Tensor, Tensor], Tensor]  # (outputs (N, K), targets) -> mean
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the same -> (mean, residuals (N, K))
STRENGTHS = [a * 10.0**-b for b in range(1, 7) for a in (1.0, 0.3)]
GRADIENT = 1e-5  # at which the minimum is reached
LEADING = 64  # principal axes that are scaled together
CURVATURE_ROWS = 16_384  # that say how the loss is curved
BLOCK_NUMBERS = 2**24  # of all classes' blocks, at most
Model = tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]  # weight and bias


def softmax_loss(
    logits: Float[Tensor, "N K"], classes: Int64[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N K"]]:
    """Mean cross-entropy, and probabilities less targets: its gradient by the logits, times N."""
    logs = logits.log_softmax(dim=1)
    own = classes[:, None]
    loss = -logs.gather(1, own).mean()
    return loss, logs.exp_().scatter_add_(1, own, -logs.new_ones(own.shape))


def sigmoid_loss(
    logits: Float[Tensor, "N K"], targets: Shaped[Tensor, "N K"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N K"]]:
    """The same of K binary models; the mean is of their sums over labels."""
    wanted = targets.to(logits.dtype)
    losses = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return losses.sum(dim=1).mean(), logits.sigmoid() - wanted


class Scaling:
    """Each class's weights over a root of their curvature: that of the leading axes and the bias as
    a whole, of every other axis alone. The coupling between classes is left out.

    Args:
        x: features along their axes, the leading ones and a column of ones last.
        residuals: probabilities less targets, which are 0 or 1.
        strength: of the penalty.
    """

    def __init__(self, x: Float[Tensor, "N D"], residuals: Float[Tensor, "N K"], strength: float):
        rows = slice(None, None, -(-len(x) // CURVATURE_ROWS))
        x, distance = x[rows], residuals[rows].abs()
        curvature = (distance - distance.square()) / len(x)  # p (1 - p) of each class
        K, D = curvature.shape[1], x.shape[1]
        together = min(LEADING, math.isqrt(BLOCK_NUMBERS // K))
        self.alone = max(0, D - 1 - together)  # axes
        self.root = (curvature.T @ x[:, : self.alone].square() + strength).sqrt()
        leading = x[:, self.alone :].contiguous()
        blocks = x.new_empty(K, D - self.alone, D - self.alone)
        for block, column in zip(blocks, curvature.T, strict=True):
            torch.mm(leading.T, leading * column[:, None], out=block)
        diagonals = blocks.diagonal(dim1=1, dim2=2)
        rounding = 10 * torch.finfo(x.dtype).eps * float(diagonals.amax())
        diagonals.add_(strength + rounding)
        self.block_root = torch.linalg.cholesky(blocks.double())
        one = torch.eye(D - self.alone, dtype=torch.float64, device=x.device).expand_as(blocks)
        self.inverse = torch.linalg.solve_triangular(self.block_root, one, upper=False).to(x)

    def scaled(self, weights: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """Of weights."""
        leading = weights[:, None, self.alone :].double() @ self.block_root
        return torch.cat((weights[:, : self.alone] * self.root, leading[:, 0].to(weights)), dim=1)

    def weights(self, scaled: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """The other way round."""
        leading = scaled[:, None, self.alone :] @ self.inverse
        return torch.cat((scaled[:, : self.alone] / self.root, leading[:, 0]), dim=1)

    def gradient(self, gradient: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """By the scaled weights, from that by the weights."""
        leading = self.inverse @ gradient[:, self.alone :, None]
        return torch.cat((gradient[:, : self.alone] / self.root, leading[:, :, 0]), dim=1)


class Problem:
    """A regularised model to be fitted, with features along their principal axes; `loss_of` makes
    loss and residuals from logits (N, K) and targets, of K outputs.
    """

    def __init__(
        self, x: Float[Tensor, "N D"], targets: Shaped[Tensor, "N *K"], loss_of: Loss, K: int
    ):
        self.targets, self.loss_of, self.K = targets, loss_of, K
        self.mean = x.mean(dim=0)
        centred = x - self.mean
        _, self.axes = torch.linalg.eigh(centred.T @ centred / len(x))  # the leading ones last
        self.x = torch.cat((centred @ self.axes, x.new_ones(len(x), 1)), dim=1)

    @torch.no_grad()
    def solve(
        self, strength: float, start: Model | None = None, max_iterations: int = 1000
    ) -> Model:
        """Weight and bias of the minimum, by L-BFGS from `start` (None: zero)."""
        x, N, shape = self.x, len(self.x), (self.K, self.x.shape[1])
        penalty = x.new_full(shape[1:], strength)
        penalty[-1] = 0.0  # of the bias
        weights = x.new_zeros(shape)
        if start is not None:
            weight, bias = (part.to(x) for part in start)
            weights = torch.cat((weight @ self.axes, (bias + weight @ self.mean)[:, None]), dim=1)
        scaling = Scaling(x, self.loss_of(x @ weights.T, self.targets)[1], strength)
        flat = scaling.scaled(weights).flatten()
        optimizer = torch.optim.LBFGS(
            [flat],
            max_iter=max_iterations,
            tolerance_grad=GRADIENT,
            tolerance_change=1e-9,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss_and_gradient() -> float:
            weights = scaling.weights(flat.view(shape))
            loss, residuals = self.loss_of(x @ weights.T, self.targets)
            gradient = residuals.T @ x / N + penalty * weights
            flat.grad = scaling.gradient(gradient).flatten()
            return float(loss + 0.5 * (penalty * weights.square()).sum())

        optimizer.step(loss_and_gradient)
        weights = scaling.weights(flat.view(shape))
        weight = weights[:, :-1] @ self.axes.T
        return weight.float(), (weights[:, -1] - weight @ self.mean).float()


Solver = Callable[[float, Model | None], Model]  # (strength, start) -> model
Fit = Callable[[Tensor, Tensor, int], Solver]  # (features, targets, K)


def fit_classes(x: Tensor, y: Tensor, K: int) -> Solver:
    """Multinomial logistic regression; y (N,) class ids."""
    return Problem(x, y, softmax_loss, K).solve


def fit_labels(x: Tensor, y: Tensor, K: int) -> Solver:
    """A binary logistic regression each label; y (N, K) of 0 and 1."""
    return Problem(x, y, sigmoid_loss, K).solve


def fit_numbers(x: Tensor, y: Tensor, K: int) -> Solver:
    """Ridge regression in closed form; y (N, K)."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    moment = centred.T @ (y - mean_y) / len(x)

    def solve(strength: float, start: Model | None = None) -> Model:
        # the loss is the mean of the residual's square, so half the strength
        ridge = 0.5 * strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge, moment).T
        return weight.float(), (mean_y - weight @ mean_x).float()

    return solve


def scaled(features: Float[np.ndarray, "N D"]) -> tuple[Float[Tensor, "N D"], float]:
    """Features over the root of their total variance, and that; float64 where there is room."""
    x = as_tensor(features)
    scale = float((x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt().clamp_min(1e-12))
    return (x.double() if x.numel() < 20_000_000 else x) / scale, scale


class Logistic(Evaluator):
    """Top-1 accuracy of logistic regression by L-BFGS: `logistic`.

    Args:
        strengths: of the regularisation, to choose from; None: `STRENGTHS`, 0.1 to 3e-7.
        kinds: of features to choose from.
        val_fraction: share of the training rows that decides.
        seed: of that share.
    """

    def __init__(
        self,
        strengths: OneOrMore[Positive] | None = None,
        kinds: Kinds = ("cls",),
        val_fraction: Fraction = 0.2,
        seed: Seed = 0,
    ):
        self.strengths = STRENGTHS if strengths is None else as_list(strengths)
        self.kinds = as_list(kinds)
        self.val_fraction = val_fraction
        self.seed = seed

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose, fit on all, test once."""
        names, ids = learnable_classes(features.train_labels)
        if features.one_set:
            return  # nothing to be tested on
        held = held_out_rows(ids, self.val_fraction, self.seed)
        head = self.chosen_head(
            features, ids, len(names), held, fit_classes, cross_entropy, outputs="classes"
        )
        head.ids, head.names = names.tolist(), features.class_names
        predicted = self.outputs_of(head, features).argmax(dim=1).numpy()
        yield "logistic", Estimate(predicted == known_classes(names, features.test_labels))

    def chosen_head(
        self,
        features: FeatureSet,
        targets: Shaped[np.ndarray, "N *K"],
        K: int,
        held: np.ndarray,
        fit: Fit,
        error_of: Error,
        outputs: str,
    ) -> LinearHead:
        """The best model along the path of strengths, fitted again on all training images.

        Args:
            held: mask of the training images that the choice is made on.
            error_of: (outputs (N, K), targets) -> what is to be low on held-out rows.
            outputs: see `LinearHead`.
        """
        y, rows = torch.from_numpy(np.ascontiguousarray(targets)), torch.from_numpy(held)
        best: tuple[float, str, float, Model] | None = None
        for kind in features.usable(self.kinds):
            x, _ = scaled(features.of(kind).train)
            solve, model = fit(x[~rows], y[~rows], K), None
            for strength in sorted(self.strengths, reverse=True):
                model = solve(strength, model)
                weight, bias = model
                error = float(error_of(x[rows].float() @ weight.T + bias, y[rows]))
                if best is None or error < best[0]:
                    best = error, kind, strength, model
        assert best is not None
        _, kind, strength, start = best
        x, scale = scaled(features.of(kind).train)
        weight, bias = fit(x, y, K)(strength, start)
        self.chosen = {"kind": kind, "strength": strength}
        self.head = LinearHead(weight / scale, bias, kind, outputs, setting=self.chosen)
        return self.head

    def outputs_of(self, head: LinearHead, features: FeatureSet) -> Float[Tensor, "M K"]:
        """Of a head for the test images."""
        return head(as_tensor(features.of(head.kind).test))


class MultiLabel(Logistic):
    """Mean average precision over labels, each image having any number of them: `label_map`; a
    logistic regression each label, see `Logistic`.
    """

    labels = "several"

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose, fit on all, test once."""
        if features.one_set:
            return
        targets, truth = features.train_labels, features.test_labels
        N, K = targets.shape
        held = held_rows(N, self.val_fraction, self.seed)

        def error(logits: Tensor, wanted: Tensor) -> Tensor:
            return binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))

        head = self.chosen_head(features, targets, K, held, fit_labels, error, outputs="labels")
        scores = self.outputs_of(head, features).numpy()
        yield "label_map", Estimate(ranked(scores, truth), mean_average_precision)


def held_rows(count: int, fraction: float, seed: int) -> np.ndarray:
    """`some_rows`; raises UserError where there is no second image."""
    if count < 2:
        raise UserError("at least two training images are needed: one of them is held out")
    return some_rows(count, fraction, seed)


def ranked(
    scores: Float[np.ndarray, "Q K"], truth: Shaped[np.ndarray, "Q K"]
) -> Int64[np.ndarray, "Q two_K"]:
    """Each image's place in every label's ranking, and whether it has the label."""
    order = np.argsort(-scores, axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(scores))[:, None], axis=0)
    return np.concatenate((place, truth.astype(np.int64)), axis=1)


def mean_average_precision(
    items: Int64[np.ndarray, "Q two_K"], weights: Float64[np.ndarray, " Q"]
) -> float:
    """Percent; labels that no (drawn) image has are left out."""
    K = items.shape[1] // 2
    order = np.argsort(items[:, :K], axis=0)
    weight = weights[order]  # (Q, K), best first
    positive = weight * np.take_along_axis(items[:, K:], order, axis=0)
    hits, seen = positive.cumsum(axis=0), weight.cumsum(axis=0)
    precision = hits / np.maximum(seen, 1.0)
    total = hits[-1]
    known = total > 0
    if not known.any():
        return 0.0
    return 100.0 * float(((positive * precision).sum(axis=0)[known] / total[known]).mean())


class Regression(Logistic):
    """Share of the variance of numbers that ridge regression explains: `r2` in percent, the mean
    over their D columns, and the mean absolute error `mae` in their own unit.
    """

    labels = "numbers"

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Choose, fit on all, test once."""
        if features.one_set:
            return
        targets, truth = (
            np.asarray(y, np.float64).reshape(len(y), -1)
            for y in (features.train_labels, features.test_labels)
        )
        N, K = targets.shape
        for part, values in (("training", targets), ("test", truth)):
            if not (values.max(axis=0) > values.min(axis=0)).any():
                raise UserError(f"the {part} images' numbers are all the same: nothing to explain")
        held = held_rows(N, self.val_fraction, self.seed)

        def error(predicted: Tensor, wanted: Tensor) -> Tensor:
            return (predicted - wanted).square().mean(dim=0).div(spread).mean()

        spread = torch.from_numpy(targets.var(axis=0)).clamp_min(1e-12)
        head = self.chosen_head(features, targets, K, held, fit_numbers, error, outputs="numbers")
        predicted = self.outputs_of(head, features).double().numpy()
        yield "r2", Estimate(np.concatenate((predicted, truth), axis=1), explained)
        yield "mae", Estimate(np.abs(predicted - truth).mean(axis=1), mean)


def explained(items: Float64[np.ndarray, "Q two_D"], weights: Float64[np.ndarray, " Q"]) -> float:
    """R^2 in percent of predictions (the first D columns) and truth, over columns that vary."""
    predicted, truth = np.split(items, 2, axis=1)
    w = weights / weights.sum()
    residual = w @ (predicted - truth) ** 2
    variance = w @ (truth - w @ truth) ** 2
    varies = variance > 1e-12 * np.abs(truth).max(axis=0) ** 2
    if not varies.any():
        return 0.0
    return 100.0 * float((1.0 - residual[varies] / variance[varies]).mean())
