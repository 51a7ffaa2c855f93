"""Detection and instance segmentation: Mask R-CNN on an XCiT's pyramid."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from ssl_xcit.data.preprocess import normalise, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.dataset import AnnotatedSubset
from ssl_xcit.transfer.detection.augment import DetectionPrepare
from ssl_xcit.transfer.detection.masks import RunMasks
from ssl_xcit.transfer.detection.measure import DetectionMeasure, Detections
from ssl_xcit.transfer.detection.network import MaskRCNN, paste
from ssl_xcit.transfer.task import AnnotatedSource
from ssl_xcit.utils.validation import Count, Positive, Share

NO_MASKS = (
    "the images have boxes without masks; give a data set with masks, or "
    "task.masks=false for a detector of boxes"
)
PADDING = 32  # the sides of a batch are multiples of it


class Detection(nn.Module):
    """Mask R-CNN (Faster R-CNN without masks); its defaults are the published settings on COCO.

    Args:
        backbone: with its pyramid.
        class_names: in the order of the labels.
        masks: whether each object's pixels are predicted as well as its box.
        side: of test images, the short one in pixels.
        longest: of test images, the long one at most.
        channels: of the feature pyramid network and the mask head.
        box_channels: width of the box head's two layers.
        anchor_scale: side of a square anchor in strides (4 to 64).
        rpn_samples: anchors of a training image that losses are of, at most half of them positive.
        roi_samples: regions of a training image, at most a quarter of them positive.
        train_candidates: anchors of each map that enter non-maximum suppression in training.
        test_candidates: likewise in testing.
        proposals: regions of an image that are kept of them.
        score_threshold: detections below it are left out.
        nms_threshold: IoU above which the lower of two detections of a class is left out.
        max_detections: of an image.
    """

    kind = "detection"
    images_at_once = 1

    def __init__(
        self,
        backbone: XCiT,
        class_names: Sequence[str],
        masks: bool = True,
        side: Count = 800,
        longest: Count = 1333,
        channels: Count = 256,
        box_channels: Count = 1024,
        anchor_scale: Positive = 8.0,
        rpn_samples: Count = 256,
        roi_samples: Count = 512,
        train_candidates: Count = 2000,
        test_candidates: Count = 1000,
        proposals: Count = 1000,
        score_threshold: Share = 0.05,
        nms_threshold: Share = 0.5,
        max_detections: Count = 100,
    ):
        super().__init__()
        self.class_names = tuple(class_names)
        self.masks = masks
        heads: dict[str, Any] = {
            "masks": masks,
            "channels": channels,
            "box_channels": box_channels,
            "anchor_scale": anchor_scale,
            "rpn_samples": rpn_samples,
            "roi_samples": roi_samples,
            "train_candidates": train_candidates,
            "test_candidates": test_candidates,
            "proposals": proposals,
            "score_threshold": score_threshold,
            "nms_threshold": nms_threshold,
            "max_detections": max_detections,
        }
        self.settings: dict[str, Any] = {"side": side, "longest": longest, **heads}
        self.prepare = DetectionPrepare(side, longest)
        self.backbone = backbone
        self.network = MaskRCNN(backbone.embed_dim, len(self.class_names), **heads)

    def before_training(self, train: AnnotatedSource) -> None:
        """Check that there are masks where masks are wanted.

        Raises:
            UserError: the data set has boxes only.
        """
        source = train.annotated if isinstance(train, AnnotatedSubset) else train
        if self.masks and getattr(source, "segmentations", ()) is None:
            raise UserError(NO_MASKS)

    def losses(
        self,
        images: Sequence[UInt8[Tensor, "_ _ _"]] | UInt8[Tensor, "B C h w"],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Losses of proposals (`loss_objectness`, `loss_rpn_box_reg`) and of regions
        (`loss_classifier`, `loss_box_reg`, `loss_mask`).

        Args:
            images: of any sizes.
            targets: of each image boxes, labels and masks, as `DetectionAugment` makes them; there
                may be no object.

        Raises:
            UserError: masks are wanted, and the data set has none.
        """
        if self.masks and not all("masks" in target for target in targets):
            raise UserError(NO_MASKS)
        batch = self.batch(images)
        known = [
            {**{k: v for k, v in t.items() if k != "labels"}, "labels": t["labels"] + 1}
            for t in targets  # 0 is the background's
        ]
        _, losses = self.network(self.backbone.pyramid(batch.tensors), batch, known)
        return losses

    def batch(
        self, images: Sequence[UInt8[Tensor, "_ _ _"]] | UInt8[Tensor, "B C h w"]
    ) -> ImageList:
        """Normalised images, padded with zeros at the right and at the bottom."""
        preprocess = of_weights(self.backbone.preprocess)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(sides) // PADDING) * PADDING for sides in zip(*sizes, strict=True))
        padded = torch.zeros(
            len(images), images[0].shape[0], height, width, device=images[0].device
        )
        for place, image, (h, w) in zip(padded, images, sizes, strict=True):
            place[:, :h, :w] = normalise(image, preprocess)
        return ImageList(padded, sizes)

    @torch.inference_mode()
    def predict(
        self, inputs: Sequence[UInt8[Tensor, "_ _ _"]], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Objects in prepared images, in pixels of files of these (heights, widths).

        The network has to be in eval mode.
        """
        assert not self.training
        batch = self.batch(inputs)
        results, _ = self.network(self.backbone.pyramid(batch.tensors), batch)
        return [
            self.at_file_size(result, input_size, size)
            for result, input_size, size in zip(results, batch.image_sizes, sizes, strict=True)
        ]

    def at_file_size(
        self, result: Mapping[str, Tensor], input_size: tuple[int, int], size: tuple[int, int]
    ) -> Detections:
        """Detections in an input as detections in its file."""
        (input_height, input_width), (height, width) = input_size, size
        scale = torch.tensor((width / input_width, height / input_height) * 2)
        boxes = result["boxes"].float().cpu() * scale
        masks = None
        if self.masks:
            pairs = zip(result["masks"].cpu(), boxes, strict=True)
            masks = RunMasks.of((paste(mask, box, size).numpy() for mask, box in pairs), size)
        return Detections(
            boxes.numpy(),
            (result["labels"] - 1).cpu().numpy(),
            result["scores"].float().cpu().numpy(),
            masks,
        )

    def measure(self) -> DetectionMeasure:
        """COCO's average precision, of no image yet."""
        return DetectionMeasure(self.class_names, self.masks)
