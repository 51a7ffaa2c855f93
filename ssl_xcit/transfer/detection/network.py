"""Mask R-CNN (arXiv:1703.06870) on a feature pyramid (arXiv:1612.03144), of torchvision's parts,
but set as the detectors published with XCiT are (mmdet 2.11).

Differs from torchvision's `MaskRCNN`, as those do: L1 losses of boxes; RoIAlign with adaptive
sampling and aligned pixels; 1,000 proposals in training; anchors of 8 strides, neither rounded nor
on a grid that is guessed from the image's size; targets of masks are aligned and binary; masks are
pasted at fractions of pixels; mmdet's initial weights of the box head. Losses and boxes are
computed in float32 also under autocast. The one thing left as torchvision has it: an object whose
best anchor has an IoU below 0.3 still gets that anchor.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    grid_sample,
    l1_loss,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STRIDES = (4, 8, 16, 32, 64)  # of the maps; the last is of proposals only
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
BOX_SIZE, MASK_SIZE = 7, 14  # cells of a region's side in the two heads
FINEST = 56  # regions of less than twice this side are cut from the map of stride 4
MASK_THRESHOLD = 0.5
BAND = 2**20  # pixels that a mask is stretched to at once: positions and values take 12 bytes each
Maps = Sequence[Float[Tensor, "B channels _ _"]]
Named = dict[str, Any]  # tensors by torchvision's names


class Anchors(nn.Module):
    """Boxes of `scale` x stride around each cell's upper left corner, in each of the ratios."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def cell(self, stride: int) -> Float32[Tensor, "ratios 4"]:
        """Anchors around (0, 0), of equal areas."""
        height = self.scale * stride * torch.tensor(RATIOS).sqrt()
        width = (self.scale * stride) ** 2 / height
        return torch.stack((-width, -height, width, height), dim=1) / 2

    def forward(
        self, images: ImageList, maps: Sequence[Tensor]
    ) -> list[Float32[Tensor, "anchors 4"]]:
        """Anchors of all maps, row by row, as often as there are images."""
        anchors = []
        for stride, features in zip(STRIDES, maps, strict=True):
            rows, columns = (
                torch.arange(cells, device=features.device) * stride
                for cells in features.shape[-2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            corners = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((corners + self.cell(stride).to(features.device)).flatten(0, 1))
        return [torch.cat(anchors)] * len(images.image_sizes)


class ProposalHead(RPNHead):
    """Objectness and offsets of anchors, in float32 also under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Apply the same convolutions to each map."""
        logits, offsets = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in offsets]


class Proposals(RegionProposalNetwork):
    """torchvision's, with the L1 loss of boxes."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor] | tuple[Tensor, ...],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean cross-entropy over the sampled anchors; sum of |offset - target| over the positive
        ones, divided by the number of all that were sampled, as mmdet does.
        """
        positive, negative = (torch.cat(chosen) > 0 for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        logits = objectness.flatten()[sampled]
        truth = torch.cat(labels)[sampled]
        offsets = pred_bbox_deltas[positive]
        box = l1_loss(offsets, torch.cat(regression_targets)[positive], reduction="sum")
        return binary_cross_entropy_with_logits(logits, truth), box / len(truth)


class AlignedRegions(nn.Module):
    """RoIAlign from the map that suits a region's size (arXiv:1612.03144, eq. 1), with as many
    samples a cell as it has pixels of the map (sampling ratio 0) and pixels' centres at halves.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def levels(self, boxes: Float[Tensor, "R 4"]) -> Int64[Tensor, " R"]:
        """Index of each region's map: floor(log2(sqrt(area) / 56)), of 0 to 3."""
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        level = torch.log2((width * height).sqrt() / FINEST + 1e-6).floor()
        return level.clamp(0, len(STRIDES) - 2).long()

    def forward(
        self, maps: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any = None
    ) -> Float[Tensor, "R channels size size"]:
        """Features of all regions, image by image."""
        image = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
        regions = torch.cat((torch.cat(image), torch.cat(boxes)), dim=1)
        level = self.levels(regions[:, 1:])
        pairs = list(zip(maps.values(), STRIDES[:-1], strict=False))
        first = pairs[0][0]
        out = first.new_zeros(regions.shape[0], first.shape[1], self.size, self.size)
        for index, (features, stride) in enumerate(pairs):
            here = torch.where(level == index)[0]
            found = roi_align(features, regions[here], self.size, 1 / stride, 0, aligned=True)
            out[here] = found.to(out.dtype)
        return out


class Regions(RoIHeads):
    """torchvision's sampling and selection, with the L1 loss of boxes and aligned masks."""

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Named] | None = None,
    ) -> tuple[list[Named], Named]:
        """Losses by name where there are targets, else detections of each image."""
        if targets is not None:
            return [], self.losses(features, proposals, targets)
        logits, offsets = self.classified(features, proposals)
        boxes, scores, labels = self.postprocess_detections(
            logits, offsets, proposals, image_shapes
        )
        result = [
            {"boxes": b, "scores": s, "labels": k}
            for b, s, k in zip(boxes, scores, labels, strict=True)
        ]
        if self.has_mask():
            chosen = self.mask_logits(features, boxes, torch.cat(labels)).sigmoid()
            for detections, masks in zip(
                result, chosen.split([b.shape[0] for b in boxes]), strict=True
            ):
                detections["masks"] = masks
        return result, {}

    def classified(
        self, features: Mapping[str, Tensor], boxes: list[Tensor]
    ) -> tuple[Float32[Tensor, "R classes"], Float32[Tensor, "R offsets"]]:
        """Logits of the classes, background first, and offsets of boxes for each class."""
        regions = self.box_roi_pool(features, boxes)
        logits, offsets = self.box_predictor(self.box_head(regions))
        return logits.float(), offsets.float()

    def mask_logits(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: Int64[Tensor, " R"]
    ) -> Float32[Tensor, "R side side"]:
        """Masks in their boxes, those of the given classes."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        return logits[torch.arange(labels.shape[0], device=labels.device), labels].float()

    def losses(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], targets: list[Named]
    ) -> Named:
        """Cross-entropy of the sampled regions; sum of |offset - target| over the positive ones,
        divided by the number of all, as mmdet does; binary cross-entropy of the positive ones'
        masks.
        """
        boxes, matched, labels, offset_targets = self.select_training_samples(proposals, targets)
        logits, offsets = self.classified(features, boxes)
        truth = torch.cat(labels)
        positive = torch.where(truth > 0)[0]
        of_class = offsets.unflatten(1, (-1, 4))[positive, truth[positive]]
        box = l1_loss(of_class, torch.cat(offset_targets)[positive], reduction="sum")
        losses = {
            "loss_classifier": cross_entropy(logits, truth),
            "loss_box_reg": box / len(truth),
        }
        if self.has_mask():
            of_image = [label > 0 for label in labels]
            inside = [b[keep] for b, keep in zip(boxes, of_image, strict=True)]
            mask_logits = self.mask_logits(features, inside, truth[positive])
            wanted = torch.cat([
                mask_targets(target["masks"], index[keep], b, mask_logits.shape[-1])
                for target, index, keep, b in zip(targets, matched, of_image, inside, strict=True)
            ])  # fmt: skip
            # a sum of nothing is 0 and has a gradient, as a mean of nothing has not
            total = binary_cross_entropy_with_logits(mask_logits, wanted, reduction="sum")
            losses["loss_mask"] = total / max(1, wanted.numel())
        return losses


def mask_targets(
    masks: Bool[Tensor, "M height width"],
    index: Int64[Tensor, " R"],
    boxes: Float[Tensor, "R 4"],
    size: int,
) -> Float32[Tensor, "R size size"]:
    """The part of mask `index` that lies in each box, at size x size cells of 0 or 1."""
    regions = torch.cat((index[:, None].to(boxes.dtype), boxes), dim=1)
    if not len(masks):
        return boxes.new_zeros(0, size, size).float()
    parts = roi_align(masks[:, None].float(), regions.float(), size, 1.0, 0, aligned=True)
    return (parts[:, 0] >= MASK_THRESHOLD).float()


def paste(
    mask: Float[Tensor, "side side"], box: Float[Tensor, "4"], size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """A mask stretched to its box in an image of (height, width): the pixels whose centre has a
    probability of at least 0.5, by bilinear interpolation.
    """
    pasted = torch.zeros(size, dtype=torch.bool, device=mask.device)
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    left, top = max(0, int(x0)), max(0, int(y0))
    right, bottom = min(width, int(x1) + 1), min(height, int(y1) + 1)
    if x1 <= x0 or y1 <= y0 or right <= left or bottom <= top:
        return pasted
    x = (torch.arange(left, right, device=mask.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
    rows = torch.arange(top, bottom, device=mask.device)
    for band in rows.split(max(1, BAND // len(x))):
        y = (band + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
        inside = grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0]
        pasted[band[0] : band[-1] + 1, left:right] = inside >= MASK_THRESHOLD
    return pasted


class MaskRCNN(nn.Module):
    """Feature pyramid network, proposals, and heads of boxes and masks.

    Args:
        in_channels: of each of the four maps.
        num_classes: without background.
        masks: see `Detection`, as of all that follow.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        masks: bool,
        channels: int,
        box_channels: int,
        anchor_scale: float,
        rpn_samples: int,
        roi_samples: int,
        train_candidates: int,
        test_candidates: int,
        proposals: int,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
    ):
        super().__init__()
        self.fpn = FeaturePyramidNetwork([in_channels] * 4, channels, LastLevelMaxPool())
        self.rpn = Proposals(
            Anchors(anchor_scale),
            ProposalHead(channels, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": train_candidates, "testing": test_candidates},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        box_head = TwoMLPHead(channels * BOX_SIZE**2, box_channels)
        box_predictor = FastRCNNPredictor(box_channels, num_classes + 1)
        mask_parts = (
            AlignedRegions(MASK_SIZE),
            MaskRCNNHeads(channels, (channels,) * 4, 1),
            MaskRCNNPredictor(channels, channels, num_classes + 1),
        )
        self.roi_heads = Regions(
            AlignedRegions(BOX_SIZE),
            box_head,
            box_predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),  # 1 / (0.1, 0.1, 0.2, 0.2)
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            **dict(
                zip(("mask_roi_pool", "mask_head", "mask_predictor"), mask_parts, strict=True)
                if masks
                else ()
            ),
        )
        for layer in (box_head.fc6, box_head.fc7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((box_predictor.cls_score, 0.01), (box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self, maps: Maps, images: ImageList, targets: list[Named] | None = None
    ) -> tuple[list[Named], Named]:
        """Detections of each image, in pixels of the network's input, or losses by name.

        Args:
            maps: at strides 4, 8, 16 and 32.
            images: the padded batch and the size of each image in it.
            targets: with them losses are computed, in training mode; boxes, labels from 1, masks.
        """
        features = self.fpn(OrderedDict(zip("2345", maps, strict=True)))
        proposals, rpn_losses = self.rpn(images, features, targets)
        detections, losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        return detections, {**losses, **rpn_losses}
