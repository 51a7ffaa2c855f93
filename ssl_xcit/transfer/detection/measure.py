"""COCO's average precision of boxes and masks, and what a report shows of it.

The numbers are those of torchmetrics with faster-coco-eval, which agree with pycocotools. Intervals
and tables need what each image contributes, so the same greedy matching is done here once more, for
objects of all sizes. Sizes are by area in pixels: of an object as annotated, else of its mask, else
of its box; of a detection, of its mask or box.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64

from ssl_xcit.errors import UserError
from ssl_xcit.transfer.detection.masks import RunMasks
from ssl_xcit.transfer.task import Instances, Measured

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0.0, 1.0, 101)
CONFIDENT = 0.5  # score from which detections count in the confusion table and the worst images
NUM_WORST = 20
RESAMPLES = 200  # of the test images
NAMES = {  # torchmetrics' by ours
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "AP_small": "map_small",
    "AP_medium": "map_medium",
    "AP_large": "map_large",
}


class Detections(NamedTuple):
    """Found objects, in pixels of the image as decoded, by descending score."""

    boxes: Float32[np.ndarray, "M 4"]  # left, top, right, bottom
    labels: Int64[np.ndarray, " M"]  # from 0
    scores: Float32[np.ndarray, " M"]
    masks: RunMasks | None


class Matches(NamedTuple):
    """Detections of one class in one image against its objects, by descending score."""

    scores: Float32[np.ndarray, " D"]
    right: Bool[np.ndarray, "thresholds D"]
    ignored: Bool[np.ndarray, "thresholds D"]  # in a crowd region: neither right nor false
    num_objects: int


def match(
    ious: Float[np.ndarray, "D M"],
    crowd: Bool[np.ndarray, " M"],
    thresholds: Float[np.ndarray, " thresholds"],
) -> Int64[np.ndarray, "thresholds D"]:
    """The object of each detection, -1 for none, as COCO assigns them: by descending score, each to
    the free object of the highest IoU (the last of equals) that is at least the threshold, else to
    a crowd region, which is never used up.
    """
    found = np.full((len(thresholds), len(ious)), -1)
    if not len(crowd):
        return found
    free = np.ones((len(thresholds), len(crowd)), bool)
    last = len(crowd) - 1
    for d, row in enumerate(ious):
        enough = row >= thresholds[:, None]
        for candidates in (enough & free & ~crowd, enough & crowd):
            best = last - np.where(candidates, row, -1.0)[:, ::-1].argmax(axis=1)
            take = (found[:, d] < 0) & candidates[np.arange(len(best)), best]
            found[take, d] = best[take]
            free[take, best[take]] = False
    return found


def areas_of(objects: Instances) -> Float64[np.ndarray, " M"]:
    """Areas in pixels: as annotated, else of the masks, else of the boxes."""
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    areas = sides.astype(np.float64).prod(axis=1)
    if objects.masks is not None:
        areas = objects.masks.sum(axis=(1, 2), dtype=np.float64)
    if objects.areas is not None:
        areas = np.where(objects.areas > 0, objects.areas, areas)
    return areas


class ClassMatches:
    """Detections of one class in all images, by descending score."""

    def __init__(self, images: Sequence[int], matches: Sequence[Matches], num_images: int):
        scores = np.concatenate([m.scores for m in matches])
        order = np.argsort(-scores, kind="stable")
        self.right = np.concatenate([m.right for m in matches], axis=1)[:, order]
        self.false = ~(self.right | np.concatenate([m.ignored for m in matches], axis=1)[:, order])
        self.image = np.repeat(images, [len(m.scores) for m in matches])[order]
        self.num_objects = np.zeros(num_images)
        self.num_objects[list(images)] = [m.num_objects for m in matches]

    def average_precision(
        self, weights: Float[np.ndarray, " images"]
    ) -> Float[np.ndarray, " thresholds"] | None:
        """AP at each threshold, of images that count so many times: the mean over 101 recalls of
        the highest precision at that recall or beyond. None without any object.
        """
        total = float(self.num_objects @ weights)
        if total == 0:
            return None
        right, false = (
            (kind * weights[self.image]).cumsum(axis=1) for kind in (self.right, self.false)
        )
        precision = right / np.maximum(right + false, np.finfo(np.float64).tiny)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, 1)))  # recalls that are not reached
        reached = [np.searchsorted(recall, RECALLS) for recall in right / total]
        return np.take_along_axis(best, np.stack(reached), axis=1).mean(axis=1)


def intervals(classes: Sequence[ClassMatches], num_images: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of AP and AP50 in percent, by bootstrap over images (percentiles)."""
    size = sum(c.right.size for c in classes)
    generator = np.random.Generator(np.random.Philox(0))
    drawn = []
    for _ in range(int(np.clip(2e9 / max(1, size), 100, RESAMPLES))):
        weights = generator.multinomial(num_images, np.full(num_images, 1 / num_images))
        values = (c.average_precision(weights.astype(float)) for c in classes)
        defined = [value for value in values if value is not None]
        if defined:
            mean = np.mean(defined, axis=0)
            drawn.append((mean.mean(), mean[0]))
    low, high = 100 * np.percentile(drawn, (2.5, 97.5), axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("AP", "AP50"))}


class DetectionMeasure:
    """AP of boxes, and of masks where the detector has them.

    Args:
        class_names: in the order of the labels.
        masks: whether masks are compared as well as boxes.

    Raises:
        UserError: faster-coco-eval is not installed.
    """

    def __init__(self, class_names: Sequence[str], masks: bool):
        try:
            from faster_coco_eval.core import mask as rle
        except ImportError as error:
            raise UserError(
                "average precision needs faster-coco-eval: pip install 'ssl-xcit[detection]'"
            ) from error
        from torchmetrics.detection import MeanAveragePrecision

        self.rle = rle
        self.class_names = tuple(class_names)
        self.kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"}
        if masks:
            self.kinds["mask"] = "segm"
        self.precision = MeanAveragePrecision(
            sync_on_compute=False,  # one rank measures all images
            iou_type=tuple(self.kinds.values()),
            iou_thresholds=THRESHOLDS.tolist(),  # its own are rounded to float32, so that a recall
            rec_thresholds=RECALLS.tolist(),  # of 6 / 10 does not reach 0.6: up to 1 point of AP
            extended_summary=True,
            backend="faster_coco_eval",
        )
        self.precision.warn_on_many_detections = False
        self.names: list[str] = []
        self.matches: dict[str, dict[int, dict[int, Matches]]] = {
            kind: defaultdict(dict) for kind in self.kinds
        }  # by kind, label and image
        K = len(self.class_names)
        self.confusion = np.zeros((K + 1, K + 1), np.int64)
        self.errors: list[tuple[int, int]] = []  # missed and false objects of each image

    def update(self, name: str, prediction: Detections, target: Instances) -> None:
        """Add an image.

        Raises:
            UserError: masks are compared, and the data set has none.
        """
        if "mask" in self.kinds and target.masks is None:
            raise UserError(
                f"{name}: the test images have boxes without masks; give a data set with masks or "
                "task.masks=false"
            )
        image = len(self.names)
        self.names.append(name)
        self.precision.update([self.plain(prediction)], [self.plain(target)])
        if "mask" in self.kinds:  # which it would take decoded, all at once, only to encode them
            runs = self.regions("mask", prediction)
            encoded: list[Any] = self.precision.detection_mask
            encoded[-1] = tuple((tuple(r["size"]), r["counts"]) for r in runs)
        order = np.argsort(-prediction.scores, kind="stable")
        for kind in self.kinds:
            ious = self.ious(kind, prediction, target)[order]
            self.add_matches(image, kind, ious, prediction, target, order)
            if kind == "box":
                self.add_confusion(ious, prediction, target, order)

    def plain(self, objects: Detections | Instances) -> dict[str, torch.Tensor]:
        """Objects as torchmetrics takes them."""
        parts = {"boxes": objects.boxes, "labels": objects.labels}
        if isinstance(objects, Detections):
            parts["scores"] = objects.scores
            if "mask" in self.kinds:
                parts["masks"] = np.zeros((len(objects.boxes), 1, 1), np.uint8)  # see `update`
        else:
            parts["iscrowd"] = objects.crowd.astype(np.int64)
            parts["area"] = areas_of(objects)
            if "mask" in self.kinds:
                assert objects.masks is not None
                parts["masks"] = objects.masks.view(np.uint8)
        return {key: torch.from_numpy(np.ascontiguousarray(part)) for key, part in parts.items()}

    def ious(
        self, kind: str, prediction: Detections, target: Instances
    ) -> Float[np.ndarray, "D M"]:
        """IoU of detections and objects; with a crowd region the share of the detection inside."""
        if not len(prediction.boxes) or not len(target.boxes):
            return np.zeros((len(prediction.boxes), len(target.boxes)))
        regions = [self.regions(kind, objects) for objects in (prediction, target)]
        return np.asarray(self.rle.iou(*regions, target.crowd.astype(np.uint8)))

    def regions(self, kind: str, objects: Detections | Instances) -> Any:
        """Boxes or encoded masks, as faster-coco-eval compares them."""
        if kind == "mask":
            masks = objects.masks
            assert masks is not None
            if isinstance(masks, RunMasks):
                plain = [{"size": list(masks.size), "counts": r.tolist()} for r in masks.runs]
                return [self.rle.frPyObjects(runs, *masks.size) for runs in plain]
            return [self.rle.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        return np.concatenate((objects.boxes[:, :2], sides), axis=1).astype(np.float64)

    def add_matches(
        self,
        image: int,
        kind: str,
        ious: Float[np.ndarray, "D M"],
        prediction: Detections,
        target: Instances,
        order: Int64[np.ndarray, " D"],
    ) -> None:
        """Match the detections of each class to its objects."""
        labels = prediction.labels[order]
        for label in np.union1d(labels, target.labels).tolist():
            rows, columns = labels == label, target.labels == label
            crowd = target.crowd[columns]
            found = match(ious[rows][:, columns], crowd, THRESHOLDS)
            in_crowd = (found >= 0) & np.append(crowd, False)[found]
            self.matches[kind][label][image] = Matches(
                prediction.scores[order][rows],
                (found >= 0) & ~in_crowd,
                in_crowd,
                int((~crowd).sum()),
            )

    def add_confusion(
        self,
        ious: Float[np.ndarray, "D M"],
        prediction: Detections,
        target: Instances,
        order: Int64[np.ndarray, " D"],
    ) -> None:
        """Match confident detections to objects of any class."""
        sure = prediction.scores[order] >= CONFIDENT
        labels = prediction.labels[order][sure]
        found = match(ious[sure], target.crowd, THRESHOLDS[:1])[0]
        in_crowd = (found >= 0) & np.append(target.crowd, False)[found]
        right = (found >= 0) & ~in_crowd
        missed = ~target.crowd
        missed[found[right]] = False
        K = len(self.class_names)
        np.add.at(self.confusion, (target.labels[found[right]], labels[right]), 1)
        np.add.at(self.confusion, (K, labels[found < 0]), 1)
        np.add.at(self.confusion, (target.labels[missed], K), 1)
        wrong = int((target.labels[found[right]] != labels[right]).sum())
        self.errors.append((int(missed.sum()) + wrong, int((found < 0).sum()) + wrong))

    def compute(self) -> Measured:
        """AP, AP50, AP75 and AP of small, medium and large objects, as `box_AP`; of a size only
        where there are objects of it.

        Raises:
            UserError: no image has an object.
        """
        found = {key: value.double().numpy() for key, value in self.precision_results().items()}
        results: dict[str, float] = {}
        bounds: dict[str, tuple[float, float]] = {}
        details: dict[str, Any] = {}
        for kind, iou_type in self.kinds.items():
            prefix = f"{iou_type}_" if len(self.kinds) > 1 else ""
            for name, theirs in NAMES.items():
                value = float(found[f"{prefix}{theirs}"].item())
                if value >= 0:  # -1: no such objects
                    results[f"{kind}_{name}"] = 100 * value
            if f"{kind}_AP" not in results:
                raise UserError("no test image has an object: average precision is not defined")
            classes = [
                ClassMatches(list(of), list(of.values()), len(self.names))
                for _, of in sorted(self.matches[kind].items())
            ]
            for name, bound in intervals(classes, len(self.names)).items():
                bounds[f"{kind}_{name}"] = bound
            details |= self.by_class(kind, prefix, found)
        return Measured(results, bounds, details | self.mistakes())

    def precision_results(self) -> dict[str, torch.Tensor]:
        """What torchmetrics says, without the IoUs of all images."""
        return {k: v for k, v in self.precision.compute().items() if isinstance(v, torch.Tensor)}

    def by_class(self, kind: str, prefix: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
        """AP of each class, and precision at 101 recalls for IoU 0.5; of classes with objects."""
        labels = found["classes"].astype(int).reshape(-1)  # of one class, a number
        # (thresholds, recalls, classes) of all sizes and 100 detections; -1: no objects
        precision = found[f"{prefix}precision"][:, :, :, 0, -1]
        by_class = {
            self.class_names[label]: precision[:, :, i]
            for i, label in enumerate(labels)
            if precision[0, 0, i] >= 0
        }
        return {
            f"{kind}_AP_by_class": {n: 100 * float(p.mean()) for n, p in by_class.items()},
            f"{kind}_precision_at_recall": {n: p[0].tolist() for n, p in by_class.items()},
        }

    def mistakes(self) -> dict[str, Any]:
        """The confusion table (truth by row, `background` last; prediction by column, `missed`
        last) and the images with the most missed and false objects, at a score of 0.5 and more.
        """
        worst = sorted(range(len(self.names)), key=lambda i: -sum(self.errors[i]))[:NUM_WORST]
        return {
            "confusion": {
                "truth": [*self.class_names, "background"],
                "prediction": [*self.class_names, "missed"],
                "counts": self.confusion.tolist(),
            },
            "worst": [
                {"image": self.names[i], "missed": self.errors[i][0], "false": self.errors[i][1]}
                for i in worst
                if sum(self.errors[i])
            ],
        }
