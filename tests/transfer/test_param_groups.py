"""Parameter groups against timm's and a table written by hand; freezing."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.param_groups import freeze, transfer_groups


def make_task(depth=2, **options):
    return Classification(XCiT(16, depth, 2, patch_size=8, **options), list("abc"), size=16)


def by_name(task, groups):
    """(share of the learning rate, weight decay) of each parameter."""
    names = {parameter: name for name, parameter in task.named_parameters()}
    listed = [
        (names[parameter], (group["lr_scale"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    table = dict(listed)
    assert len(table) == len(listed)
    return table


TABLE = {  # layer from the top, decayed on ImageNet, decayed on COCO
    "backbone.patch_embed.proj.0.0.weight": (5, True, True),
    "backbone.patch_embed.proj.0.1.weight": (5, False, True),  # BatchNorm
    "backbone.pos_embeder.token_projection.weight": (5, False, True),
    "backbone.pos_embeder.token_projection.bias": (5, False, True),
    "backbone.cls_token": (5, False, True),
    "backbone.blocks.0.norm1.weight": (4, False, False),
    "backbone.blocks.0.attn.temperature": (4, True, True),
    "backbone.blocks.0.attn.qkv.weight": (4, True, True),
    "backbone.blocks.0.local_mp.bn.weight": (4, False, True),
    "backbone.blocks.0.gamma1": (4, False, True),
    "backbone.blocks.1.mlp.fc1.weight": (3, True, True),
    "backbone.blocks.1.mlp.fc1.bias": (3, False, True),
    "backbone.cls_attn_blocks.0.attn.proj.weight": (2, True, True),
    "backbone.cls_attn_blocks.1.norm1.bias": (1, False, False),
    "backbone.norm.weight": (1, False, False),
    "backbone.head.weight": (0, True, True),
    "backbone.head.bias": (0, False, True),
}


def test_the_table():
    task = make_task()
    published = by_name(task, transfer_groups(task, 0.05, 0.5, "1d"))
    dense = by_name(task, transfer_groups(task, 0.01, 0.5, "norm"))
    for name, (layer, on_imagenet, on_coco) in TABLE.items():
        assert published[name] == (0.5**layer, 0.05 * on_imagenet), name
        assert dense[name] == (0.5**layer, 0.01 * on_coco), name
    assert published.keys() == dense.keys() == dict(task.named_parameters()).keys()


def test_layers_and_decay_are_timms():
    theirs = timm.create_model("xcit_tiny_12_p16_224", depth=3, num_classes=5)
    groups = param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.7
    )
    task = Classification(XCiT(192, 3, 4, patch_size=16), list("abcde"), size=32)
    ours = by_name(task, transfer_groups(task, 0.05, 0.7, "1d"))
    numbers = {id(p): (group["lr_scale"], group["weight_decay"])
               for group in groups for p in group["params"]}  # fmt: skip
    table = {}
    for name, parameter in theirs.named_parameters():
        scale, decay = numbers[id(parameter)]
        for new in from_timm_names({name: torch.zeros(1)}):
            table[f"backbone.{new}"] = (scale, decay)
            # class attention's q, k and v are one layer of ours
            for letter in "qkv":
                table[f"backbone.{new}".replace(f".attn.{letter}.", ".attn.qkv.")] = (scale, decay)
    for name, (scale, decay) in ours.items():
        assert (scale, decay) == pytest.approx(table[name]), name


class Dense(Classification):
    """A task whose class attention has no part in it, with a neck in the backbone."""

    def __init__(self):
        super().__init__(XCiT(16, 2, 2, patch_size=8, num_classes=2), ["a", "b"])
        self.backbone.head = nn.Identity()
        self.backbone.fpn1 = nn.ConvTranspose2d(16, 16, 2, 2)
        self.backbone.cls_attn_blocks.requires_grad_(False)
        self.backbone.norm.requires_grad_(False)
        self.backbone.cls_token.requires_grad_(False)
        self.neck = nn.Conv2d(16, 8, 1)


def test_layers_of_a_dense_task():
    task = Dense()
    table = by_name(task, transfer_groups(task, 0.01, 0.9, "norm"))
    assert table["neck.weight"] == table["backbone.fpn1.weight"] == (1.0, 0.01)
    assert table["backbone.blocks.1.attn.qkv.weight"] == (0.9, 0.01)
    assert table["backbone.patch_embed.proj.0.0.weight"][0] == pytest.approx(0.9**3)
    assert not any("cls_attn" in name for name in table)


def test_groups_go_into_an_optimizer():
    task = make_task()
    groups = transfer_groups(task, 0.05, 0.75)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert all("lr_scale" in group for group in optimizer.param_groups)
    assert len(groups) == 2 * 6
    assert len(transfer_groups(task, 0.05)) <= len(groups)
    assert {group["lr_scale"] for group in transfer_groups(task, 0.05)} == {1.0}
    task.requires_grad_(False)
    task.backbone.head.requires_grad_(True)
    assert [g["lr_scale"] for g in transfer_groups(task, 0.05, 0.75)] == [1.0, 1.0]


def train_once(task, frozen):
    """A step of training; the names of what has moved."""
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.train()
    for module in frozen:
        module.eval()
    optimizer = torch.optim.SGD(transfer_groups(task, 0.0), lr=1.0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    sum(task.losses(images, torch.tensor([0, 1, 2, 0])).values()).backward()
    optimizer.step()
    after = task.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_only_the_head_is_trained():
    torch.manual_seed(0)
    task = make_task()
    moved = train_once(task, freeze(task, "head"))
    assert moved == {"backbone.head.weight", "backbone.head.bias"}


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_last_blocks_are_trained(blocks):
    torch.manual_seed(0)
    task = make_task()
    moved = train_once(task, freeze(task, blocks))
    prefixes = {".".join(name.split(".")[1:3]) for name in moved if ".blocks." in name}
    assert prefixes == {f"blocks.{i}" for i in range(2 - blocks, 2)}
    assert not any("patch_embed" in name or "pos_embeder" in name for name in moved)
    assert {"backbone.cls_token", "backbone.norm.weight", "backbone.head.weight"} <= moved
    trained = [name for name in task.state_dict() if name.startswith("backbone.blocks.1.")]
    if blocks:
        assert "backbone.blocks.1.local_mp.bn.running_mean" in moved
        assert len(moved & set(trained)) > len(trained) // 2


def test_nothing_is_frozen():
    torch.manual_seed(0)
    task = make_task()
    assert freeze(task, "none") == []
    assert "backbone.patch_embed.proj.0.1.running_mean" in train_once(task, [])


def test_the_neck_in_a_backbone_stays_trained():
    task = Dense()
    frozen = freeze(task, "head")
    assert [n for n, p in task.named_parameters() if p.requires_grad] == [
        "backbone.fpn1.weight", "backbone.fpn1.bias", "neck.weight", "neck.bias",
    ]  # fmt: skip
    assert all(not p.requires_grad for module in frozen for p in module.parameters())


def test_more_blocks_than_there_are():
    with pytest.raises(UserError, match="freeze=3: the backbone has 2 blocks; give 0 to 2"):
        freeze(make_task(), 3)
