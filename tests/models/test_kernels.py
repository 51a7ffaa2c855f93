"""XCA blocks by this machine's kernels: the plain forms' numbers and gradients."""

import subprocess
import sys
import tempfile
from copy import deepcopy

import pytest
import torch
from numerics import kept_bytes, relative

from ssl_xcit.models import kernels as room
from ssl_xcit.models import xcit
from ssl_xcit.models.fused_block import applies, bands_of, local_branch
from ssl_xcit.models.kernels import kernels
from ssl_xcit.models.xcit import Stem, XCABlock, XCiT
from ssl_xcit.utils.hardware import cpp_compiler

pytestmark = pytest.mark.skipif(not cpp_compiler()[1], reason="no C++ compiler")
GRIDS = {"square": (6, 6), "odd": (3, 7), "one token": (1, 1), "wide": (2, 33)}


def made(dim, heads, drop_path=0.0, training=True):
    """A block with weights that matter, plain and by kernels."""
    torch.manual_seed(0)
    block = XCABlock(dim, heads, 1.0, drop_path)
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    block.attn.temperature.data.abs_()
    block.local_mp.bn.running_var.mul_(0.3)
    block.train(training)
    fused = deepcopy(block)
    fused.fused = True
    return block, fused


def everything(block, x, grid, low=False):
    """Output, gradients and running statistics after a pass; the same samples drop their paths."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = block(x, grid)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(weights.to(out.dtype))
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(block.named_buffers())}


@pytest.fixture
def one_thread():
    """So that there are bands for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(dim, grid, images=5, seed=2):
    torch.manual_seed(seed)
    return torch.randn(images, grid[0] * grid[1], dim)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("dim", "heads"), [(32, 2), (128, 4), (192, 4), (128, 2)])
def test_a_block_by_kernels_is_the_block(dim, heads, grid, drop_path, training):
    block, fused = made(dim, heads, drop_path, training)
    x = tokens(dim, grid)
    plain, ours = everything(block, x, grid), everything(fused, x, grid)
    exact = everything(deepcopy(block).double(), x.double(), grid)
    assert plain.keys() == ours.keys() == exact.keys()
    for name, value in exact.items():
        if name.startswith("local_mp.bn") or drop_path:  # double draws other samples
            value = plain[name]
        scale = value.abs().max().clamp_min(1e-3)
        error = ((ours[name] - value).abs().max() / scale).item()
        # one token has a norm of a single value, and gradients that cancel
        assert error < (5e-3 if grid == (1, 1) else 3e-5), (name, error)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize(
    ("grid", "parts"), [((29, 18), 2), ((23, 67), 4), ((5, 400), 4), ((2, 600), 2)]
)
def test_an_image_of_several_bands(grid, parts, drop_path, training, one_thread):
    assert bands_of(3, grid) == 3 * parts
    block, fused = made(32, 2, drop_path, training)
    x = tokens(32, grid, images=3)
    plain, ours = everything(block, x, grid), everything(fused, x, grid)
    names = [name for name, value in plain.items() if value.is_floating_point()]
    far = {name: relative(ours[name], plain[name]) for name in names}
    assert max(far.values()) < 3e-5, far


@pytest.mark.parametrize(("grid", "images"), [((6, 6), 9), ((3, 7), 9), ((31, 33), 3)])
def test_in_bfloat16_it_rounds_less_than_the_plain_form(grid, images, one_thread):
    errors = []
    for seed in range(8):  # in a gradient of four numbers a single draw may be lucky
        block, fused = made(128, 4)
        x = tokens(128, grid, images, seed)
        exact = everything(deepcopy(block).double(), x.double(), grid)
        runs = [everything(each, x, grid, low=True) for each in (block, fused)]
        assert runs[1]["out"].dtype == torch.float32
        names = [name for name, value in exact.items() if value.is_floating_point()]
        errors.append([[relative(run[k].double(), exact[k]) for k in names] for run in runs])
    plain, ours = torch.tensor(errors).square().mean(dim=0).sqrt()
    over = ours / (1.1 * plain + 1e-4)
    assert over.max() < 1.0, names[int(over.argmax())]


def test_all_samples_may_drop_a_branch():
    block, fused = made(64, 2, drop_path=0.999)
    plain, ours = (everything(b, tokens(64, (4, 4)), (4, 4)) for b in (block, fused))
    assert all(torch.isfinite(value).all() for value in ours.values())
    assert torch.allclose(ours["out"], plain["out"])


def test_a_batch_without_images_changes_no_statistics():
    network = XCiT(32, 1, 2, patch_size=16).train()
    network.fuse()
    network(torch.zeros(0, 3, 32, 32))
    assert all(torch.isfinite(buffer).all() for buffer in network.patch_embed.buffers())


def test_what_it_gives_does_not_depend_on_the_number_of_threads():
    x, run = torch.randn(700, 64), kernels()
    grad, weight = torch.randn(700, 64), torch.randn(64)
    block = made(64, 2)[0]

    def passes(threads):
        torch.set_num_threads(threads)
        out = [torch.empty(700, 64) for _ in range(2)]
        sums = [torch.empty(2, 64), torch.empty(64)]
        run(
            "layer_norm_backward", x.dtype, x, x, None, grad, 700, 1, 64, weight, 1e-6, out[0],
            sums[0],
        )  # fmt: skip
        run("bias_gelu_backward", x.dtype, x, weight, 700, 64, grad.clone(), out[1], sums[1])
        local = deepcopy(block)
        of_x = x[None].clone().requires_grad_()
        mixed = local_branch(run, of_x, local.norm3, local.local_mp, (35, 20), local.gamma3, None)
        mixed.backward(grad[None])
        assert of_x.grad is not None
        gradients = [p.grad for p in local.parameters() if p.grad is not None]
        return [*out, *sums, mixed.detach(), of_x.grad, *gradients]

    before = torch.get_num_threads()
    try:
        one, two = passes(1), passes(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, low):
    _, fused = made(64, 2)
    x = tokens(64, (4, 4))
    x[1, 3, 5] = value
    found = everything(fused, x, (4, 4), low)
    assert not torch.isfinite(found["out"]).all()
    assert not torch.isfinite(found["mlp.fc1.weight"]).all()


def test_a_network_by_kernels_trains_evaluates_and_recomputes():
    torch.manual_seed(0)
    plain = XCiT(64, 2, 2, patch_size=8, drop_path=0.2)
    nets = {"plain": plain, "fused": deepcopy(plain), "again": deepcopy(plain)}
    assert nets["fused"].fuse()
    assert nets["again"].fuse()
    nets["again"].checkpoint_blocks = True
    x, gradients, features = torch.randn(4, 3, 40, 24), {}, {}
    for name, net in nets.items():
        torch.manual_seed(1)
        net(x).square().sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in net.parameters()])
        with torch.inference_mode():
            features[name] = net.eval()(x)
    assert relative(gradients["fused"], gradients["plain"]) < 1e-5
    assert torch.equal(gradients["again"], gradients["fused"])
    assert torch.equal(features["again"], features["fused"])  # statistics saw the batch once
    assert relative(features["fused"], features["plain"]) < 1e-5
    with torch.inference_mode():
        assert torch.allclose(nets["fused"](x[1:3]), features["fused"][1:3], atol=1e-6)
    assert deepcopy(nets["fused"]).double()(x.double()).dtype == torch.float64  # not by kernels


def test_a_layer_that_is_watched_is_called():
    block, fused = made(64, 2)
    seen = []
    hook = fused.attn.register_forward_pre_hook(lambda attn, inputs: seen.append(inputs[0].shape))
    plain, ours = (everything(b, tokens(64, (4, 4)), (4, 4)) for b in (block, fused))
    assert seen == [(5, 16, 64)]
    assert torch.equal(ours["out"], plain["out"])
    hook.remove()
    everything(fused, tokens(64, (4, 4)), (4, 4))
    assert len(seen) == 1


def test_a_pass_by_the_plain_form_before_one_by_kernels():
    """As with masks, where the tokens that are left out are the plain form's."""
    _, fused = made(64, 2)
    x = tokens(64, (4, 4)).requires_grad_()
    left_out = torch.zeros(5, 16, dtype=torch.bool)
    (fused(x, (4, 4), left_out).sum() + fused(x, (4, 4)).sum()).backward()
    assert x.grad is not None


def test_it_keeps_less_for_the_backward_pass():
    block, fused = made(128, 4)
    x = tokens(128, (6, 6), images=32).requires_grad_()
    kept = {b: kept_bytes(lambda b=b: b(x, (6, 6))) for b in (block, fused)}
    assert kept[fused] < 0.8 * kept[block]


def test_second_derivatives_are_refused():
    _, fused = made(64, 2)
    x = tokens(64, (4, 4)).requires_grad_()
    (first,) = torch.autograd.grad(fused(x, (4, 4)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


BUILD = """
import logging
logging.basicConfig(level=logging.INFO)
from ssl_xcit.models.kernels import kernels
print("there" if kernels() is not None else "none")
"""


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "did not build")]
)
def test_without_a_compiler_the_plain_forms_run(compiler, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BUILD], capture_output=True, text=True, check=True,
        env={"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout == "none\n"
    assert said in done.stderr
    assert "slower plain forms" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_built_once_and_again_where_the_cache_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "env g++")  # a compiler of several words
    monkeypatch.setattr(room, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in room.FLAGS])
    assert kernels.__wrapped__() is not None
    assert "kernels built for this processor" in capsys.readouterr().out
    (built,) = (tmp_path / "ssl_xcit" / "kernels").iterdir()
    assert kernels.__wrapped__() is not None
    assert capsys.readouterr().out == ""
    elsewhere = tmp_path / "other" / "ssl_xcit" / "kernels" / built.name
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(b"cut short")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert kernels.__wrapped__() is not None
    assert "kernels built for this processor" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert room.cache_folder().is_relative_to(tmp_path)


def test_a_network_with_weights_of_another_type_takes_the_plain_form():
    block, fused = made(64, 2)
    x = tokens(64, (4, 4))
    assert applies(x, fused)
    fused.norm1.double()
    assert not applies(x, fused)
    assert not applies(x.double(), block)


def test_inference_on_many_tokens_makes_the_hidden_layer_by_parts(monkeypatch):
    _, fused = made(64, 2, training=False)
    x = tokens(64, (4, 4))
    with torch.inference_mode():
        at_once = fused(x, (4, 4))
        monkeypatch.setattr(xcit, "FEW_TOKENS", 8)
        by_parts = fused(x, (4, 4))
    assert torch.allclose(at_once, by_parts, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("patch", "dim", "size", "channels"),
    [(16, 128, (33, 47), 3), (8, 64, (32, 32), 4), (4, 32, (9, 8), 1)],
)
def test_the_stem_by_kernels_is_the_stem(patch, dim, size, channels, training):
    torch.manual_seed(0)
    stem = Stem(patch, channels, dim).train(training)
    for parameter in stem.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    fused = deepcopy(stem)
    fused.fused = True
    x = torch.randn(5, channels, *size)
    found = {}
    for name, one, like in (
        ("exact", deepcopy(stem).double(), x.double()),
        ("plain", stem, x),
        ("ours", fused, x),
    ):
        out = one(like)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        out.backward(weights.to(out.dtype))
        gradients = {n: p.grad for n, p in one.named_parameters()}
        found[name] = {"out": out.detach(), **gradients, **dict(one.named_buffers())}
    for name, value in found["exact"].items():
        scale = value.abs().max().clamp_min(1e-3)
        error = ((found["ours"][name] - value).abs().max() / scale).item()
        allowed = ((found["plain"][name] - value).abs().max() / scale).item()
        assert error < max(1e-5, 3 * allowed), (name, error, allowed)
    pixels = x.clone().requires_grad_()
    fused(pixels).sum().backward()  # the plain form's, which has this gradient
    assert pixels.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_near_and_far(dtype):
    """Far out exactly 0 and x: a BatchNorm behind dead channels would enlarge what is left."""
    x = torch.cat((torch.linspace(-9, 9, 4080), torch.tensor([-1e6, -5.01, 5.01, 1e6] * 4)))
    x, ours = x.to(dtype).view(-1, 64), torch.empty(64, 64, dtype=dtype)
    kernels()("bias_gelu", dtype, x, torch.zeros(64), 64, 64, ours)
    exact = torch.nn.functional.gelu(x.double())
    error = (ours.double() - exact).abs() / (1 + exact.abs())
    assert error.max() < (2e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(ours[x > 5], x[x > 5])
    assert not ours[x < -5].any()
