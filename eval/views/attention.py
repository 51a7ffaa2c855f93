"""Where the class token looks: attention maps of both class-attention blocks, at any image size.

Class attention of XCiT (arXiv:2106.09681, section 3.3; CaiT, arXiv:2103.17239): a row of M = 1 + N
weights a head, the first on the class token itself. Maps are made as DINO shows them
(arXiv:2104.14294, figure 1). Differs: XCiT has two such blocks and both are given; the image keeps
its size and shape. Time and memory grow linearly with the number of patches, for only the class
token asks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_xcit.models.class_attention import ClassAttentionBlock
from ssl_xcit.models.xcit import XCiT, as_image

from ..attention_masks import largest
from .pictures import Drawn, Picture, blocky, enlarged, highlighted, overlay, stretched

BRIGHTEST = 0.995  # quantile of a map that gets the last colour


class Looked(NamedTuple):
    """What one pass through a backbone shows of B images."""

    attention: Float[Tensor, "B blocks H h w"]  # of the class token on the patches
    itself: Float[Tensor, "B blocks H"]  # its weight on itself: with the map this sums to 1
    patches: Float[Tensor, "B C h w"]  # patch features after the last norm


def look(backbone: XCiT, x: Float[Tensor, "B channels H W"]) -> Looked:
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
    return Looked(weights[..., 1:].unflatten(-1, grid), weights[..., 0], patches)


def with_mean(heads: Float[Tensor, "H h w"]) -> Float[Tensor, "maps h w"]:
    """The mean over the heads first, then the heads: H + 1 maps."""
    return torch.cat((heads.mean(dim=0, keepdim=True), heads))


def peak(maps: Float[Tensor, "*maps h w"]) -> Float[Tensor, "*maps"]:
    """The largest weight over the mean weight: 1 where a map is flat, N where it is one patch."""
    return maps.amax(dim=(-2, -1)) / maps.mean(dim=(-2, -1)).clamp_min(1e-30)


def drawn(
    picture: Picture, heads: Float[Tensor, "H h w"], mass: float, strength: float
) -> Iterator[Drawn]:
    """Colours over the picture, and the mask that holds the share `mass`, of the mean over the
    heads and of each head.
    """
    maps = with_mean(heads.cpu())
    masks, peaks = largest(maps, mass), peak(maps)
    height, width, _ = picture.shape
    for number, values in enumerate(maps.numpy()):
        title = f"head {number}" if number else "mean of the heads"
        name = f"head-{number}" if number else "mean"
        scaled = stretched(values, float(values.min()), float(np.quantile(values, BRIGHTEST)))
        shown = overlay(picture, enlarged(scaled, height, width), strength)
        yield Drawn("Class attention", f"{title}, peak {peaks[number]:.3g}", f"map-{name}", shown)
        mask = blocky(masks[number].numpy().astype(np.uint8), height, width) > 0
        title = f"{title}, {masks[number].double().mean():.0%} of the area"
        yield Drawn("Attention masks", title, f"mask-{name}", highlighted(picture, mask))
