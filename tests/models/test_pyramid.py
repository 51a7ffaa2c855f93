"""The feature pyramid against plain torch layers, written from the published configurations."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import conv_transpose2d, gelu, max_pool2d

from ssl_xcit import create_model, load_backbone
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import load_training
from ssl_xcit.models.xcit import XCiT, pyramid_taps
from ssl_xcit.training.init_weights import start_backbone
from ssl_xcit.transfer.backbone import with_layers

TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23), 4: (0, 1, 2, 3)}


def network(depth: int, patch: int, **settings) -> XCiT:
    torch.manual_seed(0)
    model = XCiT(16, depth, 2, patch, pyramid=True, **settings)
    with torch.no_grad():  # at the initial values a missing bias or statistic would not show
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model


def reference(model: XCiT, x: torch.Tensor) -> list[torch.Tensor]:
    """The four maps by hooks on the blocks and functions of torch, in the model's own mode."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        for block in model.blocks
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    rows, columns = (-(-side // model.patch_size) for side in x.shape[-2:])
    maps = [
        outputs[tap].mT.reshape(len(x), model.embed_dim, rows, columns)
        for tap in TAPS[len(model.blocks)]
    ]
    weights = model.state_dict(keep_vars=True)

    def up(image, name):
        return conv_transpose2d(image, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    if model.patch_size == 4:
        return [maps[0], *(max_pool2d(maps[i], 2**i) for i in (1, 2, 3))]
    if model.patch_size == 8:
        return [up(maps[0], "fpn1.0"), maps[1], max_pool2d(maps[2], 2), max_pool2d(maps[3], 4)]
    inside = up(maps[0], "fpn1.0")
    if model.training:
        mean, var = inside.mean((0, 2, 3)), inside.var((0, 2, 3), unbiased=False)
    else:
        mean, var = weights["fpn1.1.running_mean"], weights["fpn1.1.running_var"]
    shape = (1, -1, 1, 1)
    inside = (inside - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    inside = inside * weights["fpn1.1.weight"].view(shape) + weights["fpn1.1.bias"].view(shape)
    return [up(gelu(inside), "fpn1.3"), up(maps[1], "fpn2.0"), maps[2], max_pool2d(maps[3], 2)]


@pytest.mark.parametrize(
    ("depth", "patch", "size"),
    [
        (12, 16, (64, 96)), (12, 8, (64, 32)), (12, 4, (32, 48)), (24, 16, (65, 47)),
        (24, 8, (33, 71)), (4, 8, (50, 39)), (4, 4, (61, 35)), (12, 16, (97, 130)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("train", [False, True])
def test_maps_are_the_published_ones(depth, patch, size, train):
    model = network(depth, patch).train(train)
    x = torch.randn(2, 3, *size)
    maps = model.pyramid(x)
    grid = [-(-side // patch) for side in size]
    for found, wanted, stride in zip(maps, reference(model, x), (4, 8, 16, 32), strict=True):
        sides = [n * patch // stride for n in grid]
        assert found.shape == wanted.shape == (2, 16, *sides)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert pyramid_taps(depth) == TAPS[depth]


def test_only_what_is_tapped_is_computed_and_learns():
    model = network(12, 16)
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.append(name))
    maps = model.pyramid(torch.randn(2, 3, 64, 64))
    assert not any(name.startswith(("cls_attn", "norm")) for name in called)
    assert [n for n in called if n.count(".") == 1 and n.startswith("blocks.")] == [
        f"blocks.{i}" for i in range(12)
    ]
    sum(image.square().mean() for image in maps).backward()
    unused = ("cls_token", "cls_attn_blocks.", "norm.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(unused), name


def test_checkpointing_changes_no_gradient():
    model, x = network(4, 8), torch.randn(2, 3, 40, 64)
    gradients = []
    for again in (False, True):
        model.checkpoint_blocks = again
        model.zero_grad()
        statistics = model.blocks[0].local_mp.bn.num_batches_tracked.clone()
        sum(image.square().mean() for image in model.pyramid(x)).backward()
        assert model.blocks[0].local_mp.bn.num_batches_tracked == statistics + 1
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])


def test_without_layers_or_pixels_says_what_to_do():
    plain = XCiT(16, 2, 2)
    assert "pyramid" not in plain.architecture
    with pytest.raises(UserError, match="pyramid=True"):
        plain.pyramid(torch.zeros(1, 3, 64, 64))
    for patch in (4, 8, 16):
        with pytest.raises(UserError, match="at least 32 pixels"):
            network(4, patch).pyramid(torch.zeros(1, 3, 16, 64))
        network(4, patch).eval().pyramid(torch.zeros(1, 3, 32, 32))


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_weights_round_trip(tmp_path, patch):
    model = network(4, patch, num_classes=5)
    model.preprocess = {"channels": 3}
    state = {f"student.backbone.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "architecture": model.architecture}, tmp_path / "w.ckpt")
    loaded = load_backbone(tmp_path / "w.ckpt", "student")
    assert loaded.architecture == model.architecture
    assert loaded.architecture["pyramid"] is True
    assert same(loaded, model)
    if patch > 4:  # whose layers have no weights
        torch.save(model.state_dict(), tmp_path / "w.pth")
        assert same(load_backbone(tmp_path / "w.pth"), model)
        assert load_backbone(tmp_path / "w.pth").architecture["pyramid"] is True
        del state["student.backbone.fpn1.0.weight"]
        torch.save({"state_dict": state, "architecture": model.architecture}, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match=r"missing fpn1\.0\.weight"):
            load_backbone(tmp_path / "w.ckpt", "student")


@pytest.mark.parametrize("patch", [8, 16])
def test_published_detectors_load(tmp_path, caplog, patch):
    """Their backbones have no class attention, and lie beside neck and heads."""
    model = create_model(f"xcit_nano_12_p{patch}", pyramid=True)
    state = {
        f"backbone.{key}": torch.rand_like(value) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if not key.startswith(("cls_token", "cls_attn_blocks.", "norm."))
    }
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(2, 2, 1, 1)
    state["rpn_head.rpn_conv.weight"] = torch.zeros(2, 2, 3, 3)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "d.pth")
    with caplog.at_level(logging.WARNING):
        loaded = load_backbone(tmp_path / "d.pth")
    assert "no class attention" in caplog.text
    assert loaded.architecture == model.architecture
    own = loaded.state_dict()
    for key, value in state.items():
        if key.startswith("backbone."):
            assert torch.equal(own[key.removeprefix("backbone.")], value), key
    partial = {**state, "backbone.norm.weight": torch.ones(128)}
    torch.save({"state_dict": partial}, tmp_path / "d.pth")
    with pytest.raises(UserError, match="cls_token"):  # no published file, but a damaged one
        load_backbone(tmp_path / "d.pth")


def test_layers_are_added_kept_and_removed():
    plain = XCiT(16, 4, 2, 8, num_classes=5)
    plain.preprocess = {"channels": 3, "mean": [0.1, 0.2, 0.3]}
    dense = with_layers(plain, pyramid=True, num_classes=5, drop_path=0.25)
    assert dense.preprocess == plain.preprocess
    assert dense.architecture == {**plain.architecture, "pyramid": True}
    assert torch.equal(dense.head.weight, plain.head.weight)
    assert dense.blocks[3].drop_path.rate == 0.25
    other = with_layers(dense, num_classes=7)
    assert "pyramid" not in other.architecture
    assert other.head.weight.shape == (7, 16)
    again = with_layers(dense, pyramid=True)
    assert torch.equal(again.fpn1[0].weight, dense.fpn1[0].weight)
    for model in (dense, other, again):
        own = model.state_dict()
        for key, value in plain.state_dict().items():
            assert key.startswith("head.") or torch.equal(own[key], value), key


def test_pretraining_goes_on_from_a_detectors_backbone(tmp_path):
    model = network(4, 8)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    plain = XCiT(16, 4, 2, 8)
    start_backbone(plain, load_training(tmp_path / "w.pth"), Preprocess(), "w.pth")
    assert same(plain, with_layers(model))
