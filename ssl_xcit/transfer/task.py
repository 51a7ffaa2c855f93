"""What a task is: data with targets, a network with losses and predictions, a measure of these.

Classification, segmentation and detection have one file each for these; `module.py` trains whatever
fits, and knows none of them by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped, UInt8
from torch import Tensor

from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.data.sources import Source
from ssl_xcit.models.xcit import XCiT

IGNORED = 255  # the label of pixels without a class, in masks that `read_target` returns


class Instances(NamedTuple):
    """The M objects of an image, in pixels of the image as decoded."""

    boxes: Float32[np.ndarray, "M 4"]  # left, top, right, bottom
    labels: Int64[np.ndarray, " M"]  # from 0
    masks: Bool[np.ndarray, "M height width"] | None  # None: the data set has boxes only
    crowd: Bool[np.ndarray, " M"]  # regions of many objects: no targets, and no false positives
    areas: Float64[np.ndarray, " M"] | None = None  # in pixels, as annotated; 0: not known


# a class id or a row of 0 and 1; classes by pixel; objects
Target: TypeAlias = Shaped[np.ndarray, "..."] | Instances


@runtime_checkable
class AnnotatedSource(Protocol):
    """Images with what is known of each."""

    @property
    def images(self) -> Source:
        """The images."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """In the order of the labels."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """What was not usable, a line each: `annotations.json: box 7 has no area`."""
        ...

    @property
    def digest(self) -> str:
        """A hash of the annotations."""
        ...

    def read_target(self, index: int, height: int, width: int) -> Target:
        """Read what is known of an image that was decoded to so many pixels.

        Raises:
            BadImage: it cannot be read, or does not fit the image.
        """
        ...


@dataclass(frozen=True)
class TransferData:
    """Images to train on and to test on, with the same classes."""

    train: AnnotatedSource
    test: AnnotatedSource
    name: str  # for tables


@runtime_checkable
class Augment(Protocol):
    """A training image and its target to an input; draws from torch's global generator only, which
    the data set seeds by position. Runs in loader processes.
    """

    def __call__(self, pixels: Pixels, target: Target) -> tuple[UInt8[Tensor, "C h w"], Any]:
        """Augment."""
        ...


@runtime_checkable
class Prepare(Protocol):
    """A test image to an input, without its target. Runs in loader processes."""

    def __call__(self, pixels: Pixels) -> UInt8[Tensor, "C h w"]:
        """Prepare."""
        ...


class Measured(NamedTuple):
    """What a measure says: numbers in percent, their intervals, and more for the report."""

    results: dict[str, float]  # the first is the one that `best` follows
    intervals: dict[str, tuple[float, float]]  # 95 %
    details: dict[str, Any]  # plain data, such as the confusion matrix, by name


@runtime_checkable
class Measure(Protocol):
    """Compares predictions with targets, image by image, on the CPU."""

    def update(self, name: str, prediction: Any, target: Target) -> None:
        """Add an image; `name` is for lists of the worst."""
        ...

    def compute(self) -> Measured:
        """Measure all images that were added."""
        ...


@runtime_checkable
class Task(Protocol):
    """An `nn.Module` of a backbone and a head.

    Attributes:
        kind: `classification`, `segmentation` or `detection`.
        backbone: in checkpoints by itself, so that evaluation and export load it as any other.
        class_names: in the order of the labels.
        settings: plain data that, with the class names, build the head again: `make_task`.
        prepare: test images to inputs.
        images_at_once: in evaluation; 1 where images of several sizes would be padded to one.
    """

    kind: str
    if TYPE_CHECKING:  # checks at run time do not find modules in modules, from Python 3.12 on
        backbone: XCiT
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    prepare: Prepare
    images_at_once: int

    def losses(
        self, images: Sequence[UInt8[Tensor, "C h w"]] | UInt8[Tensor, "B C h w"], targets: Any
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Losses of a training batch by name, whose sum is minimised; draws from torch's global
        generators only, which the training step seeds.
        """
        ...

    def predict(
        self, inputs: Sequence[UInt8[Tensor, "C h w"]], sizes: Sequence[tuple[int, int]]
    ) -> list[Any]:
        """Predictions for prepared images, each for the (height, width) of its file as decoded."""
        ...

    def measure(self) -> Measure:
        """A measure of this task, empty."""
        ...
