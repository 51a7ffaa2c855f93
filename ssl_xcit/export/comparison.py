"""Compare another form of the weights with the network by its outputs for photographs (features,
logits, objects), and rounded weights by size, speed and accuracy too.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssl_xcit.data.decode import decode
from ssl_xcit.data.photos import photos
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.description import Weights

Run = Callable[[Float[Tensor, "B in_chans H W"]], Any]  # to one tensor or several
# images and a threshold of scores to boxes, labels, scores and perhaps masks
Detect = Callable[[Float[Tensor, "1 in_chans H W"], Float[Tensor, ""]], tuple[Tensor, ...]]
KNN = Callable[[Weights, Mapping[str, Run]], dict[str, float]]  # accuracy in percent
Shapes = Sequence[tuple[int, int, int]]  # number, height, width
IMAGES: Shapes = ((2, 64, 64), (1, 96, 160), (3, 75, 52), (1, 224, 224))
LARGER: Shapes = ((2, 64, 64), (1, 96, 160), (3, 91, 77), (1, 224, 224))  # for pyramids
CLOSE = 1e-5  # largest difference of a number, over the largest number where that is above 1
CLOSE_MASKS = 1e-4  # of a probability: a box's difference moves all samples of its mask
LONE = 0.01  # share of objects that may be found by one form only
NUM_IMAGES = 3  # in which objects are compared
LEAST_COSINE = 0.5  # below, it is another network and not a rounded one
ROUNDS, SECONDS = 7, 20.0  # of timing, at most


def real_images(
    weights: Weights, shapes: Shapes = IMAGES
) -> Iterator[Float[Tensor, "B in_chans H W"]]:
    """Yield normalised batches of such numbers, heights and widths from the built-in photographs;
    networks of other channels get red, green and blue in turn.
    """
    numbers = itertools.count(step=97)
    source, preprocess = photos(), weights.preprocess
    channels = np.arange(preprocess.channels) % 3
    for count, height, width in shapes:
        batch = []
        for _ in range(count):
            pixels = decode(source.read(next(numbers) % len(source)), RGB)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            batch.append(np.asarray(image)[..., channels].transpose(2, 0, 1))
        yield normalise(torch.from_numpy(np.stack(batch)), preprocess)


def photographs(shapes: Shapes) -> str:
    """Their sizes in words."""
    return "photographs of " + ", ".join(f"{height} x {width}" for _, height, width in shapes)


@dataclass
class Difference:
    """Between the outputs of another form and the network's."""

    largest: float = 0.0  # of a number, over the largest number where that is above 1
    cosine: float = 1.0  # the smallest cosine similarity between the first outputs for an image


def difference(
    weights: Weights, run: Run, expected: Run | None = None, shapes: Shapes = IMAGES
) -> Difference:
    """Difference on photographs of several sizes, one and several at once, of the other form `run`
    from `expected`, None: from `weights.output`.

    Raises:
        UserError: the weights themselves give features that are not finite.
        RunFailed: those of the other form are not, or have other shapes.
    """
    result = Difference()
    with torch.inference_mode():
        for images in real_images(weights, shapes):
            ours, theirs = several((expected or weights.output)(images)), several(run(images))
            own, others = ([tuple(t.shape) for t in tensors] for tensors in (ours, theirs))
            if own != others:
                raise RunFailed(f"{weights.output_name}s have the shapes {others}, not {own}")
            check_finite(weights, ours, theirs)
            for a, b in zip(ours, theirs, strict=True):
                scale = max(1.0, a.abs().max().item())
                result.largest = max(result.largest, (b.float() - a).abs().max().item() / scale)
            cosines = torch.cosine_similarity(ours[0], theirs[0].float())
            result.cosine = min(result.cosine, cosines.min().item())
    return result


def several(output: Any) -> tuple[Tensor, ...]:
    """One tensor or several as several."""
    return tuple(output) if isinstance(output, tuple) else (output,)


def check_finite(weights: Weights, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Raise UserError where our outputs are not finite, RunFailed where theirs are not."""
    if not all(t.isfinite().all() for t in ours):
        raise UserError(
            f"these weights give {weights.output_name}s that are not finite: take an earlier "
            "checkpoint, ckpt=RUN/checkpoints/step-....ckpt"
        )
    if not all(t.isfinite().all() for t in theirs):
        raise RunFailed(f"{weights.output_name}s are not finite: nothing is exported")


def compare(
    weights: Weights,
    run: Run,
    close: float = CLOSE,
    expected: Run | None = None,
    name: str | None = None,
    shapes: Shapes = IMAGES,
) -> str:
    """The largest difference of another form from the network, in words, by the `name` of a number;
    see `difference`.

    Raises:
        RunFailed: it is above `close`.
    """
    largest = difference(weights, run, expected, shapes).largest
    if largest > close:
        raise RunFailed(
            f"{weights.output_name}s differ by {largest:.1e}, more than {close:.0e}: nothing is "
            "exported; please report this with the versions of the libraries"
        )
    words = f"largest difference of a {name or weights.output_name} {largest:.1e}"
    return f"{words} on {photographs(shapes)}"


def compare_objects(
    weights: Weights, run: Detect, expected: Detect, size: tuple[int, int], threshold: float
) -> str:
    """How many of a detector's objects in photographs of (height, width) another form finds too, in
    words. Where there are none, objects of lower scores are compared.

    An object is the same if its label is, and its box, score and mask differ by `CLOSE` at most (of
    boxes over the long side, of masks `CLOSE_MASKS`).

    Raises:
        UserError: as `difference`.
        RunFailed: more than `LONE` of them are found by one form only, which happens where a
            score or an overlap is at a threshold to the last digits.
    """
    num_objects, num_lone, lowest = 0, 0, threshold
    largest, of_masks = 0.0, 0.0
    with torch.inference_mode():
        for images in real_images(weights, [(1, *size)] * NUM_IMAGES):
            level = threshold
            while len((ours := expected(images, torch.tensor(level)))[0]) == 0 and level > 1e-4:
                level /= 10
            theirs = run(images, torch.tensor(level))
            check_finite(weights, ours, theirs)
            differences, masks = object_differences(ours, theirs, max(size))
            same = (differences <= CLOSE) & (masks <= CLOSE_MASKS)
            num_objects += len(ours[0])
            num_lone += int((~same.any(1)).sum()) + int((~same.any(0)).sum())
            if same.any():
                largest = max(largest, differences[same].max().item())
                of_masks = max(of_masks, masks[same].max().item())
            lowest = min(lowest, level)
    height, width = size
    place = f"in {NUM_IMAGES} photographs of {height} x {width}"
    if num_lone > LONE * num_objects:
        raise RunFailed(
            f"{num_lone} of {num_objects} objects {place} are found by one form only: nothing is "
            "exported; please report this with the versions of the libraries"
        )
    return (
        f"of {num_objects} objects {place} of scores above {lowest:g}, {num_lone} are found by one "
        f"form only; largest difference of boxes (over the long side) and scores {largest:.1e}"
        + f", of masks {of_masks:.1e}"
        * (len(ours) > 3)
    )


def object_differences(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], side: int
) -> tuple[Float[Tensor, "ours theirs"], Float[Tensor, "ours theirs"]]:
    """The largest difference of box (over `side`) and score between any two objects, and that of
    their masks; infinite between those of two labels.
    """
    boxes, labels, scores = (
        (a[:, None] - b[None]).abs().float() for a, b in zip(ours[:3], theirs[:3], strict=True)
    )
    largest = torch.maximum(boxes.amax(dim=2) / side, scores).masked_fill(labels > 0, torch.inf)
    masks = torch.zeros_like(largest)
    if len(ours) > 3:
        masks = torch.cdist(ours[3].flatten(1), theirs[3].flatten(1), p=torch.inf)
    return largest, masks


class Rounding(NamedTuple):
    """The effect of rounding the weights."""

    checked: str  # the difference of the features, in words
    notes: list[str]  # size, speed and accuracy, in words
    data: dict[str, Any]  # all of it as plain data


def compare_rounded(
    weights: Weights, name: str, runs: tuple[Run, Run], num_bytes: tuple[int, int], knn: KNN | None
) -> Rounding:
    """Compare rounded weights with float32, by runs (images to features or logits) in one library
    and the bytes of the files of both, float32's first; `knn` is None without labelled images.

    Raises:
        RunFailed: the features are not those of the backbone.
    """
    rounded = difference(weights, runs[1])
    largest, cosine = rounded.largest, rounded.cosine
    if cosine < LEAST_COSINE:
        raise RunFailed(f"cosine similarity to float32 fell to {cosine:.2f}; not exported")
    smaller, faster = num_bytes[1] / num_bytes[0], times_as_fast(weights, *runs)
    measure = "accuracy" if weights.num_classes else "k-NN 20"
    accuracy, accuracy_note = None, "there are no labelled images (eval_data.root=DIR)"
    try:
        accuracy = knn and knn(weights, {"float32": weights.output, name: runs[1]})
    except UserError as error:  # the file is good all the same
        accuracy_note = str(error)
    if accuracy:
        gain = accuracy[name] - accuracy["float32"]
        values = ", ".join(f"{key} {value:.1f}" for key, value in accuracy.items())
        accuracy_note = f"{measure} in %: {values}, a difference of {gain:+.1f}"
    else:
        accuracy_note = f"{measure.removesuffix(' 20')} was not measured: {accuracy_note}"
    threads = torch.get_num_threads()
    return Rounding(
        f"least cosine to float32's {weights.output_name}s {cosine:.4f}, largest difference "
        f"{largest:.1e}, on {photographs(IMAGES)}",
        [
            f"{smaller:.2f} of float32's size, {faster:.2f} times as fast here on 224 x 224 "
            f"({threads} thread{'s' * (threads > 1)})",
            accuracy_note,
        ],
        {
            "least_cosine": cosine, "largest_difference": largest, "size_of_float32": smaller,
            "times_as_fast": faster, "threads": threads,
            "accuracy" if weights.num_classes else "knn_k20": accuracy,
        },
    )  # fmt: skip


def times_as_fast(weights: Weights, one: Run, two: Run) -> float:
    """The median of one's time over two's, interleaved, on four images of 224 x 224."""
    *_, large = real_images(weights)
    images = large.repeat(4, 1, 1, 1)
    ratios: list[float] = []
    begun = time.perf_counter()
    with torch.inference_mode():
        for run in (one, two):  # the first call allocates memory
            run(large)
        while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - begun < SECONDS):
            seconds = []
            for run in (one, two):
                started = time.perf_counter()
                run(images)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
