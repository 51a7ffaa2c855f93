"""Heads against transformers' UperNet, and against Semantic FPN as the paper describes it."""

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, interpolate, relu
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from ssl_xcit.transfer.segmentation.heads import FCN, SemanticFPN, UperNet

C, K = 12, 5
SIZES = ([(16, 24), (8, 12), (4, 6), (2, 3)], [(18, 15), (9, 7), (4, 3), (2, 1)])


def maps_of(sizes):
    return [torch.randn(2, C, *size) for size in sizes]


def randomise_(model):
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("weight", "var")) and value.ndim == 1:
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(0, 0.3)


def theirs_by_ours(module):
    """Names in transformers' modules of our tensors."""
    names = {"classifier": "classifier.conv", "psp_modules": "pools", "bottleneck": "pooled",
             "lateral_convs": "lateral", "fpn_convs": "output", "fpn_bottleneck": "fuse",
             "convs": ""}  # fmt: skip
    renamed = {}
    for name, value in module.state_dict().items():
        first, _, rest = name.partition(".")
        key = f"{names[first]}.{rest}".replace("batch_norm", "1").replace("conv.", "0.")
        key = key.replace("classifier.0.", "classifier.conv.")
        renamed[f"conv.{key[3:]}" if first == "convs" else key] = value
    return renamed


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("train", [False, True])
def test_upernet_is_that_of_transformers(sizes, train):
    config = UperNetConfig(hidden_size=16, auxiliary_channels=8, num_labels=K)
    pairs = [
        (UperNetHead(config, [C] * 4), UperNet(C, K, 16, 0.0)),
        (UperNetFCNHead(config, [C] * 4), FCN(C, K, 8, 0.0)),
    ]
    assert (*config.pool_scales, config.auxiliary_num_convs) == (1, 2, 3, 6, 1)
    for theirs, ours in pairs:
        randomise_(theirs)
        ours.load_state_dict(theirs_by_ours(theirs))
        theirs.train(train), ours.train(train)
        maps = maps_of(sizes)
        found = ours(maps if isinstance(ours, UperNet) else maps[2])
        assert torch.allclose(found, theirs(maps), rtol=1e-5, atol=1e-5)


def semantic_fpn(weights, maps):
    """Figure 3 of the paper (arXiv:1901.02446), with BatchNorm in place of group norm."""

    def conv(image, name):
        bias = weights.get(f"{name}.bias")
        kernel = weights[f"{name}.weight"]
        return conv2d(image, kernel, bias, padding=kernel.shape[-1] // 2)

    def block(image, name):
        norm = [
            weights[f"{name}.1.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return relu(batch_norm(conv(image, f"{name}.0"), *norm))

    def double(image):
        return interpolate(image, scale_factor=2, mode="bilinear")

    top_down, merged = [None] * 4, None
    for i in (3, 2, 1, 0):
        lateral = conv(maps[i], f"neck.lateral.{i}")
        merged = lateral if merged is None else lateral + interpolate(merged, lateral.shape[-2:])
        top_down[i] = conv(merged, f"neck.output.{i}")
    total = block(top_down[0], "levels.0.0")
    total = total + fitted(double(block(top_down[1], "levels.1.0")), total)
    third = double(block(double(block(top_down[2], "levels.2.0")), "levels.2.2"))
    total = total + fitted(third, total)
    fourth = double(block(double(block(top_down[3], "levels.3.0")), "levels.3.2"))
    total = total + fitted(double(block(fourth, "levels.3.4")), total)
    return conv(total, "classifier.conv")


def fitted(image, like):
    if image.shape == like.shape:
        return image
    return interpolate(image, like.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("neck", [None, 6])
def test_semantic_fpn_is_the_papers(sizes, neck):
    head = SemanticFPN(C, K, 8, 0.1, neck).eval()
    randomise_(head)
    maps = maps_of(sizes)
    found = head(maps)
    assert found.shape == (2, K, *sizes[0])
    assert torch.allclose(found, semantic_fpn(head.state_dict(), maps), rtol=1e-4, atol=1e-4)


def test_dropout_takes_whole_channels():
    """With a classifier that passes channels on, and inputs that a level cannot make 0."""
    head = FCN(C, 64, 64, 0.5).train()
    with torch.no_grad():
        head.conv[1].bias.fill_(100.0)
        head.classifier.conv.weight.copy_(torch.eye(64)[:, :, None, None])
    torch.manual_seed(0)
    logits = head(torch.randn(2, C, 4, 4)).flatten(2)
    dropped = logits == 0
    assert torch.equal(dropped.any(dim=2), dropped.all(dim=2))
    assert 0.3 < dropped[:, :, 0].float().mean() < 0.7
    assert logits[~dropped].min() > 150  # scaled by 1 / (1 - 0.5)
