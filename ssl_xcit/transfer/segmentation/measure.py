"""Mean intersection over union (IoU) of classes by pixel, over all images together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8

from ssl_xcit.transfer.task import IGNORED, Measured

RESAMPLES = 1000  # of the images, for intervals
AT_ONCE = 50  # of these
WORST = 20  # images that are listed
Counts = Float[np.ndarray, "R 3 K"]  # of R samples


def share(
    part: Float[np.ndarray, "*any"], whole: Shaped[np.ndarray, "*any"]
) -> Float[np.ndarray, "*any"]:
    """100 part / whole; nan where the whole is 0."""
    return 100.0 * np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def class_iou(counts: Counts) -> Float[np.ndarray, "R K"]:
    """IoU in percent of each class; nan where it is neither there nor predicted."""
    hits, truth, predicted = counts.swapaxes(0, 1)
    return share(hits, truth + predicted - hits)


def mean_known(values: Float[np.ndarray, "R K"]) -> Float[np.ndarray, " R"]:
    """Mean over classes that are not nan; nan where all are."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1)
    return share(total, count) / 100.0


def summaries(counts: Counts) -> dict[str, Float[np.ndarray, " R"]]:
    """mIoU, share of right pixels and its mean over classes, in percent."""
    hits, truth, _ = counts.swapaxes(0, 1)
    return {
        "miou": mean_known(class_iou(counts)),
        "pixel_accuracy": share(hits.sum(axis=-1), truth.sum(axis=-1)),
        "mean_class_accuracy": mean_known(share(hits, truth)),
    }


def interval(values: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The 95 % interval by percentiles of resamples."""
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


class SegmentationMeasure:
    """Compares class maps; pixels labelled 255 do not count."""

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        num_classes = len(self.class_names)
        self.confusion: Int64[np.ndarray, "K K"] = np.zeros((num_classes, num_classes), np.int64)
        self.names: list[str] = []
        self.counts: list[Int64[np.ndarray, "3 K"]] = []  # of each image

    def update(
        self,
        name: str,
        prediction: UInt8[np.ndarray, "height width"],
        target: UInt8[np.ndarray, "height width"],
    ) -> None:
        """Add an image."""
        num_classes = len(self.class_names)
        known = target != IGNORED
        pairs = num_classes * target[known].astype(np.int64) + prediction[known]
        confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        self.confusion += confusion
        self.names.append(name)
        parts = (
            np.diag(confusion),
            confusion.sum(axis=1),
            confusion.sum(axis=0),
        )  # hits, labels, predictions
        self.counts.append(np.stack(parts))

    def compute(self) -> Measured:
        """mIoU, pixel accuracy and mean accuracy of the classes, with 95 % intervals by bootstrap
        over the images (Efron 1979; there are none of a single image).

        The details hold the confusion matrix (rows: labels; columns: predictions), IoU by class
        with intervals (None where the class is neither there nor predicted) and the images with the
        lowest mean IoU.
        """
        counts = np.array(self.counts, np.float64).reshape(-1, 3, len(self.class_names))
        total = counts.sum(axis=0, keepdims=True)
        results = {name: float(value[0]) for name, value in summaries(total).items()}
        classes = dict(zip(self.class_names, class_iou(total)[0].tolist(), strict=True))
        intervals, class_intervals = {}, {}
        if len(counts) > 1:
            drawn = self.resampled(counts)
            intervals = {
                name: interval(values)
                for name, values in summaries(drawn).items()
                if np.isfinite(results[name])
            }
            class_intervals = {
                name: interval(values)
                for name, values in zip(self.class_names, class_iou(drawn).T, strict=True)
                if np.isfinite(classes[name])
            }
        of_images = mean_known(class_iou(counts))
        worst = [i for i in np.argsort(of_images, kind="stable") if np.isfinite(of_images[i])]
        details: dict[str, Any] = {
            "confusion_matrix": self.confusion.tolist(),
            "class_iou": {k: v if np.isfinite(v) else None for k, v in classes.items()},
            "class_iou_intervals": class_intervals,
            "worst_images": [(self.names[i], float(of_images[i])) for i in worst[:WORST]],
        }
        return Measured(results, intervals, details)

    def resampled(self, counts: Float[np.ndarray, "Q 3 K"]) -> Float[np.ndarray, "R 3 K"]:
        """Totals of images that are drawn with replacement, always the same ones."""
        num_images = len(counts)
        generator = np.random.Generator(np.random.Philox(0))
        totals = np.empty((RESAMPLES, *counts.shape[1:]))
        for start in range(0, RESAMPLES, AT_ONCE):
            chances = np.full(num_images, 1.0 / num_images)
            times = generator.multinomial(num_images, chances, size=AT_ONCE)  # that each is drawn
            totals[start : start + AT_ONCE] = np.tensordot(times.astype(np.float64), counts, 1)
        return totals
