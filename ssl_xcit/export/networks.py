"""What exported programs compute: normalised images to named outputs, by the kind of task.

A detector takes one image of a fixed size, for its anchors are constants of the program. Its
non-maximum suppression lays the classes out on a plane, where torchvision puts them in a row or
runs once for each: float32 holds these coordinates, and exporters have no loop over classes.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
from annotated_types import Len
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

from ssl_xcit.errors import UserError
from ssl_xcit.export.description import Weights
from ssl_xcit.models.xcit import LARGEST_STRIDE, XCiT
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.network import STRIDES
from ssl_xcit.transfer.detection.task import PADDING, Detection
from ssl_xcit.transfer.segmentation.heads import resized
from ssl_xcit.transfer.segmentation.task import Segmentation
from ssl_xcit.utils.validation import Count, Words

ANY_SIZE = "any batch, height and width"
THRESHOLD = "score_threshold"  # an input of a detector that may be left out
ImageSize = Annotated[Sequence[Count], Len(2, 2), Words("[height,width] in pixels")]
# axes of any length, None: of one length; logits of images have the first two of those of pixels
AXES: dict[str, tuple[str | None, ...]] = {
    "images": ("batch", None, "height", "width"),
    THRESHOLD: (),
    "features": ("batch", None),
    "patches": ("batch", None, "rows", "columns"),
    "logits": ("batch", None, "height", "width"),
    "boxes": ("objects", None),
    "labels": ("objects",),
    "scores": ("objects",),
    "masks": ("objects", None, None),
}


class Features(nn.Module):
    """Class tokens, and with `patches` the patch tokens too."""

    sizes, note, size = ANY_SIZE, "", None

    def __init__(self, backbone: XCiT, patches: bool):
        super().__init__()
        self.backbone, self.patches = backbone, patches
        self.outputs = ("features", "patches") if patches else ("features",)
        self.number = "class or patch feature" if patches else "feature"  # that is compared

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Any:
        """(B, C), or that and (B, C, h, w)."""
        if not self.patches:
            return self.backbone(images)
        return tuple(self.backbone.forward_features(images))


class ImageLogits(nn.Module):
    """Logits of the classes of an image."""

    outputs, number, sizes, size = ("logits",), "logit", ANY_SIZE, None

    def __init__(self, task: Classification):
        super().__init__()
        self.task = task
        function = "sigmoid" if task.multi_label else "softmax"
        self.note = f"the {function} of the logits are the probabilities of the classes"

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B K"]:
        """One number a class."""
        return self.task.logits(images)


class PixelLogits(nn.Module):
    """Logits of the classes of each pixel, from whole images."""

    outputs, number, size = ("logits",), "logit of a pixel", None
    sizes = f"{ANY_SIZE} from {LARGEST_STRIDE} pixels"

    def __init__(self, task: Segmentation):
        super().__init__()
        self.task = task
        self.note = "a pixel's class is the one of its highest logit"
        if task.inference == "slide":
            self.note += (
                f"; the run averaged the logits of windows of {task.crop} pixels every "
                f"{task.stride}, and this takes an image as a whole"
            )

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B K H W"]:
        """One number a class and pixel."""
        with exportable(nn.AdaptiveAvgPool2d, "forward", average_pool):
            return resized(self.task.logits(images), images.shape[-2:])


class Objects(nn.Module):
    """Objects in one image of `size` (height, width)."""

    def __init__(self, task: Detection, size: tuple[int, int]):
        super().__init__()
        self.task, self.size = task, size
        self.outputs = ("boxes", "labels", "scores", *(["masks"] if task.masks else []))
        self.threshold = float(task.settings["score_threshold"])  # the default
        self.nms = partial(
            nms_on_plane, max(size) + 1, max(len(STRIDES), len(task.class_names) + 1)
        )
        height, width = size
        self.sizes = f"one image of {height} x {width}"
        self.note = (
            "resize yours to fit, then pad it at the right and at the bottom with 0 (after the "
            "normalisation); boxes are left, top, right and bottom in pixels of that"
        )
        if task.masks:
            self.note += ", masks probabilities in cells of the box"

    def forward(
        self, images: Float[Tensor, "1 in_chans H W"], score_threshold: Float[Tensor, ""]
    ) -> tuple[Tensor, ...]:
        """The objects of a higher score, the highest first."""
        network = self.task.network
        with (
            mock.patch.object(network.roi_heads, "score_thresh", score_threshold),
            exportable(box_ops, "batched_nms", self.nms),
        ):
            maps = self.task.backbone.pyramid(images)
            (result,), _ = network(maps, ImageList(images, [self.size]))
        result["labels"] = result["labels"] - 1  # torchvision's 0 is the background
        return tuple(result[name] for name in self.outputs)


Network = Features | ImageLogits | PixelLogits | Objects


def network_of(weights: Weights, patches: bool, size: ImageSize | None) -> Network:
    """The network that is exported.

    Args:
        weights: its task, or its backbone where there is none.
        patches: whether a backbone gives patch features too.
        size: (height, width) of a detector's image; None: that of the test images, lying.

    Raises:
        UserError: `patches` or `size` do not belong to such a network.
    """
    task = weights.task
    if patches and task is not None:
        raise UserError("patches=true is of features: add head=false")
    if size is not None and not isinstance(task, Detection):
        raise UserError("size is of detectors, and this network takes any: leave it out")
    if isinstance(task, Classification):
        return ImageLogits(task)
    if isinstance(task, Segmentation):
        return PixelLogits(task)
    if isinstance(task, Detection):
        height, width = size or (
            math.ceil(side / PADDING) * PADDING
            for side in (task.prepare.side, task.prepare.longest)
        )
        if height % PADDING or width % PADDING:
            raise UserError(f"size=[{height},{width}] must be multiples of {PADDING}")
        return Objects(task, (height, width))
    return Features(weights.backbone, patches)


def exportable(owner: Any, name: str, function: Any) -> AbstractContextManager[Any]:
    """Replace a function by an equal one that exporters take, while they trace."""
    if torch.compiler.is_exporting():
        return mock.patch.object(owner, name, function)
    return nullcontext()


def average_pool(
    pool: nn.AdaptiveAvgPool2d, x: Float[Tensor, "B C h w"]
) -> Float[Tensor, "B C n n"]:
    """Averages of n x n parts, of the rows floor(i h / n) to ceil((i + 1) h / n) and columns alike,
    for sizes that are symbols.
    """
    n, matrices = pool.output_size, []
    assert isinstance(n, int)
    for length in x.shape[-2:]:
        part, place = torch.arange(n)[:, None], torch.arange(length)
        inside = (place >= part * length // n) & (place < ((part + 1) * length + n - 1) // n)
        matrices.append(inside.to(x.dtype) / inside.sum(dim=1, keepdim=True))
    rows, columns = matrices
    return rows @ x @ columns.mT


def nms_on_plane(
    side: int,
    num_groups: int,
    boxes: Float[Tensor, "M 4"],
    scores: Float[Tensor, " M"],
    groups: Int64[Tensor, " M"],
    iou_threshold: float,
) -> Int64[Tensor, " kept"]:
    """Indices of the boxes that non-maximum suppression within each group keeps, those of high
    scores first; each group has a square of `side` pixels to itself.
    """
    columns = math.ceil(math.sqrt(num_groups))
    corner = torch.stack((groups % columns, groups // columns), dim=1) * side
    return nms(boxes + corner.repeat(1, 2).to(boxes.dtype), scores, iou_threshold)
