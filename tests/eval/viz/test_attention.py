"""Class attention against a full one written out in float64; masks against brute force."""

import copy

import numpy as np
import pytest
import torch
from tiny_run import sharp_backbone

from ssl_xcit.eval.viz import attention


def full_class_attention(block, x):
    """A block on (M, C) float64 tokens, the class token first, as CaiT and XCiT have it: attention
    of all tokens on all, of which only the class token's output is used.
    """
    M, C = x.shape
    H = block.attn.num_heads
    normed = block.norm1(x)
    parts = block.attn.qkv(normed).split(C, dim=1)
    q, k, v = (part.view(M, H, C // H).transpose(0, 1) for part in parts)
    scores = q @ k.transpose(1, 2) / (C // H) ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)  # (H, M, M)
    out = (weights @ v).transpose(0, 1).reshape(M, C)
    x = x + block.gamma1 * torch.cat((block.attn.proj(out[:1]), normed[1:]))
    x = torch.cat((block.norm2(x[:1]), block.norm2(x[1:]) if block.tokens_norm else x[1:]))
    hidden = torch.nn.functional.gelu(block.mlp.fc1(x[:1]))
    cls = x[:1] + block.gamma2 * block.mlp.fc2(hidden)
    return torch.cat((cls, x[1:] + x[1:])), weights[:, 0]


@pytest.mark.parametrize("tokens_norm", [True, False])
@pytest.mark.parametrize("sides", [(64, 64), (40, 72), (8, 8)])
def test_both_blocks_equal_a_full_class_attention(tokens_norm, sides):
    backbone = sharp_backbone(1, tokens_norm)
    x = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    grid = (sides[0] // 8, sides[1] // 8)
    with torch.no_grad():
        output = attention.forward(backbone, x)
        exact = copy.deepcopy(backbone).double()
        tokens, _ = exact.patch_tokens(x.double())
        for image in range(2):
            state = torch.cat((exact.cls_token[0], tokens[image]))
            for number, block in enumerate(exact.cls_attn_blocks):
                state, weights = full_class_attention(block, state)
                found = output.attention[image, number].double()
                assert (found - weights[:, 1:].unflatten(-1, grid)).abs().max() < 1e-5
                assert (output.on_class_token[image, number] - weights[:, 0]).abs().max() < 1e-5
        last, features = backbone.attention(x), backbone.forward_features(x)
    assert torch.allclose(output.attention[:, 1], last, atol=1e-6)
    assert torch.allclose(output.patches, features.patches, atol=1e-5)
    sums = output.attention.sum(dim=(-2, -1)) + output.on_class_token
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    if grid != (1, 1):  # or any map would do
        assert attention.peak(output.attention).max() > 2


def test_peak():
    maps = torch.zeros(2, 3, 4)
    maps[0] += 0.05
    maps[1, 2, 1] = 0.7
    assert attention.peak(maps).tolist() == pytest.approx([1.0, 12.0])


@pytest.mark.parametrize("mass", [0.3, 0.6, 1.0])
def test_masks_hold_the_share_with_the_fewest_patches(mass):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[..., 0] = 200  # what is left out has no colour
    heads = torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(2)) ** 4
    found = list(attention.attention_pictures(picture, heads, mass, 0.65))
    assert [one.name for one in found] == [
        f"{kind}-{name}" for name in ("mean", "head-1", "head-2", "head-3") for kind in
        ("map", "mask")
    ]  # fmt: skip
    for one, values in zip(found[1::2], [heads.mean(0), *heads], strict=True):
        middles = one.picture[4::8, 4::8].astype(int)
        kept = middles[..., 0] > middles[..., 1]
        values = values.double().numpy()
        order = np.sort(values.ravel())[::-1]
        fewest = 1 + int(np.argmax(order.cumsum() >= mass * values.sum() - 1e-12))
        assert kept.sum() == fewest
        assert values[kept].min() >= values[~kept].max(initial=0)
        assert f"{fewest / 40:.0%} of the area" in one.title


def test_the_brightest_patch_is_the_brightest_place():
    heads = torch.full((2, 4, 6), 0.01)
    heads[0, 1, 4] = 0.5
    heads[1, 3, 0] = 0.5
    for number, place in ((2, (1, 4)), (4, (3, 0))):
        picture = np.zeros((32, 48, 3), np.uint8)
        drawn = list(attention.attention_pictures(picture, heads, 0.6, 1.0))[number]
        light = drawn.picture.astype(int).sum(-1)
        assert light[place[0] * 8 + 4, place[1] * 8 + 4] == light.max()
        assert light[place[0] * 8 + 4, 20] < light.max() / 4
