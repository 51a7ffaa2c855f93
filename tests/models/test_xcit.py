"""XCiT against timm's, which is written independently."""

import re
from functools import partial

import pytest
import timm
import torch
from numerics import relative, with_gradients

from ssl_xcit import create_model
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.models.xcit import SIZES, Stem, XCiT

PUBLISHED = [f"xcit_{size}_p{patch}" for size in SIZES for patch in (16, 8)]
PARAMETERS = {"xcit_small_12_p16": 25_868_304, "xcit_medium_24_p16": 83_882_752}


def randomise_(model: torch.nn.Module) -> None:
    """All values, for at the initial ones a missing bias, gain or statistic would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.1, 0.5)
            elif "temperature" in name:
                parameter.uniform_(0.5, 3.0)
            elif parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            else:
                assert name.endswith("num_batches_tracked"), name
                buffer.zero_()


def pair(name: str, depth: int | None = None) -> tuple[XCiT, torch.nn.Module]:
    torch.manual_seed(0)
    with torch.device("meta"):  # initial values of the large ones take half a minute
        architecture = create_model(name).architecture
        depth = architecture["depth"] if depth is None else depth
        theirs = timm.create_model(f"{name}_224", num_classes=0, depth=depth)
        ours = XCiT(**{**architecture, "depth": depth})
    randomise_(theirs.to_empty(device="cpu"))
    ours.to_empty(device="cpu")
    ours.load_state_dict(from_timm_names(theirs.state_dict()), strict=True)
    return ours, theirs


SMALL = ("xcit_nano_12_p16", "xcit_tiny_12_p8", "xcit_small_12_p16")


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        *((name, 2) for name in PUBLISHED),
        *(pytest.param(n, None, marks=() if n in SMALL else pytest.mark.slow) for n in PUBLISHED),
    ],
)
def test_agrees_with_timm(name, depth):
    ours, theirs = pair(name, depth)
    size = 32 if name.endswith("p8") else 64
    for train in (False, True):
        ours.train(train), theirs.train(train)
        x, direction = torch.randn(2, 3, size, size), torch.randn(2, ours.embed_dim)
        x.requires_grad_()
        both = [with_gradients(partial(model, x), [x], direction) for model in (ours, theirs)]
        assert all(relative(a, b) < 1e-5 for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p8"])
def test_agrees_with_timm_at_odd_sizes(name):
    ours, theirs = pair(name)
    ours.eval(), theirs.eval()
    patch = ours.patch_size
    for size in ((97, 97), (128, 192), (33, 71)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            features = ours.forward_features(x)
            tokens = theirs.forward_features(x)
            assert relative(ours(x), features.cls) < 1e-6
        grid = (-(-size[0] // patch), -(-size[1] // patch))
        assert features.patches.shape == (2, ours.embed_dim, *grid)
        assert relative(features.cls, tokens[:, 0]) < 1e-5
        assert relative(features.patches.flatten(2).mT, tokens[:, 1:]) < 1e-5


def test_parameter_gradients_agree_with_timm():
    ours, theirs = pair("xcit_nano_12_p8")
    x = torch.randn(3, 3, 48, 64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = from_timm_names({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-4, name


def test_attention_is_the_published_softmax():
    """Recomputed from the input of the last class-attention layer, with the full N + 1 queries."""
    ours, _ = pair("xcit_tiny_12_p16")
    ours.eval()
    inputs, layer = [], ours.cls_attn_blocks[-1]
    layer.norm1.register_forward_hook(lambda module, args, out: inputs.append(out.detach()))
    x = torch.randn(2, 3, 64, 96)
    maps = ours.attention(x)
    C, heads = ours.embed_dim, layer.attn.num_heads
    qkv = inputs[0] @ layer.attn.qkv.weight.T + layer.attn.qkv.bias
    q, k, _ = qkv.split(C, dim=-1)
    for head in range(heads):
        d = slice(head * C // heads, (head + 1) * C // heads)
        full = (q[..., d] @ k[..., d].mT / (C // heads) ** 0.5).softmax(-1)  # (B, N + 1, N + 1)
        assert torch.allclose(maps[:, head].flatten(1), full[:, 0, 1:], atol=1e-6)
    assert maps.shape == (2, heads, 4, 6)
    assert (maps.sum((-2, -1)) < 1).all()


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == count


def test_patch_4_of_each_size():
    with torch.device("meta"):
        x = torch.empty(2, 5, 32, 28)
        for dim in {size[0] for size in SIZES.values()}:
            assert Stem(4, 5, dim)(x).shape == (2, dim, 8, 7)
        features = create_model("xcit_nano_12_p4", in_chans=5).forward_features(x)
    assert features.cls.shape == (2, 128)
    assert features.patches.shape == (2, 128, 8, 7)


def test_gains_in_the_weights_are_gains_of_the_output():
    """Layer scale multiplies the last layer of a branch instead of its output."""
    torch.manual_seed(0)
    model = XCiT(32, 1, 2, patch_size=4, layer_scale=0.3).double()
    block, x = model.blocks[0], torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)

    def written_out(x, grid):
        x = x + block.gamma1 * block.attn(block.norm1(x))
        local = block.local_mp(block.norm3(x), grid, torch.ones_like(block.gamma3))
        x = x + block.gamma3 * local
        return x + block.gamma2 * block.mlp(block.norm2(x))

    ours, theirs = (
        torch.autograd.grad(form(x, (3, 4)).sin().sum(), [x, *block.parameters()])
        for form in (block, written_out)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("xcit_giant_12_p16"), "xcit_large_24"),
        (lambda: create_model("xcit_small_12_p32"), "_p16"),
        (lambda: XCiT(130, 2, 4), "multiple of 8"),
        (lambda: XCiT(136, 2, 3, patch_size=8), "num_heads=3"),
    ],
)
def test_bad_arguments_name_the_fix(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
