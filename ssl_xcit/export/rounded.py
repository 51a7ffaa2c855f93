"""What a format that rounds the weights costs: features that turn, bytes, time, k-NN accuracy."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.exported import Run, Weights, difference, real_images, sizes

KNN = Callable[[Weights, Mapping[str, Run]], dict[str, float]]  # k-NN in percent by each
LEAST_COSINE = 0.5  # below, it is another network and not a rounded one
ROUNDS, SECONDS = 7, 20.0  # of timing, at most

Cost = tuple[str, list[str], dict[str, Any]]  # how it was compared, what it costs, as data


def cost(
    weights: Weights, name: str, runs: tuple[Run, Run], num_bytes: tuple[int, int], knn: KNN | None
) -> Cost:
    """What is lost and gained against float32.

    Args:
        weights: what was rounded.
        name: of the format.
        runs: float32 and the rounded form in the same library, images to class tokens.
        num_bytes: of the files of both.
        knn: measures accuracy; None: there are no labelled images.

    Raises:
        RunFailed: the features are not those of the backbone.
    """
    found = difference(weights, runs[1])
    if found.cosine < LEAST_COSINE:
        raise RunFailed(
            f"features turn as far as a cosine of {found.cosine:.2f} to float32's: nothing is "
            "exported; these weights do not bear the rounding"
        )
    smaller, faster = num_bytes[1] / num_bytes[0], times_as_fast(weights, *runs)
    words, accuracy = compared(weights, name, runs[1], knn)
    checked = (
        f"least cosine to float32's features {found.cosine:.4f}, largest difference "
        f"{found.largest:.1e}, on photographs of {sizes()}"
    )
    threads = torch.get_num_threads()
    lines = [
        f"{smaller:.2f} of float32's size, {faster:.2f} times as fast here on 224 x 224 "
        f"({threads} thread{'s' * (threads > 1)})",
        words,
    ]
    data = {
        "least_cosine": found.cosine, "largest_difference": found.largest,
        "size_of_float32": smaller, "times_as_fast": faster, "threads": threads,
        "knn_k20": accuracy,
    }  # fmt: skip
    return checked, lines, data


def compared(
    weights: Weights, name: str, run: Run, knn: KNN | None
) -> tuple[str, dict[str, float] | None]:
    """k-NN of both, in words and in percent; None where it cannot be measured."""
    try:
        if knn is None:
            raise UserError("there are no labelled images (eval_data.root=DIR)")
        found = knn(weights, {"float32": weights.backbone, name: run})
    except UserError as error:  # the file is good all the same
        return f"k-NN was not measured: {error}", None
    told = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
    values = list(found.values())
    return f"k-NN 20 in %: {told}, a difference of {values[-1] - values[0]:+.1f}", found


def times_as_fast(weights: Weights, one: Run, two: Run) -> float:
    """The median of one's time over two's, interleaved, on four images of 224 x 224."""
    *_, large = real_images(weights)
    images = large.repeat(4, 1, 1, 1)
    ratios: list[float] = []
    begun = time.perf_counter()
    with torch.inference_mode():
        for run in (one, two):  # not the first time, which makes room
            run(large)
        while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - begun < SECONDS):
            seconds = []
            for run in (one, two):
                started = time.perf_counter()
                run(images)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
