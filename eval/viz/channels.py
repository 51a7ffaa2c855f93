"""Channel attention: the d x d matrices of cross-covariance attention in every block, their
entropy, and pictures of both.

XCA (arXiv:2106.09681, section 3.2): in each head channel i of the queries attends to the channels j
of the keys, softmax_j(cos(q_i, k_j) * temperature). The matrices depend on the image. Entropy is
the mean over rows of -sum_j A_ij ln A_ij, relative to ln d: 1 where a row is flat (every channel is
the mean of all), 0 where each channel takes one other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from ssl_xcit.models.xca import CrossCovarianceAttention, channel_attention
from ssl_xcit.models.xcit import XCABlock, XCiT
from ssl_xcit.utils.files import plain_names

from .album import Section, Tile, write_tile
from .pictures import (
    FAINT,
    INK,
    MARGIN,
    TEXT,
    Picture,
    canvas,
    colour_table,
    coloured,
    font,
    shortened,
    stretched,
)

SHOWN = 480  # long side of pictures on the page
MATRIX = 112  # pixels of a matrix's side, about
Colour = tuple[int, int, int]


class DepthCurve(NamedTuple):
    """Values over depth, one for each block."""

    name: str
    values: Sequence[float]
    colour: Colour
    width: int


def matrices(attn: CrossCovarianceAttention, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B H d d"]:
    """The attention of a layer on its input; rows sum to 1."""
    C = x.shape[-1]
    qk = linear(x, attn.qkv.weight[: 2 * C], attn.qkv.bias[: 2 * C])
    qk = qk.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 4, 1)
    q, k = qk.contiguous()  # each (B, H, d, N); norms over strided tokens would take long
    return channel_attention(q, k, attn.temperature)


@contextmanager
def recorded(backbone: XCiT) -> Iterator[list[Float[Tensor, "B H d d"]]]:
    """A list that fills with the matrices of each XCA block, in order, while the backbone runs."""
    blocks: list[Tensor] = []

    def note(attn: Any, inputs: tuple[Any, ...]) -> None:
        blocks.append(matrices(attn, inputs[0]).float())

    hooks = []
    for block in backbone.blocks:
        assert isinstance(block, XCABlock)
        hooks.append(block.attn.register_forward_pre_hook(note))
    try:
        yield blocks
    finally:
        for hook in hooks:
            hook.remove()


def relative_entropy(attention: Float[Tensor, "*maps d d"]) -> Float[Tensor, "*maps"]:
    """Mean entropy of the rows over ln d, in 0..1."""
    d = attention.shape[-1]
    exact = attention.double()
    rows = torch.special.entr(exact).sum(dim=-1)
    return (rows.mean(dim=-1) / math.log(max(d, 2))).to(attention.dtype)


class Summary:
    """Over images: mean matrices of all blocks and heads, and every image's entropies."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.entropies: list[Tensor] = []

    def add(self, blocks: Float[Tensor, "blocks H d d"]) -> None:
        """Add the matrices of one image."""
        exact = blocks.detach().cpu().double()
        self.total = exact if self.total is None else self.total + exact
        self.entropies.append(relative_entropy(exact))
        self.count += 1

    def mean(self) -> Float[Tensor, "blocks H d d"]:
        """Mean matrices over the images."""
        assert self.total is not None, "no image was added"
        return self.total / self.count

    def numbers(self) -> dict[str, Any]:
        """Mean entropy over images, of each head and block, and its deviation between images."""
        entropies = torch.stack(self.entropies)  # (images, blocks, H)
        blocks = entropies.mean(dim=2)  # (images, blocks)
        return {
            "entropy": [round(v, 6) for v in blocks.mean(dim=0).tolist()],
            "entropy_std_over_images": [
                round(v, 6) for v in blocks.std(dim=0, correction=0).tolist()
            ],
            "entropy_of_heads": [
                [round(v, 6) for v in row] for row in entropies.mean(dim=0).tolist()
            ],
            "unit": "entropy over ln d",
            "d": int(self.mean().shape[-1]),
            "images": self.count,
        }


def matrices_sheet(matrices: Float[np.ndarray, "blocks H d d"]) -> Picture:
    """A grid of blocks by heads in colours of the logarithm of weight times d, with their scale."""
    blocks, heads, d, _ = matrices.shape
    zoom = max(1, round(MATRIX / d))
    side, label, line = zoom * d, 70, TEXT + 6
    times = np.log2(np.maximum(matrices * d, 2.0**-20))  # 0: what every channel would get
    low, high = (float(v) for v in np.quantile(times, (0.005, 0.995)))
    high = max(high, low + 0.1)
    width = max(label + heads * (side + 4) + MARGIN, 420)
    image, draw = canvas(line + blocks * (side + 4) + MARGIN + 3 * line, width)
    for head in range(heads):
        draw.text((label + head * (side + 4), 2), f"head {head + 1}", INK, font())
    for block in range(blocks):
        top = line + block * (side + 4)
        draw.text((MARGIN, top + side // 2 - TEXT // 2), f"block {block + 1}", INK, font())
        for head in range(heads):
            cell = coloured(stretched(times[block, head], low, high)).repeat(zoom, 0)
            place = (label + head * (side + 4), top)
            image.paste(Image.fromarray(np.ascontiguousarray(cell.repeat(zoom, 1))), place)
    top = line + blocks * (side + 4) + MARGIN
    bar = coloured(np.tile(np.linspace(0.0, 1.0, 240), (12, 1)))
    image.paste(Image.fromarray(bar), (label, top))
    for shift, value in ((0, low), (240, high)):
        words = f"{2**value:.2g}"
        left = label + shift - (font().getlength(words) if shift else 0)
        draw.text((left, top + 14), words, INK, font())
    words = "weight, times that of equal shares (logarithmic)"
    draw.text((label, top + 14 + line), words, INK, font())
    return np.asarray(image)


def chart(curves: Sequence[DepthCurve], title: str) -> Picture:
    """Curves over the blocks, from a round number below the lowest value up to 1."""
    zoom, height = 2, 340  # drawn larger and made smaller: smooth lines
    depth = max(len(curve.values) for curve in curves)
    legend = max(int(font().getlength(shortened(curve.name, 260))) for curve in curves) + 44
    height = max(height, 70 + 18 * len(curves))
    inner, left, top = 460, 52, 34
    low = min(0.9, math.floor(min(min(curve.values) for curve in curves) * 10) / 10)
    bottom = height - 44
    image, draw = canvas(height * zoom, (left + inner + 20 + legend) * zoom)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * zoom, y * zoom

    def across(block: int) -> float:
        return left + inner * ((block + 0.5) / depth)

    def up(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (1.0 - low)

    words = font(TEXT * zoom)
    draw.text(at(left, 8), shortened(title, inner + legend), INK, words)
    for value in np.linspace(low, 1.0, 6 if round((1.0 - low) * 10) % 5 == 0 else 5):
        draw.line([at(left, up(value)), at(left + inner, up(value))], FAINT, zoom)
        draw.text(at(left - 8, up(value)), f"{value:.3g}", INK, words, anchor="rm")
    step = math.ceil(depth / 12)
    for block in range(0, depth, step):
        draw.text(at(across(block), bottom + 14), str(block + 1), INK, words, anchor="mm")
    draw.text(at(left + inner / 2, height - 12), "block", INK, words, anchor="mm")
    for number, curve in enumerate(curves):
        points = [at(across(i), up(value)) for i, value in enumerate(curve.values)]
        draw.line(points, curve.colour, curve.width * zoom, joint="curve")
        radius = (curve.width + 1) * zoom
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), curve.colour)
        y = top + 8 + 18 * number
        x = left + inner + 12
        draw.line([at(x, y), at(x + 18, y)], curve.colour, curve.width * zoom)
        draw.text(at(x + 24, y), shortened(curve.name, 260), INK, words, anchor="lm")
    return np.asarray(
        image.resize((image.width // zoom, image.height // zoom), Image.Resampling.LANCZOS)
    )


def spread_colours(count: int) -> list[Colour]:
    """Colours from the table, without its ends, which paper or ink would hide."""
    places = np.linspace(60, 205, count) if count > 1 else np.array([110.0])
    return [(red, green, blue) for red, green, blue in colour_table()[places.astype(int)].tolist()]


def curves_of_heads(heads: Sequence[Sequence[float]], mean: Sequence[float]) -> list[DepthCurve]:
    """A thin curve for each head, a thick one for their mean."""
    columns = list(zip(*heads, strict=True))
    curves = [
        DepthCurve(f"head {number}", column, colour, 1)
        for number, (column, colour) in enumerate(
            zip(columns, spread_colours(len(columns)), strict=True), start=1
        )
    ]
    return [*curves, DepthCurve("mean of the heads", mean, INK, 3)]


def channel_section(
    numbers: Mapping[str, Any], summaries: Mapping[str, Summary], out: Path
) -> Section:
    """Matrices and entropies of each checkpoint, the entropies of several in one chart."""
    tiles: list[Tile] = []

    def add(title: str, name: str, picture: Picture) -> None:
        tiles.append(Tile("", title, f"channels/{name}.png"))
        write_tile(picture, out, tiles[-1], SHOWN)

    title = "Entropy of channel attention over ln d"
    several = len(summaries) > 1
    results = {label: numbers[label]["channels"] for label in summaries}
    if several:
        colours = spread_colours(len(results))
        curves = [
            DepthCurve(label, result["entropy"], colour, 2)
            for (label, result), colour in zip(results.items(), colours, strict=True)
        ]
        add("entropy over depth, all checkpoints", "entropy", chart(curves, title))
    for name, (label, result) in zip(plain_names(list(results)), results.items(), strict=True):
        end = f"-{name}" if several else ""
        after = f", {label}" if end else ""
        curves = curves_of_heads(result["entropy_of_heads"], result["entropy"])
        add(f"entropy over depth{after}", f"entropy{end}", chart(curves, title + after))
        sheet = matrices_sheet(summaries[label].mean().numpy())
        add(f"matrices, mean over the images{after}", f"matrices{end}", sheet)
    return Section("Channel attention", None, [("", tiles)])
