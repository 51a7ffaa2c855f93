"""Measure backbones and baselines with every evaluator and task."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch.distributed as dist
from annotated_types import Gt, Lt

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import MAX_PIXELS, of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.devices import placed
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Text, Workers

from .evaluators.protocol import Evaluator, Task, kinds_of
from .features.cache import cache_folder, extract_pair
from .features.extract import FeatureSet
from .features.extractor import FeatureExtractor
from .features.overlap import count_copies, count_near_duplicates, warn_if_perfect
from .results import Evaluation

PRETRAINED = "pretrained"
NO_NUMBERS = "it needs test images other than the training images: eval_data.test_fraction=0.2"
Baseline = Callable[[FeatureExtractor, Sequence[str]], FeatureSet]


def evaluate(
    backbone: XCiT | Mapping[str, XCiT],
    pair: LabelledPair | None,
    evaluators: Mapping[str, Evaluator | None] | None,
    baselines: Mapping[str, Baseline | None] | None = None,
    tasks: Mapping[str, Task | None] | None = None,
    batch_size: Count = 64,
    num_workers: Workers = None,
    device: str = "auto",
    max_pixels: Count = MAX_PIXELS,
    cache: bool | Text = False,
    feature_dtype: Literal["float16", "float32"] = "float32",
    ranks: bool = False,
    baselines_only: bool = False,
    near_duplicates: Annotated[float, Gt(0), Lt(1)] | None = None,
) -> Evaluation:
    """Run every evaluator on the features of backbones and baselines, every task on the backbones.

    Args:
        backbone: frozen; moved to `device`; several by name.
        pair: labelled images; None where there are tasks only.
        evaluators: by name; those for another kind of labels than there are, are not run.
        baselines: each makes features from (extractor, kinds of features).
        num_workers: loader processes; None: one a core, less one.
        device: `auto` takes every GPU there is; several are joined by `+`.
        max_pixels: images with more by their header are refused.
        cache: keep features on the disk: true for the usual place, or a folder.
        feature_dtype: of the features kept: float32, or float16 for half the size.
        ranks: all ranks of the process group are here and share the work.
        baselines_only: leave out the backbones, which then only say what random weights are of.
        near_duplicates: a cosine of features above which a test image counts as nearly a training
            image; None: they are not counted.
    """
    networks = backbone if isinstance(backbone, Mapping) else {PRETRAINED: backbone}
    usable = evaluators_for(pair, evaluators or {})
    wanted = {name: task for name, task in (tasks or {}).items() if task is not None}
    if not usable and not wanted:
        raise UserError(
            "nothing to measure: evaluation.evaluators and evaluation.tasks have nothing for these "
            "labels"
        )
    extractors = {}
    for row, network in networks.items():
        first, *others = placed(network, device)
        preprocess = of_weights(network.preprocess, max_pixels)
        extractors[row] = FeatureExtractor(
            network, preprocess, first, batch_size, num_workers, pair, shown_in_terminal(),
            cache_folder(cache), others, ranks,
        )  # fmt: skip
    for extractor in extractors.values():
        for task in wanted.values():
            task.check(extractor)
    evaluation = Evaluation()
    is_first_rank = not ranks or dist.get_rank() == 0
    if not is_first_rank:
        wanted = {}
    kinds = kinds_of(usable)

    def of_this_rank(features: FeatureSet) -> dict[str, Evaluator]:
        if is_first_rank:
            return usable
        return {n: e for n, e in usable.items() if e.on_ranks and features.ranks}

    if usable:
        extractor = next(iter(extractors.values()))
        if is_first_rank and pair is not None:
            copies = count_copies(pair, extractor.cache, extractor.show)
            evaluation.overlap["test_images_in_train"] = copies
        for name, baseline in (baselines or {}).items():
            if baseline is not None:
                started = time.perf_counter()
                features = baseline(extractor, kinds)
                row, running = name.replace("_", " "), of_this_rank(features)
                measure_features(evaluation, row, started, running, features)
    for row, extractor in ({} if baselines_only else extractors).items():
        if usable:
            started = time.perf_counter()
            features = extract_pair(extractor, kinds, row, feature_dtype)
            measure_features(evaluation, row, started, of_this_rank(features), features)
            if is_first_rank:
                note_near_duplicates(evaluation, row, features, near_duplicates)
        for name, task in wanted.items():
            measure(evaluation, row, name, task, extractor)
    for times in evaluation.seconds.values():
        times.update({name: round(seconds, 3) for name, seconds in times.items()})
    return evaluation


def evaluators_for(
    pair: LabelledPair | None, evaluators: Mapping[str, Evaluator | None]
) -> dict[str, Evaluator]:
    """Those for the kind of labels that there are; `linear=null` switches one off."""
    if pair is None:
        return {}
    kind = label_kind(pair.train.labels)
    return {k: e for k, e in evaluators.items() if e is not None and e.labels == kind}


def measure_features(
    evaluation: Evaluation,
    row: str,
    started: float,
    evaluators: Mapping[str, Evaluator],
    features: FeatureSet,
) -> None:
    """Run every evaluator on the features of a row, whose extraction began at `started`."""
    evaluation.seconds[row] = {"features": time.perf_counter() - started}
    for name, evaluator in evaluators.items():
        for metric in measure(evaluation, row, name, evaluator, features):
            evaluation.note_classes(row, metric, features.test_labels, features.class_names)


def measure(
    evaluation: Evaluation, row: str, name: str, measurement: Evaluator | Task, subject: Any
) -> list[str]:
    """Run an evaluator or a task, and note its numbers or why it has none; returns the metrics."""
    started = time.perf_counter()
    try:
        values = dict(measurement(subject))
        if not values:
            raise UserError(NO_NUMBERS)
        if again := sorted(values.keys() & evaluation.results.get(row, {}).keys()):
            raise UserError(f"{again[0]} is measured already: give one of both another name=")
    except (UserError, RunFailed) as error:  # the others' numbers are not lost
        evaluation.left_out.setdefault(row, {})[name] = error
        return []
    evaluation.seconds.setdefault(row, {})[name] = time.perf_counter() - started
    evaluation.results.setdefault(row, {}).update(values)
    if measurement.chosen:
        evaluation.chosen.setdefault(row, {})[name] = dict(measurement.chosen)
    if measurement.head is not None:
        evaluation.heads.setdefault(row, {})[name] = measurement.head
    return list(values)


def note_near_duplicates(
    evaluation: Evaluation, row: str, features: FeatureSet, threshold: float | None
) -> None:
    """Count near duplicates, and warn of a k-NN accuracy that may rest on them."""
    if threshold is not None:
        count = count_near_duplicates(features, threshold)
        evaluation.overlap[f"near_duplicates_{row}"] = count
        say(f"{row}: {count:,} of {len(features.test):,} test images have a cosine above "
            f"{threshold:g} with a training image")  # fmt: skip
    results = evaluation.results.get(row, {})
    accuracies = [value for metric, value in results.items() if metric.startswith("knn_k")]
    warn_if_perfect(max(accuracies, default=0.0), row)
