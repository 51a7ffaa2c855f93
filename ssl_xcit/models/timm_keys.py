"""Convert the names of XCiT's tensors between timm's and the published ones, which are ours."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

QKV = re.compile(r"(cls_attn_blocks\.\d+\.attn)\.(qkv|[qkv])\.(weight|bias)")


def from_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the published names: `pos_embed` is `pos_embeder`, and class
    attention's q, k and v are one.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        match = QKV.fullmatch(key)
        if match and match[2] != "qkv":
            stem, part, kind = match.groups()
            names = [f"{stem}.{letter}.{kind}" for letter in "qkv"]
            if all(name in state for name in names):
                if part == "q":
                    renamed[f"{stem}.qkv.{kind}"] = torch.cat([state[name] for name in names])
            else:
                renamed[key] = value  # strict loading will list it
        else:
            renamed[re.sub(r"^pos_embed\.", "pos_embeder.", key)] = value
    return renamed


def to_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names as timm's; the inverse of `from_timm_names`."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        match = QKV.fullmatch(key)
        if match and match[2] == "qkv":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{match[1]}.{letter}.{match[3]}"] = part.contiguous()
        else:
            renamed[re.sub(r"^pos_embeder\.", "pos_embed.", key)] = value
    return renamed
