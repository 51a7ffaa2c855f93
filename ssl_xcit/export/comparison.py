"""Compare another form of the weights with the backbone by features of photographs, and rounded
weights by size, speed and k-NN accuracy too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssl_xcit.data.decode import RGB, decode
from ssl_xcit.data.photos import photos
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.description import Weights

Run = Callable[[Float[Tensor, "B in_chans H W"]], Any]  # to (B, C), or (B, C) and (B, C, h, w)
KNN = Callable[[Weights, Mapping[str, Run]], dict[str, float]]  # k-NN accuracy in percent
IMAGES = ((2, 64, 64), (1, 96, 160), (3, 75, 52), (1, 224, 224))  # number, height, width
SIZES = ", ".join(f"{height} x {width}" for _, height, width in IMAGES)
CLOSE = 1e-5  # largest difference of a feature, over the largest feature where that is above 1
LEAST_COSINE = 0.5  # below, it is another network and not a rounded one
ROUNDS, SECONDS = 7, 20.0  # of timing, at most


def real_images(weights: Weights) -> Iterator[Float[Tensor, "B in_chans H W"]]:
    """Yield normalised batches of several sizes from the built-in photographs; networks of other
    channels get red, green and blue in turn.
    """
    source, preprocess = photos(), weights.preprocess
    channels = np.arange(preprocess.channels) % 3
    for count, height, width in IMAGES:
        batch = []
        for index in range(count):
            pixels = decode(source.read(index * 97), RGB)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            batch.append(np.asarray(image)[..., channels].transpose(2, 0, 1))
        yield normalise(torch.from_numpy(np.stack(batch)), preprocess)


@dataclass
class Difference:
    """Between the features of another form and the backbone's."""

    largest: float = 0.0  # of a feature, over the largest feature where that is above 1
    cosine: float = 1.0  # the smallest cosine similarity between class tokens of an image


def difference(weights: Weights, run: Run, patches: bool = False) -> Difference:
    """Difference on photographs of several sizes, one and several at once, of the other form `run`:
    images to class tokens, or with `patches` to those and patch tokens.

    Raises:
        UserError: the weights themselves give features that are not finite.
        RunFailed: those of the other form are not, or have other shapes.
    """
    result, backbone = Difference(), weights.backbone
    with torch.inference_mode():
        for images in real_images(weights):
            expected = backbone.forward_features(images) if patches else (backbone(images),)
            output = run(images)
            actual = output if isinstance(output, tuple) else (output,)
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, actual)]
            if shapes[0] != shapes[1]:
                raise RunFailed(f"features have the shapes {shapes[1]}, not {shapes[0]}")
            if not all(t.isfinite().all() for t in expected):
                raise UserError(
                    "these weights give features that are not finite: take an earlier checkpoint, "
                    "ckpt=RUN/checkpoints/step-....ckpt"
                )
            if not all(t.isfinite().all() for t in actual):
                raise RunFailed("features are not finite: nothing is exported")
            for a, b in zip(expected, actual, strict=True):
                scale = max(1.0, a.abs().max().item())
                result.largest = max(result.largest, (b.float() - a).abs().max().item() / scale)
            cosines = torch.cosine_similarity(expected[0], actual[0].float())
            result.cosine = min(result.cosine, cosines.min().item())
    return result


def compare(weights: Weights, run: Run, close: float = CLOSE, patches: bool = False) -> str:
    """The largest difference of another form from the backbone, in words; see `difference`.

    Raises:
        RunFailed: it is above `close`.
    """
    largest = difference(weights, run, patches).largest
    if largest > close:
        raise RunFailed(
            f"features differ by {largest:.1e}, more than {close:.0e}: nothing is exported; "
            "please report this with the versions of the libraries"
        )
    feature = "class or patch feature" if patches else "feature"
    return f"largest difference of a {feature} {largest:.1e} on photographs of {SIZES}"


class Rounding(NamedTuple):
    """The effect of rounding the weights."""

    checked: str  # the difference of the features, in words
    notes: list[str]  # size, speed and accuracy, in words
    data: dict[str, Any]  # all of it as plain data


def compare_rounded(
    weights: Weights, name: str, runs: tuple[Run, Run], num_bytes: tuple[int, int], knn: KNN | None
) -> Rounding:
    """Compare rounded weights with float32, by runs (images to class tokens) in one library and the
    bytes of the files of both, float32's first; `knn` is None without labelled images.

    Raises:
        RunFailed: the features are not those of the backbone.
    """
    rounded = difference(weights, runs[1])
    largest, cosine = rounded.largest, rounded.cosine
    if cosine < LEAST_COSINE:
        raise RunFailed(f"cosine similarity to float32 fell to {cosine:.2f}; not exported")
    smaller, faster = num_bytes[1] / num_bytes[0], times_as_fast(weights, *runs)
    accuracy, accuracy_note = None, "there are no labelled images (eval_data.root=DIR)"
    try:
        accuracy = knn and knn(weights, {"float32": weights.backbone, name: runs[1]})
    except UserError as error:  # the file is good all the same
        accuracy_note = str(error)
    if accuracy:
        gain = accuracy[name] - accuracy["float32"]
        values = ", ".join(f"{key} {value:.1f}" for key, value in accuracy.items())
        accuracy_note = f"k-NN 20 in %: {values}, a difference of {gain:+.1f}"
    else:
        accuracy_note = f"k-NN was not measured: {accuracy_note}"
    threads = torch.get_num_threads()
    return Rounding(
        f"least cosine to float32's features {cosine:.4f}, largest difference {largest:.1e}, on "
        f"photographs of {SIZES}",
        [
            f"{smaller:.2f} of float32's size, {faster:.2f} times as fast here on 224 x 224 "
            f"({threads} thread{'s' * (threads > 1)})",
            accuracy_note,
        ],
        {
            "least_cosine": cosine, "largest_difference": largest, "size_of_float32": smaller,
            "times_as_fast": faster, "threads": threads, "knn_k20": accuracy,
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
