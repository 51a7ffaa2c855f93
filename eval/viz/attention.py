"""Class attention: maps of what the class token attends to, in both blocks, at any image size.

Class attention of XCiT (arXiv:2106.09681, section 3.3; CaiT, arXiv:2103.17239): a row of M = 1 + N
weights a head, the first on the class token itself. Maps are made as DINO shows them
(arXiv:2104.14294, figure 1). Differs: XCiT has two such blocks and both are given; the image keeps
its size and shape. Time and memory grow linearly with the number of patches, for only the class
token asks.
"""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from ssl_xcit.models.class_attention import ClassAttentionBlock
from ssl_xcit.models.xcit import XCiT, as_image
from ssl_xcit.utils.validation import Words

from ..tasks.attention_jaccard import largest
from .pictures import BRIGHTEST, Drawn, Picture, blocky, enlarged, highlighted, overlay, stretched

Block = Annotated[int, Ge(1), Le(2), Words("1 or 2, of the two class-attention blocks")]


class AttentionPass(NamedTuple):
    """Class attention and patch features of B images, from one pass through a backbone."""

    attention: Float[Tensor, "B blocks H h w"]  # of the class token on the patches
    on_class_token: Float[Tensor, "B blocks H"]  # its weight on itself: with the map it sums to 1
    patches: Float[Tensor, "B C h w"]  # patch features after the last norm


def forward(backbone: XCiT, x: Float[Tensor, "B channels H W"]) -> AttentionPass:
    """Class attention of every block, and the patch features, in one pass."""
    tokens, grid = backbone.patch_tokens(x)
    cls = backbone.cls_token.expand(len(x), -1, -1)
    rows = []
    for block in backbone.cls_attn_blocks:
        assert isinstance(block, ClassAttentionBlock)
        rows.append(block.attn.weights(block.normed(cls, tokens)))
        cls, tokens = block(cls, tokens)
    weights = torch.stack(rows, dim=1).float()  # (B, blocks, H, M)
    patches = as_image(backbone.norm(tokens), grid).float()
    return AttentionPass(weights[..., 1:].unflatten(-1, grid), weights[..., 0], patches)


def peak(maps: Float[Tensor, "*maps h w"]) -> Float[Tensor, "*maps"]:
    """The largest weight over the mean weight: 1 where a map is flat, N where it is one patch."""
    return maps.amax(dim=(-2, -1)) / maps.mean(dim=(-2, -1)).clamp_min(1e-30)


def attention_pictures(
    picture: Picture, heads: Float[Tensor, "H h w"], mass: float, strength: float
) -> Iterator[Drawn]:
    """Colours over the picture, and the mask of the share `mass`, of the heads' mean and each."""
    heads = heads.cpu()
    maps = torch.cat((heads.mean(dim=0, keepdim=True), heads))  # (H + 1, h, w)
    masks, peaks = largest(maps, mass), peak(maps)
    height, width, _ = picture.shape
    for number, values in enumerate(maps.numpy()):
        title = f"head {number}" if number else "mean of the heads"
        name = f"head-{number}" if number else "mean"
        scaled = stretched(values, float(values.min()), float(np.quantile(values, BRIGHTEST)))
        colours = overlay(picture, enlarged(scaled, height, width), strength)
        yield Drawn("Class attention", f"{title}, peak {peaks[number]:.3g}", f"map-{name}", colours)
        mask = blocky(masks[number].numpy().astype(np.uint8), height, width) > 0
        title = f"{title}, {masks[number].double().mean():.0%} of the area"
        yield Drawn("Attention masks", title, f"mask-{name}", highlighted(picture, mask))
