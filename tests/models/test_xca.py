"""The two forms of cross-covariance attention are one function."""

from functools import partial

import numpy as np
import pytest
import torch
from numerics import kept_bytes, with_gradients

from ssl_xcit.models import xca
from ssl_xcit.models.xca import ChannelMixing, CrossCovarianceAttention, Gram, gram_is_faster


def layer(dim, heads, seed=0):
    torch.manual_seed(seed)
    made = CrossCovarianceAttention(dim, heads)
    torch.nn.init.normal_(made.qkv.bias, std=0.3)
    torch.nn.init.normal_(made.proj.bias, std=0.3)
    torch.nn.init.uniform_(made.temperature, 0.5, 2.0)
    return made


def both(made, x):
    return direct_form(made, x), gram_form(made, x)


def direct_form(made, x):
    return made.direct(x, made.proj.weight, made.proj.bias)


def gram_form(made, x):
    return xca.from_gram(x, made.qkv, made.temperature, made.proj.weight, made.proj.bias)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("seed", range(12))
def test_forms_agree_over_shapes_and_scales(seed):
    """Output and all gradients against the direct form in float64."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4]))
    dim, tokens, images = heads * int(rng.choice([4, 8, 24])), int(rng.integers(1, 300)), 3
    scale = float(10.0 ** rng.uniform(-3, 3))
    made = layer(dim, heads, seed)
    x = (scale * torch.randn(images, tokens, dim)).requires_grad_()
    exact, x64 = made.double(), x.detach().double().requires_grad_()
    weights = torch.randn(images, tokens, dim, dtype=torch.float64)
    expected = direct_form(exact, x64)
    wanted = torch.autograd.grad((expected * weights).sum(), [x64, *exact.parameters()])
    made = made.float()
    direct, gram = both(made, x)
    assert relative(gram.double(), expected) < 2e-5
    assert relative(gram.double(), expected) < 10 * relative(direct.double(), expected) + 1e-6
    ours = torch.autograd.grad((gram * weights.float()).sum(), [x, *made.parameters()])
    plain = torch.autograd.grad((direct * weights.float()).sum(), [x, *made.parameters()])
    for a, b, c in zip(ours, plain, wanted, strict=True):
        assert relative(a.double(), c) < 20 * relative(b.double(), c) + 2e-4


def mixing(qkv, temperature):
    """The formula as autograd has it, and as GPUs and compiled programs run it."""
    B, N, C = qkv.shape
    q, k, v = qkv.view(B, N, 3, len(temperature), -1).permute(2, 0, 3, 4, 1)
    mixed = v.mT @ xca.channel_attention(q, k, temperature).mT
    return mixed.transpose(1, 2).reshape(B, N, C // 3)


@pytest.mark.parametrize("seed", range(6))
def test_mixing_by_head_is_the_formula(seed):
    rng = np.random.default_rng(seed)
    H, d, N = (int(rng.integers(1, top)) for top in (5, 9, 40))
    torch.manual_seed(seed)
    scale = 10.0 ** rng.uniform(-3, 3)
    qkv = (scale * torch.randn(3, N, 3 * H * d, dtype=torch.float64)).requires_grad_()
    temperature = (torch.rand(H, 1, 1, dtype=torch.float64) + 0.5).requires_grad_()
    weights = torch.randn(3, N, H * d, dtype=torch.float64)
    ours, plain = (
        with_gradients(partial(form, qkv, temperature), [qkv, temperature], weights)
        for form in (ChannelMixing.apply, mixing)
    )
    assert all(relative(a, b) < 1e-11 for a, b in zip(ours, plain, strict=True))
    few = (qkv[:1, :4] / scale).detach().requires_grad_()
    assert torch.autograd.gradcheck(ChannelMixing.apply, (few, temperature))


@pytest.mark.parametrize("seed", range(3))
def test_mixing_by_head_rounds_no_worse_in_bfloat16(seed):
    torch.manual_seed(seed)
    qkv, weights = torch.randn(2, 50, 48), torch.randn(2, 50, 16)
    temperature = torch.ones(2, 1, 1)

    def gradient(form, x):
        x, low = x.detach().requires_grad_(), x.dtype == torch.bfloat16
        return with_gradients(lambda: form(x, temperature), [x], weights, low)[1]

    exact = gradient(mixing, qkv)
    ours, plain = (gradient(form, qkv.bfloat16()) for form in (ChannelMixing.apply, mixing))
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), exact) < 1.2 * relative(plain.float(), exact) + 1e-3


def agree(made, x, bound):
    x = x.clone().requires_grad_()
    direct, gram = both(made, x)
    assert relative(gram, direct) < bound
    gram.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_constant_tokens_zero_tokens_and_one_token(tokens):
    for value in (torch.ones(1, 1, 16), torch.zeros(1, 1, 16), torch.randn(1, 1, 16) * 1e3):
        agree(layer(16, 2), value.expand(2, tokens, 16), 1e-4)


def test_a_dead_channel_attends_evenly_in_both():
    """A channel whose query is zero everywhere: norms of zero are divided by in neither form."""
    made = layer(16, 2)
    with torch.no_grad():
        made.qkv.weight[[0, 16]] = 0.0  # one of q, one of k
        made.qkv.bias[[0, 16]] = 0.0
    agree(made, torch.randn(2, 30, 16), 1e-5)


def test_gradients_of_the_gram_form(monkeypatch):
    monkeypatch.setattr(xca, "gram_is_faster", lambda *_: True)
    made = layer(6, 2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(made(x), gram_form(made, x))
    assert torch.autograd.gradcheck(Gram.apply, (x,))
    names = [name for name, _ in made.named_parameters()]

    def form(x, *parameters):
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(form, (x, *made.parameters()))


def test_autocast_rounds_no_worse_than_the_direct_form():
    made = layer(64, 4)
    x = torch.randn(2, 400, 64)
    with torch.no_grad():
        expected = direct_form(made, x)
        with torch.autocast("cpu", torch.bfloat16):
            direct, gram = both(made, x)
    assert gram.dtype == torch.bfloat16
    assert relative(gram.float(), expected) < 1.5 * relative(direct.float(), expected) + 1e-3


def test_only_what_is_needed_is_kept_for_the_backward_pass():
    """x once, and C x C things: a fraction of what the direct form keeps."""
    made, x = layer(32, 4), torch.randn(2, 2000, 32, requires_grad=True)
    assert kept_bytes(lambda: gram_form(made, x)) < 1.5 * x.nbytes
    assert kept_bytes(lambda: direct_form(made, x)) > 4 * x.nbytes


def test_the_choice_is_by_size():
    cpu = torch.device("cpu")
    assert gram_is_faster(3136, 192, True, False, cpu)
    assert not gram_is_faster(196, 384, True, False, cpu)
    assert not gram_is_faster(36, 128, False, True, cpu)
    assert not gram_is_faster(10**6, 128, True, False, torch.device("meta"))
    made = layer(32, 4)
    x = torch.randn(1, 1000, 32)
    assert torch.equal(made(x), gram_form(made, x))
    assert torch.equal(made(x[:, :20]), direct_form(made, x[:, :20]))
