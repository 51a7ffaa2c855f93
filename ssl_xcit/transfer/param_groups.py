"""Which parameters are trained, how fast, and with which weight decay."""

import re
from typing import Any, Literal

from torch import nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.validation import NonNegative

NoDecay = Literal["1d", "norm"]
Freeze = Literal["none", "head"] | int
FRESH = re.compile(r"head|fpn\d")  # parts of a backbone that pretraining does not give


def transfer_groups(
    task: Task, weight_decay: NonNegative, layer_decay: float = 1.0, no_decay: NoDecay = "1d"
) -> list[dict[str, Any]]:
    """Return groups of trained parameters for an optimizer, each with `weight_decay` and
    `lr_scale`, the share of the learning rate that it gets.

    Args:
        task: its `backbone.` parameters have layers, all others `lr_scale` 1.
        weight_decay: of the parameters that are decayed.
        layer_decay: by how much the learning rate shrinks from one layer to that below (BEiT,
            arXiv:2106.08254): layer 0 is the stem, the position code and the class token, then come
            the blocks and the two class-attention blocks (the final norm is in the last), then
            everything that is new. Class attention counts only where it is trained.
        no_decay: `1d`, as XCiT on ImageNet: one-dimensional parameters, biases, the class token and
            the position code are not decayed (XCA's temperature is). `norm`, as XCiT on COCO and
            ADE20k: only those with `norm` in their name are not.
    """
    depth = task.backbone.architecture["depth"]
    assert isinstance(task, nn.Module)
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    layers = [layer_of(name, depth) for name, _ in named]
    last = 1 + max((layer for layer in layers if layer is not None), default=-1)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for (name, parameter), layer in zip(named, layers, strict=True):
        key = last if layer is None else layer, is_decayed(name, parameter, no_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[layer, decayed],
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": layer_decay ** (last - layer),
        }
        for layer, decayed in sorted(groups)
    ]


def layer_of(name: str, depth: int) -> int | None:
    """Return the layer of a parameter of a task by its name; None: it is of no pretrained layer."""
    words = name.split(".")
    if words[0] != "backbone" or FRESH.fullmatch(words[1]):
        return None
    if words[1] == "blocks":
        return 1 + int(words[2])
    if words[1] == "cls_attn_blocks":
        return 1 + depth + int(words[2])
    return 2 + depth if words[1] == "norm" else 0


def is_decayed(name: str, parameter: nn.Parameter, no_decay: NoDecay) -> bool:
    """Whether a parameter has weight decay, see `transfer_groups`."""
    if no_decay == "norm":
        return "norm" not in name
    placed = ".cls_token" in name or ".pos_embeder." in name
    return parameter.ndim > 1 and not name.endswith("bias") and not placed


def freeze(task: Task, trained: Freeze) -> list[nn.Module]:
    """Stop the training of a part of the backbone, and return the modules that have to stay in eval
    mode: call `.eval()` of each whenever the task was put into training mode, or the running
    statistics of their BatchNorm move.

    Args:
        task: its head and all that is not in the backbone are trained anyway, and so are the
            backbone's own `head` and `fpn1` to `fpn4`.
        trained: `none` freezes nothing; `head` all of the backbone; a number n all but the last n
            XCA blocks and class attention.

    Raises:
        UserError: more blocks than there are.
    """
    backbone: XCiT = task.backbone
    depth = len(backbone.blocks)
    if trained == "none":
        return []
    if isinstance(trained, int) and not 0 <= trained <= depth:
        raise UserError(
            f"freeze={trained}: the backbone has {depth} blocks; give 0 to {depth}, none or head"
        )
    if trained == "head":
        frozen = [child for name, child in backbone.named_children() if not FRESH.fullmatch(name)]
        backbone.cls_token.requires_grad_(False)
    else:
        stem = [backbone.patch_embed, backbone.pos_embeder]
        frozen = [*stem, *backbone.blocks[: depth - int(trained)]]
    for module in frozen:
        module.requires_grad_(False).eval()
    return frozen
