"""Detection: the network's settings against sums by hand, the augmentation, and the task."""

from collections import OrderedDict
from inspect import signature

import numpy as np
import pytest
import torch
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    batched_nms,
    box_iou,
    roi_align,
)

import ssl_xcit.transfer.detection.network as network_module
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.detection.augment import (
    DetectionAugment,
    DetectionPrepare,
    cropped,
    flipped,
    rescaled_size,
    resized,
)
from ssl_xcit.transfer.detection.network import (
    STRIDES,
    AlignedRegions,
    Anchors,
    MaskRCNN,
    mask_targets,
    paste,
)
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.task import Instances

PUBLISHED = {
    name: setting.default
    for name, setting in signature(Detection).parameters.items()
    if name in signature(MaskRCNN).parameters
}
SMALL = {
    "channels": 16, "box_channels": 32, "anchor_scale": 4.0, "rpn_samples": 32, "roi_samples": 16,
    "train_candidates": 50, "test_candidates": 50, "proposals": 20,
}  # fmt: skip


def images_of(*sizes, channels=3):
    """A padded batch of noise."""
    height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes, strict=True))
    return ImageList(torch.randn(len(sizes), channels, height, width), list(sizes))


def maps_of(images, channels=8):
    """Maps of noise at strides 4 to 32."""
    height, width = images.tensors.shape[-2:]
    return [
        torch.randn(len(images.tensors), channels, height // s, width // s) for s in (4, 8, 16, 32)
    ]


def targets_of(images, num_objects, masks=True):
    """Boxes of at least 12 pixels, labels from 1, and their inner parts as masks."""
    targets = []
    for height, width in images.image_sizes:
        start = torch.rand(num_objects, 2) * torch.tensor([width / 2, height / 2])
        boxes = torch.cat((start, start + 12 + torch.rand(num_objects, 2) * 16), dim=1)
        target = {"boxes": boxes, "labels": torch.randint(1, 4, (num_objects,))}
        if masks:
            target["masks"] = torch.zeros(num_objects, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], boxes.int(), strict=True):
                mask[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True
        targets.append(target)
    return targets


def task(masks=True, names=("cat", "dog"), **settings):
    """A tiny detector."""
    backbone = XCiT(16, 2, 2, 8, pyramid=True)
    return Detection(backbone, names, masks, side=64, longest=96, **{**SMALL, **settings})


def objects_of(height, width, num_objects, crowd=False, seed=0):
    """Objects with masks that fill their boxes."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, (width // 2, height // 2), (num_objects, 2))
    boxes = np.concatenate((start, start + generator.integers(8, 24, (num_objects, 2))), axis=1)
    boxes = np.minimum(boxes, (width, height) * 2)
    masks = np.zeros((num_objects, height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    labels = generator.integers(0, 2, num_objects)
    return Instances(boxes.astype(np.float32), labels, masks, np.full(num_objects, crowd))


# ------------------------------------------------------------------ network


def test_anchors_are_mmdets():
    """8 strides a side, of equal area, from each cell's corner at exact strides."""
    images = images_of((96, 160))
    maps = [*maps_of(images), torch.zeros(1, 8, 2, 3)]
    anchors, *rest = Anchors(8.0)(images, maps)
    assert not rest
    expected = []
    for stride, features in zip((4, 8, 16, 32, 64), maps, strict=True):
        for row in range(features.shape[-2]):
            for column in range(features.shape[-1]):
                for ratio in (0.5, 1.0, 2.0):
                    height, width = 8 * stride * ratio**0.5, 8 * stride / ratio**0.5
                    x, y = column * stride, row * stride
                    expected.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    assert torch.allclose(anchors, torch.tensor(expected), atol=1e-4)


def test_anchors_are_torchvisions_but_for_rounding():
    images = images_of((128, 128))
    maps = [*maps_of(images), torch.zeros(1, 8, 2, 2)]
    theirs = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    ours = Anchors(8.0)(images, maps)[0]
    assert (ours - theirs(images, maps)[0]).abs().max() <= 0.5
    square = slice(1, None, 3)
    assert torch.equal(ours[square], theirs(images, maps)[0][square])


def test_regions_are_aligned_and_sampled_adaptively():
    images = images_of((256, 256), (256, 200))
    maps = OrderedDict(zip("2345", maps_of(images), strict=True))
    boxes = [
        torch.tensor([[10.0, 20, 50, 47], [3, 3, 200, 240]]),
        torch.tensor([[0.0, 0, 112, 112], [5.5, 7.25, 20, 200], [0, 0, 199, 111]]),
    ]
    pooled = AlignedRegions(7)(maps, boxes)
    i = 0
    for image, of_image in enumerate(boxes):
        for box in of_image:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            level = int(np.clip(np.floor(4 + np.log2(area**0.5 / 224) + 1e-6), 2, 5))
            region = torch.cat((torch.tensor([float(image)]), box))[None]
            reference = roi_align(maps[str(level)], region, 7, 1 / 2**level, 0, aligned=True)
            assert torch.allclose(pooled[i], reference[0], atol=1e-6)
            i += 1
    theirs = MultiScaleRoIAlign(list("2345"), 7, 2)(maps, boxes, images.image_sizes)
    assert not torch.allclose(pooled, theirs, atol=1e-2)


def test_region_features_of_a_ramp_are_exact():
    """Cells of a map that rises by 1 a pixel hold the coordinate of their centre."""
    x = (torch.arange(64.0) + 0.5) * 4
    maps = {"2": x.expand(1, 1, 64, 64)}
    pooled = AlignedRegions(7)(maps, [torch.tensor([[40.0, 40, 110, 110]])])
    assert torch.allclose(pooled[0, 0, 3], 40 + (torch.arange(7.0) + 0.5) * 10, atol=1e-3)


def network(**settings):
    """A tiny network of three classes."""
    torch.manual_seed(0)
    return MaskRCNN(8, 3, **{**PUBLISHED, **SMALL, **settings})


def test_box_losses_are_l1_over_all_samples():
    """Both heads, against loops over the sampled anchors and regions."""
    net = network()
    images = images_of((64, 64), (64, 60))
    targets = targets_of(images, 3)
    torch.manual_seed(1)
    features = net.fpn(OrderedDict(zip("2345", maps_of(images), strict=True)))
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def call(*args):
            seen[name] = args, (out := original(*args))
            return out

        setattr(module, name, call)

    spy(net.rpn, "compute_loss")
    spy(net.rpn, "fg_bg_sampler")
    spy(net.roi_heads, "select_training_samples")
    spy(net.roi_heads, "classified")
    proposals, rpn_losses = net.rpn(images, features, targets)
    _, roi_losses = net.roi_heads(features, proposals, images.image_sizes, targets)

    (_, offsets, labels, wanted), _ = seen["compute_loss"]
    offsets = offsets.detach()
    positive, negative = (torch.cat(part).bool() for part in seen["fg_bg_sampler"][1])
    wanted = torch.cat(wanted)
    total = sum(
        abs(float(offsets[i, j]) - float(wanted[i, j]))
        for i in range(len(wanted))
        for j in range(4)
        if positive[i]
    )
    assert positive.any()
    assert int((positive | negative).sum()) == 64
    assert rpn_losses["loss_rpn_box_reg"].item() == pytest.approx(total / 64, rel=1e-5)

    _, (_, _, labels, wanted) = seen["select_training_samples"]
    _, (_, offsets) = seen["classified"]
    labels, wanted, offsets = torch.cat(labels), torch.cat(wanted), offsets.detach()
    total = sum(
        float((offsets[i, 4 * label : 4 * label + 4] - wanted[i]).abs().sum())
        for i, label in enumerate(labels.tolist())
        if label
    )
    assert (labels > 0).any()
    assert float(roi_losses["loss_box_reg"].detach()) == pytest.approx(
        total / len(labels), rel=1e-5
    )


def torchvision_network(net):
    """torchvision's Mask R-CNN with these weights, in the settings that are ours too."""

    class Backbone(torch.nn.Module):
        out_channels = SMALL["channels"]

        def __init__(self):
            super().__init__()
            self.fpn = net.fpn

        def forward(self, images):
            return self.fpn(self.maps)

    made = TorchvisionMaskRCNN(
        Backbone(),
        rpn_anchor_generator=AnchorGenerator(((32,),) * 5, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=50,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=32,
        rpn_head=net.rpn.head,
        box_batch_size_per_image=16,
        box_roi_pool=MultiScaleRoIAlign(list("2345"), 7, 2),
        box_head=net.roi_heads.box_head,
        box_predictor=net.roi_heads.box_predictor,
        mask_roi_pool=MultiScaleRoIAlign(list("2345"), 14, 2),
        mask_head=net.roi_heads.mask_head,
        mask_predictor=net.roi_heads.mask_predictor,
    )
    made.rpn.anchor_generator = net.rpn.anchor_generator
    made.roi_heads.box_roi_pool = net.roi_heads.box_roi_pool
    made.roi_heads.mask_roi_pool = net.roi_heads.mask_roi_pool
    made.transform = GeneralizedRCNNTransform(64, 64, [0.0] * 3, [1.0] * 3, _skip_resize=True)
    return made


def test_all_else_is_torchvisions():
    """The other losses, and detections, with the same weights and the same random draws."""
    net = network()
    theirs = torchvision_network(net)
    images = images_of((64, 64), (64, 64))
    maps = maps_of(images)
    theirs.backbone.maps = OrderedDict(zip("2345", maps, strict=True))
    targets = targets_of(images, 3)
    torch.manual_seed(2)
    losses = {name: loss.item() for name, loss in net(maps, images, targets)[1].items()}
    torch.manual_seed(2)
    expected = {k: v.item() for k, v in theirs(list(images.tensors), targets).items()}
    assert set(losses) == set(expected)
    for name in ("loss_objectness", "loss_classifier"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("loss_rpn_box_reg", "loss_box_reg"):  # |x| - 1/18 <= smooth L1 <= |x|
        assert expected[name] < losses[name] < expected[name] + 4 / 18
    # targets there are neither aligned nor binary
    assert losses["loss_mask"] == pytest.approx(expected["loss_mask"], rel=0.05)
    net.eval(), theirs.eval()
    theirs.roi_heads.score_thresh = net.roi_heads.score_thresh = 0.0
    found, _ = net(maps, images)
    for ours, reference in zip(found, theirs(list(images.tensors)), strict=True):
        assert len(ours["boxes"]) > 5
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(ours[name], reference[name])


def test_proposals_are_the_best_after_suppression():
    """As many as are set, the same as by hand: best candidates of each map, then suppression."""
    net = network(train_candidates=40, proposals=30, anchor_scale=8.0)
    images = images_of((128, 128))
    features = net.fpn(OrderedDict(zip("2345", maps_of(images), strict=True)))
    kept, _ = net.rpn(images, features, targets_of(images, 2))
    logits, offsets = net.rpn.head(list(features.values()))
    anchors = net.rpn.anchor_generator(images, list(features.values()))[0]
    boxes, scores, levels, start = [], [], [], 0
    for level, (logit, offset) in enumerate(zip(logits, offsets, strict=True)):
        flat = logit[0].permute(1, 2, 0).flatten()
        shift = offset[0].unflatten(0, (3, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        best = flat.topk(min(40, len(flat))).indices
        anchor = anchors[start : start + len(flat)][best]
        size, centre = anchor[:, 2:] - anchor[:, :2], (anchor[:, 2:] + anchor[:, :2]) / 2
        centre, size = centre + shift[best, :2] * size, size * shift[best, 2:].exp()
        boxes.append(torch.cat((centre - size / 2, centre + size / 2), dim=1).clamp(0, 128))
        scores.append(flat[best])
        levels.append(torch.full_like(best, level))
        start += len(flat)
    chosen = batched_nms(torch.cat(boxes), torch.cat(scores), torch.cat(levels), 0.7)[:30]
    assert len(kept[0]) == 30
    assert torch.allclose(kept[0], torch.cat(boxes)[chosen], atol=1e-3)


class WideBackbone(torch.nn.Module):
    out_channels = 256


def test_published_settings_are_the_defaults():
    net = MaskRCNN(4, 80, **PUBLISHED)
    rpn, heads = net.rpn, net.roi_heads
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    sides = [float(rpn.anchor_generator.cell(s)[1, 2]) * 2 for s in STRIDES]
    assert sides == [32, 64, 128, 256, 512]
    assert rpn.nms_thresh == 0.7
    assert rpn.box_coder.weights == (1, 1, 1, 1)
    assert rpn.fg_bg_sampler.batch_size_per_image == 256
    assert rpn.fg_bg_sampler.positive_fraction == 0.5
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert heads.fg_bg_sampler.batch_size_per_image == 512
    assert heads.fg_bg_sampler.positive_fraction == 0.25
    assert heads.box_coder.weights == (10, 10, 5, 5)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    anchors = AnchorGenerator(((32,),) * 5, ((0.5, 1.0, 2.0),) * 5)
    theirs = TorchvisionMaskRCNN(WideBackbone(), 81, rpn_anchor_generator=anchors)
    for part in ("box_head", "box_predictor", "mask_head", "mask_predictor"):
        shapes = {k: v.shape for k, v in getattr(heads, part).state_dict().items()}
        expected = {k: v.shape for k, v in getattr(theirs.roi_heads, part).state_dict().items()}
        assert shapes == expected


def test_mask_targets_are_the_objects_share_of_the_box():
    mask = torch.zeros(2, 40, 40, dtype=torch.bool)
    mask[1, 10:20, 10:30] = True
    target = mask_targets(mask, torch.tensor([1]), torch.tensor([[10.0, 10, 30, 30]]), 28)
    expected = torch.zeros(28, 28)
    expected[:14] = 1
    assert torch.equal(target[0], expected)


def test_pasted_masks_come_back():
    """A mask that is cut out for training and pasted again is the same but for its border."""
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    disc = (x - 41.3) ** 2 + (y - 25.8) ** 2 < 15**2
    box = torch.tensor([26.3, 10.8, 56.3, 40.8])
    cut = mask_targets(disc[None], torch.tensor([0]), box[None], 28)[0]
    again = paste(cut, box, (60, 80))
    assert (again & disc).sum() / (again | disc).sum() > 0.95
    whole = paste(torch.ones(28, 28), torch.tensor([3.0, 5, 20, 30]), (60, 80))
    expected = torch.zeros(60, 80, dtype=torch.bool)
    expected[5:30, 3:20] = True
    assert torch.equal(whole, expected)
    outside = paste(torch.ones(28, 28), torch.tensor([-20.0, -20, 10, 10]), (60, 80))
    assert int(outside.sum()) == 100
    assert not paste(torch.ones(28, 28), torch.tensor([5.0, 5, 5, 9]), (60, 80)).any()


def test_masks_pasted_in_bands_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        mask = torch.rand(28, 28, generator=generator)
        start, side = torch.rand(2, 2, generator=generator) * torch.tensor([[60.0], [200.0]])
        box = torch.cat((start - 20, start + side))
        whole = paste(mask, box, (150, 190))
        for pixels in (1, 300, 7000):
            with monkeypatch.context() as patch:
                patch.setattr(network_module, "BAND", pixels)
                assert torch.equal(paste(mask, box, (150, 190)), whole)


def test_masks_at_the_files_size_are_the_pasted_ones():
    """They are kept as runs, and decoded they are what `paste` gives, whatever the size."""
    detector = task()
    masks = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(
        [[-4.0, -4, 70, 50], [3, 5, 20, 30], [10.5, 2, 11, 3], [0, 0, 64, 48], [8, 8, 8, 9]]
    )
    result = {
        "boxes": boxes, "labels": torch.ones(5).long(), "scores": torch.ones(5), "masks": masks,
    }  # fmt: skip
    for size in ((48, 64), (96, 128), (33, 40)):
        found = detector.at_file_size(result, (48, 64), size)
        assert len(found.masks) == 5
        wanted = [
            paste(m, torch.from_numpy(b), size) for m, b in zip(masks, found.boxes, strict=True)
        ]
        for i, (mask, pasted) in enumerate(zip(found.masks, wanted, strict=True)):
            assert np.array_equal(mask, pasted.numpy())
            assert found.masks.num_pixels(i) == pasted.sum()


# ------------------------------------------------------------------ augmentation


def test_flip_crop_and_resize_keep_boxes_on_their_masks():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    objects = objects_of(60, 80, 4)
    for made, moved in (
        flipped(pixels, objects),
        cropped(pixels, objects, 0, 0, 60, 80),
        resized(pixels, objects, (120, 160)),
        cropped(pixels, objects, 5, 7, 40, 50),
    ):
        assert moved.masks.shape[1:] == made.shape[:2]
        for mask, box in zip(moved.masks, moved.boxes, strict=True):
            if mask.any():
                rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
                tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                assert np.array_equal(box, tight)
            else:
                assert (box[2:] <= box[:2]).any()


def test_sizes_are_mmdets():
    pixels = np.zeros((480, 640, 3), np.uint8)
    assert rescaled_size(pixels, 800, 1333) == (800, 1067)
    assert rescaled_size(np.zeros((300, 900, 3), np.uint8), 800, 1333) == (444, 1333)
    assert tuple(DetectionPrepare()(pixels).shape) == (3, 800, 1067)


def test_both_branches_have_the_published_sizes():
    """Half of the images are resized only; crops are of 384 to 600 pixels before the resizing."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    sizes = {"sides": (60, 64), "longest": 200, "crop_sides": (50,), "crop_range": (30, 40)}
    plain = DetectionAugment(**sizes, crop_probability=0.0)
    shapes = {tuple(plain(pixels, objects_of(96, 128, 2))[0].shape[1:]) for _ in range(20)}
    assert shapes == {(60, 80), (64, 85)}
    crops = DetectionAugment(**sizes, crop_probability=1.0)
    ratios = []
    for _ in range(200):
        _, h, w = crops(pixels, objects_of(96, 128, 2))[0].shape
        assert min(h, w) in (60, 64)
        ratios.append(w / h)
    assert 30 / 40 - 0.02 <= min(ratios) < 0.85
    assert 1.2 < max(ratios) <= 40 / 30 + 0.02
    both = DetectionAugment(**sizes)
    made = [both(pixels, objects_of(96, 128, 2))[0].shape[1:] for _ in range(400)]
    unchanged = sum(tuple(shape) in {(60, 80), (64, 85)} for shape in made)
    assert 160 < unchanged < 250


def test_augmented_targets():
    """Crowds and what a crop cuts away are no targets; an image may lose all its objects."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    augment = DetectionAugment((64,), 200, (96,), (30, 40), crop_probability=1.0)
    counts = []
    for seed in range(40):
        image, target = augment(pixels, objects_of(96, 128, 2, seed=seed))
        boxes = target["boxes"]
        assert boxes.dtype == torch.float32
        assert image.dtype == torch.uint8
        assert len(boxes) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].shape[1:] == image.shape[1:]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 if len(boxes) else True
        assert target["masks"].flatten(1).any(1).all()
        counts.append(len(boxes))
    assert set(counts) == {0, 1, 2}
    assert len(augment(pixels, objects_of(96, 128, 2, crowd=True))[1]["boxes"]) == 0
    without = objects_of(96, 128, 2)._replace(masks=None)
    assert set(augment(pixels, without)[1]) == {"boxes", "labels"}


def test_augmentation_follows_torchs_generator():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    augment = DetectionAugment((60, 64, 68), 200, (96, 80), (30, 60))
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append([augment(pixels, objects_of(96, 128, 3)) for _ in range(8)])
    for (image, target), (again, target_again) in zip(made[0], made[1], strict=True):
        assert torch.equal(image, again)
        assert all(torch.equal(target[name], target_again[name]) for name in target)
    assert any(a[0].shape != b[0].shape for a, b in zip(made[0], made[2], strict=True))


# ------------------------------------------------------------------ task


def training_batch(num_objects=(2, 0, 3)):
    """Images of different sizes with their targets."""
    augment = DetectionAugment((48, 64), 96, (64,), (40, 60))
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    torch.manual_seed(0)
    pairs = [augment(pixels, objects_of(70, 90, n, seed=n)) for n in num_objects]
    return [image for image, _ in pairs], [target for _, target in pairs]


def test_losses_follow_torchs_generator():
    """The same seed gives the same losses and gradients, bit by bit; another one does not."""
    detector = task()
    images, targets = training_batch()
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        detector.zero_grad()
        losses = detector.losses(images, targets)
        sum(losses.values()).backward()
        grads = [p.grad for p in detector.parameters() if p.grad is not None]
        made.append(({k: v.detach() for k, v in losses.items()}, [g.clone() for g in grads]))
    (first, grads), (second, grads_again), (other, _) = made
    assert set(first) == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask",
    }  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert any(not torch.equal(first[name], other[name]) for name in first)
    unused = {n for n, p in detector.named_parameters() if p.grad is None}
    assert all(n.startswith(("backbone.cls_", "backbone.norm.")) for n in unused)


def test_images_without_objects_train():
    detector = task()
    images, targets = training_batch((0, 0))
    losses = detector.losses(images, targets)
    assert all(torch.isfinite(v) for v in losses.values())
    assert losses["loss_mask"].item() == losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.network.parameters())


def test_boxes_alone():
    detector = task(masks=False)
    images, targets = training_batch()
    for target in targets:
        del target["masks"]
    assert "loss_mask" not in detector.losses(images, targets)
    assert not any("mask" in name for name in detector.state_dict())
    (found,) = detector.eval().predict([images[0]], [(70, 90)])
    assert found.masks is None
    with pytest.raises(UserError, match="masks=false"):
        task().losses(images, targets)


def test_predictions_are_at_the_files_size():
    """Boxes scale with the file, masks have its size; padding changes nothing."""
    detector = task(score_threshold=0.0).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    image = detector.prepare(pixels)
    assert tuple(image.shape) == (3, 64, 96)
    (plain,) = detector.predict([image], [(64, 96)])
    (twice,) = detector.predict([image], [(128, 192)])
    assert len(plain.boxes)
    assert len(plain.masks) == len(plain.boxes)
    assert plain.masks[0].shape == (64, 96)
    assert np.allclose(plain.boxes * 2, twice.boxes)
    assert len(twice.masks) == len(twice.boxes)
    assert twice.masks[0].shape == (128, 192)
    assert plain.boxes.dtype == np.float32
    assert plain.labels.dtype == np.int64
    assert set(plain.labels) <= {0, 1}
    assert (np.diff(plain.scores) <= 0).all()
    padded = detector.batch([image, image[:, :50, :70]])
    assert tuple(padded.tensors.shape) == (2, 3, 64, 96)
    assert padded.image_sizes == [(64, 96), (50, 70)]
    assert not padded.tensors[1, :, 50:].any()
    assert not padded.tensors[1, :, :, 70:].any()


def test_settings_build_it_again():
    detector = task(masks=False, nms_threshold=0.4)
    again = Detection(
        XCiT(**detector.backbone.architecture), detector.class_names, **detector.settings
    )
    assert again.settings == detector.settings
    again.load_state_dict(detector.state_dict())


def test_it_learns_one_image():
    """Boxes and masks of a picture that it has seen often enough."""
    torch.manual_seed(0)
    detector = task(names=("square",), roi_samples=32)
    pixels = np.full((64, 64, 3), 30, np.uint8)
    pixels[12:36, 20:52] = 220
    box = np.array([[20, 12, 52, 36]], np.float32)
    mask = pixels[None, :, :, 0] == 220
    target = Instances(box, np.zeros(1, np.int64), mask, np.zeros(1, bool))
    augment = DetectionAugment((64,), 64, crop_probability=0.0, flip_probability=0.0)
    image, wanted = augment(pixels, target)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector.losses([image], [wanted]).values()).backward()
        optimizer.step()
    # BatchNorm's running averages follow slowly; with those of the batch only the weights count
    detector.eval()
    for layer in detector.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.train()
    (found,) = detector.predict([image], [(64, 64)])
    assert found.scores[0] > 0.8
    assert float(box_iou(torch.from_numpy(found.boxes[:1]), torch.from_numpy(box))) > 0.7
    assert (found.masks[0] & mask[0]).sum() / (found.masks[0] | mask[0]).sum() > 0.7


def test_pyramid_network_is_torchvisions():
    """Five maps, the last one a max-pool of the fourth."""
    net = network()
    maps = OrderedDict(zip("2345", maps_of(images_of((64, 64))), strict=True))
    made = list(net.fpn(maps).values())
    assert isinstance(net.fpn, FeaturePyramidNetwork)
    assert [m.shape[-1] for m in made] == [16, 8, 4, 2, 1]
    assert torch.equal(made[4], made[3][:, :, ::2, ::2])
