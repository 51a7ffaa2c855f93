"""Masked patches against loops over images, heads, channels and tokens in float64."""

from copy import deepcopy

import pytest
import torch
from numerics import relative

from ssl_xcit.errors import UserError
from ssl_xcit.models import xca
from ssl_xcit.models.xca import CrossCovarianceAttention
from ssl_xcit.models.xcit import XCiT

FORMS = ("by head", "formula", "gram")
EPS = 1e-12


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each way to compute channel attention, wherever it is used."""
    monkeypatch.setattr(xca, "gram_is_faster", lambda *_: request.param == "gram")
    if request.param == "formula":  # that of GPUs and compiled programs
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


def attention_by_loops(attn, x, weights):
    """sum_j softmax_j(sum_m w_m q_mi k_mj / (|q_i| |k_j|) * temperature) v_nj of each token n, with
    |q_i|^2 = sum_m w_m q_mi^2 and norms of EPS at least.
    """
    B, N, C = x.shape
    d = C // attn.num_heads
    images = []
    for b in range(B):
        qkv = [attn.qkv.weight @ x[b, n] + attn.qkv.bias for n in range(N)]
        mixed = [[] for _ in range(N)]
        for h in range(attn.num_heads):
            for i in range(h * d, (h + 1) * d):
                cosines = []
                for j in range(C + h * d, C + (h + 1) * d):
                    product, q_square, k_square = (
                        sum(weights[b, m] * qkv[m][one] * qkv[m][other] for m in range(N))
                        for one, other in ((i, j), (i, i), (j, j))
                    )
                    norms = [s.clamp_min(EPS**2).sqrt() for s in (q_square, k_square)]
                    cosines.append(product / (norms[0] * norms[1]))
                row = (torch.stack(cosines) * attn.temperature[h, 0, 0]).softmax(0)
                for n in range(N):
                    v = qkv[n][2 * C + h * d : 2 * C + (h + 1) * d]
                    mixed[n].append((row * v).sum())
        out = [attn.proj.weight @ torch.stack(of_token) + attn.proj.bias for of_token in mixed]
        images.append(torch.stack(out))
    return torch.stack(images)


def randomise_(module):
    """Values at which a missing bias, gain or statistic shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.4).add_(float(parameter.ndim == 1))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return module


def some_mask(*shape):
    """Image by image: none, some, all but one and all tokens."""
    mask = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0], mask[2], mask[3] = False, True, True
    mask.flatten(1)[2, 1] = False
    assert 0 < mask[1].sum() < mask[1].numel()
    return mask


def network(depth=2, **settings):
    return randomise_(XCiT(8, depth, 2, patch_size=4, **settings))


def test_attention_is_the_weighted_sum(form):
    """Output and all gradients, with images of which no token or every one is masked."""
    attn = randomise_(CrossCovarianceAttention(6, 2)).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    mask, inputs = some_mask(5), [x, *attn.parameters()]
    ours, loops = attn(x, None, mask), attention_by_loops(attn, x, (~mask).double())
    assert torch.allclose(ours, loops, rtol=1e-9, atol=1e-11)
    gradients, expected = (torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, loops))
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


def test_statistics_do_not_depend_on_masked_tokens(form):
    attn, mask = randomise_(CrossCovarianceAttention(8, 2)), some_mask(7)
    x = torch.randn(4, 7, 8)
    seen = attn(x, None, mask)[~mask]
    for other in (1e3 * torch.randn(4, 7, 8), torch.full((4, 7, 8), torch.nan)):
        changed = torch.where(mask[..., None], other, x)
        assert torch.allclose(attn(changed, None, mask)[~mask], seen, rtol=1e-5, atol=1e-6)
    changed = torch.where(mask[..., None], torch.randn(4, 7, 8), x)
    assert relative(attn(changed)[~mask], attn(x)[~mask]) > 1e-2  # otherwise they do


@pytest.mark.parametrize("exclude_masked", [False, True])
def test_forward_is_written_out(exclude_masked):
    """Stem, token, position, blocks, one after another; gradients of token and weights as well."""
    model = network(1).double().eval()
    x, mask = torch.randn(4, 3, 8, 12, dtype=torch.float64), some_mask(2, 3)
    token = torch.randn(8, dtype=torch.float64, requires_grad=True)
    stem, position = model.patch_embed(x), model.pos_embeder((2, 3))[0]
    images = []
    for b in range(4):
        places = [(row, column) for row in range(2) for column in range(3)]
        tokens = [token if mask[b, r, c] else stem[b, :, r, c] for r, c in places]
        images.append(torch.stack(tokens) + position)
    y, (block,) = torch.stack(images), model.blocks
    weights = 1.0 - mask.flatten(1).double() * exclude_masked
    y = y + block.gamma1 * attention_by_loops(block.attn, block.norm1(y), weights)
    y = y + block.local_mp(block.norm3(y), (2, 3), torch.ones_like(block.gamma3)) * block.gamma3
    y = y + block.gamma2 * block.mlp(block.norm2(y))
    cls = model.cls_token.expand(4, 1, 8)
    for block in model.cls_attn_blocks:
        cls, y = block(cls, y)
    expected = (model.norm(cls[:, 0]), model.norm(y).mT.unflatten(-1, (2, 3)))
    ours = model.forward_features(x, mask, token, exclude_masked)
    inputs = [token, *model.parameters()]
    gradients = []
    for features in (ours, expected):
        loss = sum(feature.sin().sum() for feature in features)
        gradients.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for a, b in zip((*ours, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("exclude_masked", [False, True])
def test_what_the_stem_has_at_masked_patches_is_not_seen(exclude_masked):
    model, mask, token = network().eval(), some_mask(3, 4), torch.randn(8)
    x, noise = torch.randn(4, 3, 12, 16), torch.randn(4, 8, 3, 4)
    before = model.forward_features(x, mask, token, exclude_masked)
    model.patch_embed.register_forward_hook(lambda _, args, out: out + mask[:, None] * noise)
    after = model.forward_features(x, mask, token, exclude_masked)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(model.forward_features(x).cls, before.cls)


def test_without_local_interaction_seen_tokens_ignore_the_mask_token(form):
    model, mask, x = network().eval(), some_mask(3, 4), torch.randn(4, 3, 12, 16)
    for block in model.blocks:
        torch.nn.init.zeros_(block.gamma3)
    seen = ~mask.flatten(1)
    for exclude_masked in (True, False):
        one, two = (
            model.patch_tokens(x, mask, token, exclude_masked)[0][seen]
            for token in (torch.randn(8), 9.0 * torch.randn(8))
        )
        assert (relative(one, two) < 1e-5) == exclude_masked


def test_a_mask_of_nothing_changes_nothing():
    """In training with stochastic depth too, whose draws stay the same."""
    model, x = network(3, drop_path=0.5), torch.randn(6, 3, 12, 16)
    nothing, token = torch.zeros(6, 3, 4, dtype=torch.bool), torch.randn(8)
    outputs = []
    for arguments in ((), (nothing, token, False), (nothing, token, True)):
        torch.manual_seed(1)
        outputs.append(model.forward_features(x, *arguments))
    for plain, same, excluding in zip(*outputs, strict=True):
        assert torch.equal(same, plain)
        assert torch.allclose(excluding, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_images_that_are_masked_altogether(form, low):
    model, x = network(), torch.randn(2, 3, 12, 16)
    everything, token = torch.ones(2, 3, 4, dtype=torch.bool), torch.randn(8, requires_grad=True)
    for exclude_masked in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            cls, patches = model.forward_features(x, everything, token, exclude_masked)
        (cls.float().sin().sum() + patches.float().sin().sum()).backward()
        assert cls.isfinite().all()
        assert patches.isfinite().all()
        assert all(p.grad.isfinite().all() for p in (token, *model.parameters()))


@pytest.mark.parametrize("exclude_masked", [False, True])
def test_recomputed_blocks_are_the_same_step(exclude_masked):
    plain = network(3, drop_path=0.4)
    again = deepcopy(plain)
    again.checkpoint_blocks = True
    x, mask, steps = torch.randn(4, 3, 12, 16), some_mask(3, 4), []
    for model in (plain, again):
        torch.manual_seed(1)
        token = torch.ones(8, requires_grad=True)
        cls, patches = model.forward_features(x, mask, token, exclude_masked)
        (cls.square().sum() + patches.square().sum()).backward()
        step = {name: p.grad for name, p in model.named_parameters()}
        step |= {"cls": cls, "patches": patches, "token": token.grad, "next": torch.rand(3)}
        steps.append(step | dict(model.named_buffers()))
    for name, value in steps[0].items():
        assert torch.equal(steps[1][name], value), name


def test_a_mask_that_does_not_fit_says_what_is_needed():
    model, x = network(), torch.randn(4, 3, 12, 16)
    with pytest.raises(UserError, match="mask_token"):
        model.forward_features(x, some_mask(3, 4))
    with pytest.raises(UserError, match=r"\(4, 4, 3\).* \(4, 3, 4\)"):
        model.patch_tokens(x, some_mask(4, 3), torch.randn(8))
