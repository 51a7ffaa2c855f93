"""Layers that compute less or keep less than the formula: the same numbers."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from numerics import kept_bytes, relative, with_gradients

from ssl_xcit.models.layers import MLP, DropPath, NormMLP
from ssl_xcit.models.xcit import CACHED_SIZES, FourierPosition, XCiT


def norm_and_mlp(dim):
    torch.manual_seed(0)
    norm, mlp = torch.nn.LayerNorm(dim, eps=1e-6), MLP(dim)
    for parameter in (*norm.parameters(), *mlp.parameters()):
        torch.nn.init.normal_(parameter, std=0.4)
    return norm, mlp, torch.nn.Parameter(torch.randn(dim))


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_mlp_by_parts_is_the_layers_one_after_another(rows, monkeypatch):
    monkeypatch.setattr(NormMLP, "ROWS", rows)
    norm, mlp, gain = norm_and_mlp(6)
    parameters = [*norm.parameters(), *mlp.parameters(), gain]
    x = torch.randn(3, 5, 6, requires_grad=True)
    ours = with_gradients(lambda: mlp.of_norm(x, norm, gain), [x, *parameters])
    plain = with_gradients(lambda: mlp(norm(x), gain), [x, *parameters])
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, plain, strict=True))
    with torch.no_grad():
        assert torch.allclose(mlp.of_norm(x, norm, gain), ours[0])
    made, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, *a, **k: made.append(a) or empty(t, *a, **k)
    )
    NormMLP.apply(x, *(p.detach() for p in parameters[:-1]), 1e-6, False)
    assert made[0][0] == 0  # without gradients no hidden layer is kept
    x, norm, mlp = x.detach().double().requires_grad_(), norm.double(), mlp.double()
    weights = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    assert torch.autograd.gradcheck(lambda *t: NormMLP.apply(*t, 1e-6, True), (x, *weights))


def test_mlp_by_parts_rounds_no_worse_under_autocast():
    norm, mlp, gain = norm_and_mlp(32)
    x = torch.randn(2, 40, 32, requires_grad=True)
    inputs = [x, *norm.parameters(), *mlp.parameters(), gain]
    plain, parts = lambda: mlp(norm(x), gain), lambda: mlp.of_norm(x, norm, gain)
    exact = with_gradients(plain, inputs)
    low = [with_gradients(form, inputs, low=True) for form in (parts, plain)]
    for a, b, c in zip(*low, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative(a.float(), c) < 1.3 * relative(b.float(), c) + 1e-3


def test_dropped_samples_are_not_computed():
    torch.manual_seed(0)
    drop, seen = XCiT(32, 1, 2, patch_size=4, drop_path=0.5).blocks[0].drop_path, []

    def branch(x):
        seen.append(len(x))
        return 3.0 * x

    x = torch.randn(1000, 2, 3, requires_grad=True)
    for out in (drop(x, branch(x)), drop.by_sample(x, branch)):
        kept = (out != x).flatten(1).all(1)
        assert 400 < kept.sum() < 600
        assert torch.allclose(out[kept], 7.0 * x[kept])  # x + 3 x / (1 - rate)
        assert torch.equal(out[~kept], x[~kept])
    assert seen == [1000, kept.sum().item()]
    out.sum().backward()
    assert set(x.grad.unique().tolist()) == {1.0, 7.0}
    drop.eval()
    for out in (drop(x, branch(x)), drop.by_sample(x, branch)):
        assert torch.equal(out, x + 3.0 * x)


def test_parameters_have_gradients_when_every_sample_drops_the_branch():
    drop, layer, x = DropPath(0.999999), torch.nn.Linear(3, 3), torch.randn(2, 1, 3)
    out = drop.by_sample(x, layer)
    assert torch.equal(out, x)
    out.sum().backward()
    assert (layer.weight.grad == 0).all()


def small(**settings):
    torch.manual_seed(0)
    return XCiT(16, 3, 2, patch_size=4, **settings)


def test_small_branches_are_not_rounded_away_in_bfloat16():
    """The residual stream is float32 under autocast, as the published layer scale of 1e-5 needs."""
    model = small(layer_scale=1e-3).eval()
    x = torch.randn(2, 3, 24, 24)

    def change(low):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            block, seen = model.blocks[0], []
            hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            after, _ = model.patch_tokens(x)
            hook.remove()
        assert after.dtype == torch.float32
        return after - seen[0]

    assert relative(change(True), change(False)) < 0.05


@pytest.mark.parametrize("low", [False, True])
def test_recomputed_blocks_are_the_same_step(low):
    """Output, gradients, BatchNorm's statistics and the random numbers that come next."""
    plain = small(drop_path=0.4)
    again = deepcopy(plain)
    again.checkpoint_blocks = True
    x, steps = torch.randn(6, 3, 24, 24), []
    for model in (plain, again):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(x)
        out.square().sum().backward()
        step = {name: p.grad for name, p in model.named_parameters()}
        steps.append(step | {"out": out, "next": torch.rand(3)} | dict(model.named_buffers()))
    for name, value in steps[0].items():
        assert torch.equal(steps[1][name], value), name


def test_recomputed_blocks_twice():
    model, x = small(drop_path=0.4), torch.randn(2, 3, 24, 24)
    model.checkpoint_blocks = True
    loss, inputs = model(x).square().sum(), [model.cls_token, *model.blocks.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert model.blocks[0].local_mp.bn.num_batches_tracked == 1
    assert model.blocks[0].local_mp.bn.momentum == 0.1


def test_recomputed_blocks_keep_less():
    """Of what autograd saves, a block's part is its input."""
    model, x, kept = small(), torch.randn(2, 3, 96, 96), []
    for model.checkpoint_blocks in (False, True):
        kept.append(kept_bytes(lambda: model.patch_tokens(x)))
    width = model.patch_tokens(x)[0].nbytes
    assert kept[0] - kept[1] > 3 * 9 * width  # three blocks, at least nine widths each


WITHOUT_BREAKS = """
import torch
from ssl_xcit.models.xcit import XCiT

model = XCiT(16, 1, 2, patch_size=4, drop_path=0.1)
run = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="eager")
run(torch.randn(2, 3, 24, 24)).sum().backward()
with torch.no_grad():
    model.eval()
    x = torch.randn(1, 3, 80, 80)  # attention from the Gram matrix
    assert torch.allclose(model(x), run(x), atol=1e-4)

model = XCiT(16, 1, 2, patch_size=4)  # with masked patches
run = torch.compile(model.forward_features, dynamic=False, fullgraph=True, backend="eager")
x, mask = torch.randn(2, 3, 24, 24), torch.rand(2, 6, 6) < 0.4
gradients = []
for forward in (model.forward_features, run):
    token = torch.ones(16, requires_grad=True)
    cls, patches = forward(x, mask, token, True)
    (cls.sin().sum() + patches.sin().sum()).backward()
    gradients.append(token.grad)
assert gradients[0].abs().sum() > 0
assert torch.allclose(*gradients, atol=1e-4)
"""


def test_compiles_without_a_graph_break():
    """In a process of its own: what checks types in tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_BREAKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_position_waves_are_kept_by_size():
    position = FourierPosition(8)
    with torch.inference_mode():
        first = position((3, 4))
    assert torch.equal(position((3, 4)), first)
    position((3, 4)).sum().backward()  # what inference made can be trained with
    for size in range(1, 2 * CACHED_SIZES):
        position((size, 2))
    assert len(position.cache) == CACHED_SIZES
    assert "cache" not in str(position.state_dict().keys())
