"""The projection head against torch's own weight normalisation."""

import torch

from ssl_xcit.models.head import DINOHead


def test_prototypes_are_weight_normalised():
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8, norm_last_layer=False)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2.0)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 20, bias=False))
    reference.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    reference.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    x = torch.randn(3, 5, 12)
    hidden = head.mlp(x)
    expected = reference(hidden / hidden.norm(dim=-1, keepdim=True))
    assert torch.allclose(head(x), expected, atol=1e-6)

    direction, layer = torch.randn_like(expected), head.last_layer
    ours = torch.autograd.grad((head(x) * direction).sum(), [layer.weight_g, layer.weight_v])
    theirs = torch.autograd.grad((expected * direction).sum(), [*reference.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_float32():
    torch.manual_seed(0)
    head, x = DINOHead(12, 20, 16, 8), torch.randn(4, 12)
    exact = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(x)
        rounded.square().sum().backward()
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.02)
    assert head.last_layer.weight_v.grad.dtype == torch.float32


def test_gain_is_frozen_at_one_by_default():
    head = DINOHead(12, 20, 16, 8)
    assert not head.last_layer.weight_g.requires_grad
    assert (head.last_layer.weight_g == 1).all()
    assert head(torch.randn(4, 12)).abs().max() <= 1.0 + 1e-5  # cosines
