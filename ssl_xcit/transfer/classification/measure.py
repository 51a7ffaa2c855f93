"""How good a classifier is: accuracy, its calibration, and where it errs.

Shares of right answers have Wilson's interval (1927); their mean over the classes has the one that
Wilson's intervals of the classes give by squares (MOVER: Zou and Donner 2008); average precision
has the standard error from random halves of the images (McCarthy 1969).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from ssl_xcit.transfer.task import Measured, Target
from ssl_xcit.utils.intervals import NORMAL, Interval, wilson

NUM_BINS = 15  # of the calibration error, as published (Guo et al., arXiv:1706.04599)
NUM_WORST = 32  # images that are listed
HALVES = 100


class AccuracyMeasure:
    """Accuracy of predicted probabilities, one class an image."""

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self.names: list[str] = []
        self.targets: list[int] = []
        self.predicted: list[int] = []
        self.confidence: list[float] = []
        self.ranks: list[int] = []  # how many classes are more probable than the target's

    def update(self, name: str, prediction: Float[np.ndarray, " K"], target: Target) -> None:
        """Add an image with its probabilities and its class id."""
        label = int(np.asarray(target))
        best = int(prediction.argmax())
        self.names.append(name)
        self.targets.append(label)
        self.predicted.append(best)
        self.confidence.append(float(prediction[best]))
        # of equally probable classes the first counts as more probable, as argmax has it
        more = (prediction > prediction[label]).sum()
        equal = (prediction[:label] == prediction[label]).sum()
        self.ranks.append(int(more + equal))

    def compute(self) -> Measured:
        """Return `top1`, `top5` (of more than five classes), `mean_class_accuracy` over the classes
        that have images, and `calibration_error`, all in percent.

        Details: `confusion` (rows: true classes), `per_class`, `reliability` (images, mean
        confidence and accuracy by bin of confidence), `worst` (the most confident errors).
        """
        K = len(self.class_names)
        targets, predicted = np.array(self.targets), np.array(self.predicted)
        confidence, ranks = np.array(self.confidence), np.array(self.ranks)
        confusion = np.bincount(targets * K + predicted, minlength=K * K).reshape(K, K)
        counts = confusion.sum(axis=1)
        present = np.flatnonzero(counts)
        hits = confusion.diagonal()
        classes = [wilson(int(hits[k]), int(counts[k])) for k in present]
        results = {"top1": 100.0 * float((ranks == 0).mean())}
        intervals = {"top1": wilson(int((ranks == 0).sum()), len(ranks))}
        if K > 5:
            results["top5"] = 100.0 * float((ranks < 5).mean())
            intervals["top5"] = wilson(int((ranks < 5).sum()), len(ranks))
        shares = 100.0 * hits[present] / counts[present]
        results["mean_class_accuracy"] = float(shares.mean())
        intervals["mean_class_accuracy"] = mean_interval(shares, classes)
        error, bins = calibration(confidence, targets == predicted)
        results["calibration_error"] = error
        return Measured(
            results,
            intervals,
            {
                "confusion": confusion.tolist(),
                "per_class": [
                    {"class": self.class_names[k], "images": int(counts[k]), "accuracy": share,
                     "low": low, "high": high}
                    for k, share, (low, high) in zip(present, shares.tolist(), classes, strict=True)
                ],
                "reliability": bins,
                "worst": self.worst(targets, predicted, confidence),
            },
        )  # fmt: skip

    def worst(
        self, targets: np.ndarray, predicted: np.ndarray, confidence: np.ndarray
    ) -> list[dict[str, Any]]:
        """Return the most confident errors, the worst first."""
        wrong = np.flatnonzero(targets != predicted)
        order = wrong[np.argsort(-confidence[wrong], kind="stable")][:NUM_WORST]
        return [
            {
                "image": self.names[i],
                "true": self.class_names[targets[i]],
                "predicted": self.class_names[predicted[i]],
                "probability": float(confidence[i]),
            }
            for i in order
        ]


class MultiLabelMeasure:
    """Average precision of predicted probabilities, several classes an image."""

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self.names: list[str] = []
        self.targets: list[np.ndarray] = []
        self.predictions: list[Float32[np.ndarray, " K"]] = []

    def update(self, name: str, prediction: Float[np.ndarray, " K"], target: Target) -> None:
        """Add an image with its probabilities and its row of 0 and 1."""
        self.names.append(name)
        self.predictions.append(prediction.astype(np.float32))
        self.targets.append(np.asarray(target).astype(bool))

    def compute(self) -> Measured:
        """Return `mAP` over classes that some image has, `F1` of all decisions at probability 0.5
        and `mean_class_F1`, in percent.

        Details: `per_class` (average precision, F1), `worst` (images whose most confident wrong
        decision is the most confident).
        """
        truth, scores = np.stack(self.targets), np.stack(self.predictions)
        present = np.flatnonzero(truth.any(axis=0))
        decided = scores >= 0.5
        precisions = average_precisions(truth, scores, present)
        F1 = f1(truth, decided)
        results = {
            "mAP": 100.0 * float(precisions.mean()),
            "F1": 100.0 * float(f1(truth.reshape(-1, 1), decided.reshape(-1, 1))[0]),
            "mean_class_F1": 100.0 * float(F1[present].mean()),
        }
        return Measured(
            results,
            {"mAP": halves_interval(truth, scores, present)} if len(truth) > 3 else {},
            {
                "per_class": [
                    {
                        "class": self.class_names[k],
                        "images": int(truth[:, k].sum()),
                        "average_precision": 100.0 * float(precision),
                        "F1": 100.0 * float(F1[k]),
                    }
                    for k, precision in zip(present, precisions, strict=True)
                ],
                "worst": self.worst(truth, scores),
            },
        )

    def worst(
        self, truth: Bool[np.ndarray, "N K"], scores: Float[np.ndarray, "N K"]
    ) -> list[dict[str, Any]]:
        """Return the images with the most confident errors, the worst first."""
        distance = np.abs(truth - scores)
        column = distance.argmax(axis=1)
        errors = distance[np.arange(len(distance)), column]
        order = np.argsort(-errors, kind="stable")
        return [
            {
                "image": self.names[i],
                "class": self.class_names[column[i]],
                "true": bool(truth[i, column[i]]),
                "probability": float(scores[i, column[i]]),
            }
            for i in order[:NUM_WORST]
            if errors[i] > 0.5
        ]


def mean_interval(values: Float[np.ndarray, " K"], intervals: Sequence[Interval]) -> Interval:
    """Return the 95 % interval of the mean of independent values from their own intervals."""
    low, high = np.array(intervals).T
    mean, K = values.mean(), len(values)
    below, above = np.sqrt(((values - low) ** 2).sum()), np.sqrt(((high - values) ** 2).sum())
    return float(mean - below / K), float(mean + above / K)


def calibration(
    confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"]
) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error in percent, sum over bins of n_b / N |accuracy_b -
    confidence_b|, and the bins that have images.
    """
    which = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    bins = [
        {
            "images": int((which == b).sum()),
            "confidence": 100.0 * float(confidence[which == b].mean()),
            "accuracy": 100.0 * float(right[which == b].mean()),
        }
        for b in np.unique(which)
    ]
    gaps = [b["images"] * abs(b["accuracy"] - b["confidence"]) for b in bins]
    return sum(gaps) / len(confidence), bins


def average_precisions(
    truth: Bool[np.ndarray, "N K"],
    scores: Float[np.ndarray, "N K"],
    classes: Int64[np.ndarray, " present"],
) -> Float[np.ndarray, " present"]:
    """Return the average precision of each class, 0 to 1."""
    from sklearn.metrics import average_precision_score  # here: it imports pandas, for most seconds

    return np.array([average_precision_score(truth[:, k], scores[:, k]) for k in classes])


def f1(truth: Bool[np.ndarray, "N K"], decided: Bool[np.ndarray, "N K"]) -> Float[np.ndarray, " K"]:
    """Return 2 TP / (2 TP + FP + FN) of each column; 0 where nothing is true nor decided."""
    total = truth.sum(axis=0) + decided.sum(axis=0)
    return 2.0 * (truth & decided).sum(axis=0) / np.maximum(total, 1)


def halves_interval(
    truth: Bool[np.ndarray, "N K"],
    scores: Float[np.ndarray, "N K"],
    classes: Int64[np.ndarray, " present"],
) -> Interval:
    """Return the 95 % interval of the mean average precision in percent."""
    N = len(truth)
    generator = np.random.Generator(np.random.Philox(0))
    means = []
    for _ in range(HALVES):
        half = generator.permutation(N)[: N // 2]
        there = classes[truth[half][:, classes].any(axis=0)]
        if len(there):
            means.append(average_precisions(truth[half], scores[half], there).mean())
    error = np.std(means, ddof=1) * np.sqrt((N // 2) / (N - N // 2))
    mean = average_precisions(truth, scores, classes).mean()
    half_width = NORMAL * error
    return 100.0 * float(max(0.0, mean - half_width)), 100.0 * float(min(1.0, mean + half_width))
