"""Matrices of channel attention against the paper's formula, entropies against scipy's."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_run import sharp_backbone

from ssl_xcit.eval.viz import channels
from ssl_xcit.eval.viz.pictures import colour_table


def textbook(attn, x):
    """softmax(k^T q * temperature) of unit columns, (H, d, d) in float64, a token matrix (N, C);
    row i has the weights of the channels of k for channel i of q.
    """
    C, H = x.shape[1], attn.num_heads
    weight, bias = (t.detach().double().numpy() for t in (attn.qkv.weight, attn.qkv.bias))
    q, k = (x @ weight[s : s + C].T + bias[s : s + C] for s in (0, C))
    found = []
    for head in range(H):
        here = slice(head * C // H, (head + 1) * C // H)
        one, other = (part[:, here] / np.linalg.norm(part[:, here], axis=0) for part in (q, k))
        powers = np.exp(one.T @ other * attn.temperature[head].item())
        found.append(powers / powers.sum(axis=1, keepdims=True))
    return np.stack(found)


@pytest.mark.parametrize("num_tokens", [3, 100])
def test_matrices_are_those_of_the_formula(num_tokens):
    attn = sharp_backbone().blocks[1].attn
    x = torch.randn(2, num_tokens, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = channels.matrices(attn, x)
    assert found.shape == (2, 4, 8, 8)
    for one, tokens in zip(found, x.double().numpy(), strict=True):
        assert np.allclose(one, textbook(attn, tokens), atol=1e-5)
    assert torch.allclose(found.sum(dim=-1), torch.ones(2, 4, 8), atol=1e-5)
    assert found.max() > 0.5  # far from flat


def test_matrices_are_what_the_layer_mixes_with():
    attn = copy.deepcopy(sharp_backbone().blocks[0].attn)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = torch.nn.functional.linear(x, attn.qkv.weight[64:], attn.qkv.bias[64:])
        parts = v[0].unflatten(-1, (4, 8)).permute(1, 2, 0)  # (H, d, N)
        mixed = (channels.matrices(attn, x)[0] @ parts).permute(2, 0, 1).flatten(1)
        assert torch.allclose(attn.proj(mixed), attn(x)[0], atol=1e-4)


def test_blocks_are_watched_in_order_and_left_as_they_were():
    backbone = sharp_backbone()
    x = torch.randn(1, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    inputs = []
    with torch.no_grad():
        before = backbone(x)
        hooks = [
            b.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            for b in backbone.blocks
        ]
        with channels.recorded(backbone) as found:
            during = backbone(x)
        for hook in hooks:
            hook.remove()
        assert len(found) == 2
        for block, seen, one in zip(backbone.blocks, inputs, found, strict=True):
            assert np.allclose(one[0], textbook(block.attn, seen[0].double().numpy()), atol=1e-5)
        backbone(x)
    assert len(found) == 2
    assert torch.equal(before, during)
    assert not any(b.attn._forward_pre_hooks for b in backbone.blocks)


def test_entropy():
    maps = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) ** 5
    maps /= maps.sum(dim=-1, keepdim=True)
    expected = entropy(maps.double().numpy(), axis=-1).mean(-1) / math.log(8)
    assert np.allclose(channels.relative_entropy(maps), expected, atol=1e-6)
    flat, single = torch.full((4, 4), 0.25), torch.eye(4)
    assert channels.relative_entropy(flat).item() == pytest.approx(1.0)
    assert channels.relative_entropy(single).item() == 0.0
    assert channels.relative_entropy(torch.ones(1, 1)).item() == 0.0


def test_summary_over_images():
    generator = torch.Generator().manual_seed(0)
    each = [torch.rand(5, 2, 4, 4, generator=generator).softmax(-1) for _ in range(3)]
    summary = channels.Summary()
    for one in each:
        summary.add(one)
    stacked = np.stack([one.double().numpy() for one in each])
    assert np.allclose(summary.mean(), stacked.mean(0))
    expected = entropy(stacked, axis=-1).mean(-1) / math.log(4)  # (images, blocks, heads)
    numbers = summary.numbers()
    assert numbers["entropy"] == pytest.approx(expected.mean((0, 2)), abs=1e-6)
    assert numbers["entropy_std_over_images"] == pytest.approx(expected.mean(2).std(0), abs=1e-6)
    assert np.allclose(numbers["entropy_of_heads"], expected.mean(0), atol=1e-6)
    assert (numbers["d"], numbers["images"]) == (4, 3)


def test_a_matrix_is_drawn_upright():
    matrix = np.full((1, 1, 4, 4), 0.01)
    matrix[0, 0, 1, 3] = 0.97
    picture = channels.matrices_sheet(matrix)
    bright = np.argwhere((picture == colour_table()[-1]).all(-1))
    rows, columns = np.unique(bright[:, 0]), np.unique(bright[:, 1])
    side = channels.MATRIX // 4
    first = bright.min(0)
    here = picture[first[0] - side : first[0] + 3 * side, first[1] - 3 * side : first[1] + side]
    dark = (here == colour_table()[0]).all(-1)
    assert dark.sum() == 15 * side * side  # all others, row 1 and column 3 being the bright one
    assert len(rows) >= side
    assert len(columns) >= side


def test_a_curve_lies_at_its_values():
    curve = channels.DepthCurve("one", [0.5, 1.0, 0.75], (250, 0, 0), 2)
    picture = channels.chart([curve], "title").astype(int)
    red = (picture[..., 0] > 180) & (picture[..., 1] < 90)
    columns = [round(52 + 460 * (block + 0.5) / 3) for block in range(3)]
    rows = [np.flatnonzero(red[:, column]).mean() for column in columns]
    assert rows[1] < rows[2] < rows[0]
    assert (rows[0] - rows[2]) == pytest.approx(rows[2] - rows[1], abs=2)
