"""XCiT: cross-covariance image transformers (arXiv:2106.09681), as published, for any image size.

Module names are the published checkpoints' keys (`pos_embeder` is spelled as they spell it), so the
released files load strictly. Differs: patch 4 is added for small images, and only the class token's
query is computed in class attention, since no other is used. Class attention keeps the published
quirk that patch tokens pass through its residual twice (see `ClassAttentionBlock`).

Tokens are (B, N, C). Seen as (B, H, W, C) they are a channels-last image, so convolutions read them
without a copy.
"""

import math
import re
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.class_attention import ClassAttentionBlock
from ssl_xcit.models.fused_block import (
    applies,
    attention_branch,
    bands_of,
    has_kernels,
    local_branch,
    mlp_branch,
    samples_of,
)
from ssl_xcit.models.fused_stem import fused_stem
from ssl_xcit.models.kernels import WIDTHS, Kernels, kernels
from ssl_xcit.models.layers import (
    LAYER_NORM_EPS,
    MLP,
    DropPath,
    autocasting,
    init_linear_,
    recomputed,
    scaled,
)
from ssl_xcit.models.xca import CrossCovarianceAttention, gram_is_faster, in_low_precision
from ssl_xcit.utils.validation import Count, DropRate

# name: width C, depth, heads, layer scale's initial value, norm over all tokens in class attention
SIZES: dict[str, tuple[int, int, int, float, bool]] = {
    "nano_12": (128, 12, 4, 1.0, False),
    "tiny_12": (192, 12, 4, 1.0, True),
    "tiny_24": (192, 24, 4, 1e-5, True),
    "small_12": (384, 12, 8, 1.0, True),
    "small_24": (384, 24, 8, 1e-5, True),
    "medium_24": (512, 24, 8, 1e-5, True),
    "large_24": (768, 24, 16, 1e-5, True),
}
# patch: divisors of C, one per stride-2 convolution
STEM_WIDTHS = {4: (2, 1), 8: (4, 2, 1), 16: (8, 4, 2, 1)}
FEW_TOKENS = 1 << 15  # of a pass without gradients, whose hidden layer is made at once
CACHED_SIZES = 8  # grids whose position waves are kept
TASK_LAYERS = ("head.", "fpn")  # prefixes of the layers that not every task needs
LARGEST_STRIDE = 32  # of the pyramid's maps
NumClasses = Annotated[int, Ge(0)]


class Features(NamedTuple):
    """The final class token of each image, and its patch tokens in their places."""

    cls: Float[Tensor, "B C"]
    patches: Float[Tensor, "B C h w"]


def as_image(tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """Tokens as a channels-last image; a view."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(image: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
    """A (channels-last) image as tokens, row by row; a view where the memory allows it."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def masked(
    tokens: Float[Tensor, "B N C"],
    grid: tuple[int, int],
    mask: Bool[Tensor, "B h w"],
    mask_token: Float[Tensor, " C"] | None,
) -> Float[Tensor, "B N C"]:
    """Tokens with those of masked patches replaced by the mask token.

    Raises:
        UserError: there is no mask token, or the mask is not one of this grid.
    """
    if mask_token is None:
        raise UserError("a mask needs mask_token, the vector of C values at masked patches")
    if mask.shape != (len(tokens), *grid):
        raise UserError(
            f"mask of shape {tuple(mask.shape)}: these images have patches of shape "
            f"{(len(tokens), *grid)} (images, rows, columns)"
        )
    return torch.where(mask.flatten(1)[..., None], mask_token.to(tokens.dtype), tokens)


class Stem(nn.Module):
    """Patches by 3 x 3 convolutions of stride 2 with BatchNorm, GELU between; sides round up."""

    fused = False  # see `XCiT.fuse`

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        widths = [dim // divisor for divisor in STEM_WIDTHS[patch_size]]
        layers: list[nn.Module] = []
        for channels_in, channels_out in zip([in_chans, *widths], widths, strict=False):
            if layers:
                layers.append(nn.GELU())
            conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels_out)))
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C h w"]:
        """(B, in_chans, H, W) -> (B, C, ceil(H / p), ceil(W / p)), channels-last."""
        if self.fused and len(x) and not x.requires_grad and applies(x, self):
            layers: Any = self.proj[::2]
            run = kernels() if has_kernels([layer[1] for layer in layers]) else None
            if run is not None:
                return fused_stem(run, x, list(layers))
        return self.proj(x.contiguous(memory_format=torch.channels_last))


class FourierPosition(nn.Module):
    """Sines and cosines of a patch's row and column, then 1 x 1 convolution to C (section 3.3)."""

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.0):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.temperature = temperature
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, 1)
        self.cache: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    def waves(self, length: int, device: torch.device) -> Float[Tensor, "length hidden"]:
        """Positions 1..length over 0..2 pi: sin, cos in turn, waves 2 pi to 2 pi * temperature."""
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        position = position / (length + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, self.hidden_dim, 2, device=device, dtype=torch.float32)
        angle = position[:, None] / self.temperature ** (exponent / self.hidden_dim)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)

    def image(
        self, grid: tuple[int, int], device: torch.device
    ) -> Float[Tensor, "1 two_hidden h w"]:
        """Waves of the row, then of the column; those of the last few grids are cached."""
        if torch.compiler.is_compiling():
            return self.uncached_image(grid, device)
        image = self.cache.get((grid, device))
        if image is None:
            with torch.inference_mode(False):  # or it could not take part in training later
                image = self.uncached_image(grid, device)
            if type(image) is Tensor:  # and not shapes alone, as torch.export has them
                while len(self.cache) >= CACHED_SIZES:
                    self.cache.pop(next(iter(self.cache)), None)
                self.cache[grid, device] = image
        return image

    def uncached_image(
        self, grid: tuple[int, int], device: torch.device
    ) -> Float[Tensor, "1 two_hidden h w"]:
        """Waves of the row, then of the column."""
        rows = self.waves(grid[0], device)[:, None, :].expand(*grid, -1)
        columns = self.waves(grid[1], device)[None, :, :].expand(*grid, -1)
        return torch.cat((rows, columns), dim=-1).permute(2, 0, 1)[None]

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "1 N C"]:
        """One vector per patch of an h x w grid."""
        weight = self.token_projection.weight
        return as_tokens(self.token_projection(self.image(grid, weight.device).to(weight.dtype)))


class LocalPatchInteraction(nn.Module):
    """Two depthwise 3 x 3 convolutions with GELU and BatchNorm between."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self, x: Float[Tensor, "B N C"], grid: tuple[int, int], gain: Float[Tensor, " C"]
    ) -> Float[Tensor, "B N C"]:
        """Convolve the tokens in their grid and multiply the result by `gain`."""
        inside = self.bn(self.act(self.conv1(as_image(x, grid))))
        weight, bias = scaled(self.conv2, gain)
        return as_tokens(nn.functional.conv2d(inside, weight, bias, padding=1, groups=len(bias)))


class XCABlock(nn.Module):
    """Pre-norm: channel attention (gamma1), local patch interaction (gamma3), MLP (gamma2)."""

    fused = False  # take the kernels of this machine, see `XCiT.fuse`

    def __init__(self, dim: int, num_heads: int, layer_scale: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossCovarianceAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.local_mp = LocalPatchInteraction(dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma3 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        grid: tuple[int, int],
        left_out: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Three residual branches in the paper's order; the statistics of channel attention are
        those of the tokens that are not `left_out`.
        """
        run = kernels() if self.fused and left_out is None and applies(x, self) else None
        if run is not None:
            return self.by_kernels(run, x, grid)
        if left_out is None:
            x = self.drop_path.by_sample(x, lambda kept: self.attn(self.norm1(kept), self.gamma1))
        else:  # the branch is not told which samples it has
            x = self.drop_path(x, self.attn(self.norm1(x), self.gamma1, left_out))
        x = self.drop_path(x, self.local_mp(self.norm3(x), grid, self.gamma3))
        return self.drop_path.by_sample(
            x, lambda kept: self.mlp.of_norm(kept, self.norm2, self.gamma2)
        )

    def by_kernels(
        self, run: Kernels, x: Float[Tensor, "B N C"], grid: tuple[int, int]
    ) -> Float[Tensor, "B N C"]:
        """The same, the passes between products fused."""
        drop = self.drop_path
        _, N, C = x.shape
        if gram_is_faster(N, C, torch.is_grad_enabled(), in_low_precision(x), x.device):
            x = drop.by_sample(x, lambda kept: self.attn(self.norm1(kept), self.gamma1))
        else:
            x = attention_branch(run, x, self.norm1, self.attn, self.gamma1, samples_of(drop, x))
        if has_kernels([self.local_mp.bn]) and bands_of(len(x), grid) >= torch.get_num_threads():
            factor = drop.draw(x)
            factor = None if factor is None else factor.flatten()
            x = local_branch(run, x, self.norm3, self.local_mp, grid, self.gamma3, factor)
        else:  # BatchNorm of several ranks, or too few tokens for the threads
            x = drop(x, self.local_mp(self.norm3(x), grid, self.gamma3))
        if not torch.is_grad_enabled() and len(x) * N > FEW_TOKENS:  # the hidden layer by parts
            return drop.by_sample(x, lambda kept: self.mlp.of_norm(kept, self.norm2, self.gamma2))
        return mlp_branch(run, x, self.norm2, self.mlp, self.gamma2, samples_of(drop, x))


def pyramid_taps(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs become the pyramid's maps: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24
    as published, at the same shares of other depths; the last is always the last block.
    """
    early = (round(depth * share - 1) for share in (1 / 3, 1 / 2, 2 / 3))
    return (*(max(0, tap) for tap in early), depth - 1)


def pyramid_layers(patch_size: int, dim: int) -> list[nn.Module]:
    """The layers from the tapped blocks' grids to strides 4, 8, 16 and 32, with the keys of the
    published detection checkpoints (those of patch 4 are ours).
    """

    def up() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, 2, stride=2)

    if patch_size == 16:
        upsample = nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up())
        return [upsample, nn.Sequential(up()), nn.Identity(), nn.MaxPool2d(2)]
    if patch_size == 8:
        return [nn.Sequential(up()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
    return [nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4), nn.MaxPool2d(8)]


class XCiT(nn.Module):
    """Cross-covariance image transformer.

    Args:
        embed_dim: width C.
        depth: number of XCA blocks; two class-attention blocks follow.
        num_heads: heads H of both attentions.
        patch_size: 4, 8 or 16.
        layer_scale: initial value of the branches' per-channel gains.
        tokens_norm: class attention's second norm takes all tokens (False: the class token only).
        in_chans: channels of the image.
        drop_path: rate of stochastic depth, the same in every XCA block, none in class attention.
        num_classes: size of `head`, a linear layer that only supervised checkpoints have (0: none).
            `forward` does not apply it.
        pyramid: whether it has the layers of `pyramid`, for segmentation and detection.

    Raises:
        UserError: for a patch size without a stem, or a width that heads or stem do not divide.
    """

    def __init__(
        self,
        embed_dim: Count,
        depth: Count,
        num_heads: Count,
        patch_size: int = 16,
        layer_scale: float = 1.0,
        tokens_norm: bool = True,
        in_chans: Count = 3,
        drop_path: DropRate = 0.0,
        num_classes: NumClasses = 0,
        pyramid: bool = False,
    ):
        super().__init__()
        if patch_size not in STEM_WIDTHS:
            raise UserError(
                f"patch_size={patch_size}: XCiT has stems for 4, 8 and 16; try "
                "model=xcit_small_12_p8"
            )
        if embed_dim % STEM_WIDTHS[patch_size][0]:
            raise UserError(
                f"embed_dim={embed_dim}: the stem of patch {patch_size} starts at embed_dim / "
                f"{STEM_WIDTHS[patch_size][0]}; choose a multiple of {STEM_WIDTHS[patch_size][0]}"
            )
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        # enough to build this network again; plain data for checkpoints
        self.architecture: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "layer_scale": layer_scale,
            "tokens_norm": tokens_norm,
            "in_chans": in_chans,
            "num_classes": num_classes,
        }
        if pyramid:  # without it the record is that of files written before there was one
            self.architecture["pyramid"] = True
        self.preprocess: dict[str, Any] = {}  # of images in training; {}: ImageNet's
        self.checkpoint_blocks = False  # keep each block's input only, for large images
        self.patch_embed = Stem(patch_size, in_chans, embed_dim)
        self.pos_embeder = FourierPosition(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            XCABlock(embed_dim, num_heads, layer_scale, drop_path) for _ in range(depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, layer_scale, tokens_norm) for _ in range(2)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear_)
        if pyramid:
            layers = pyramid_layers(patch_size, embed_dim)
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = layers

    def fuse(self) -> bool:
        """Take this machine's kernels for passes on a CPU, and build them where they are missing;
        whether there are any. Outputs are the same within rounding.
        """
        there = kernels() is not None
        self.patch_embed.fused = there
        for block in self.blocks:
            assert isinstance(block, XCABlock)
            block.fused = there and block.attn.head_dim in WIDTHS
        return there

    def embedded_patches(
        self,
        x: Float[Tensor, "B in_chans H W"],
        mask: Bool[Tensor, "B h w"] | None = None,
        mask_token: Float[Tensor, " C"] | None = None,
    ) -> tuple[Float[Tensor, "B N C"], tuple[int, int]]:
        """Patch tokens with their positions, before the XCA blocks, and their grid; masked ones are
        the mask token and a position.
        """
        image = self.patch_embed(x)
        grid = (image.shape[-2], image.shape[-1])
        tokens = as_tokens(image)
        if mask is not None:
            tokens = masked(tokens, grid, mask, mask_token)
        tokens = tokens + self.pos_embeder(grid)
        if autocasting(x.device):  # or small branches would be rounded away
            tokens = tokens.float()
        return tokens, grid

    def run_block(
        self,
        block: nn.Module,
        tokens: Float[Tensor, "B N C"],
        grid: tuple[int, int],
        left_out: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """One XCA block, with its activations kept or computed again in the backward pass."""
        inputs = (tokens, grid) if left_out is None else (tokens, grid, left_out)
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        output: Tensor = recomputed(block, *inputs) if again else block(*inputs)
        return output

    def patch_tokens(
        self,
        x: Float[Tensor, "B in_chans H W"],
        mask: Bool[Tensor, "B h w"] | None = None,
        mask_token: Float[Tensor, " C"] | None = None,
        exclude_masked: bool = False,
    ) -> tuple[Float[Tensor, "B N C"], tuple[int, int]]:
        """Patch tokens after the XCA blocks, and their grid (rows, columns); masks as in
        `forward_features`.
        """
        tokens, grid = self.embedded_patches(x, mask, mask_token)
        left_out = mask.flatten(1) if mask is not None and exclude_masked else None
        for block in self.blocks:
            tokens = self.run_block(block, tokens, grid, left_out)
        return tokens, grid

    def pyramid(
        self, x: Float[Tensor, "B in_chans H W"]
    ) -> tuple[
        Float[Tensor, "B C h4 w4"],
        Float[Tensor, "B C h8 w8"],
        Float[Tensor, "B C h16 w16"],
        Float[Tensor, "B C h32 w32"],
    ]:
        """Maps of strides 4, 8, 16 and 32 for dense tasks, from the tokens after four blocks, not
        normalised and without class attention, as the published detectors take them.

        An image whose sides are no multiples of 32 has the grid ceil(H / p) x ceil(W / p), which
        the layers double or pool (pooling rounds down).

        Raises:
            UserError: the network was built without `pyramid=True`, or the image is too small.
        """
        if "pyramid" not in self.architecture:
            raise UserError(
                "this XCiT has no pyramid layers: build it with create_model(NAME, pyramid=True), "
                "or add them with ssl_xcit.transfer.backbone.with_layers(backbone, pyramid=True)"
            )
        tokens, grid = self.embedded_patches(x)
        if min(grid) < LARGEST_STRIDE // self.patch_size:
            raise UserError(
                f"images of {x.shape[-2]} x {x.shape[-1]} pixels have no map of stride "
                f"{LARGEST_STRIDE}: resize them to at least {LARGEST_STRIDE} pixels a side"
            )
        taps = pyramid_taps(len(self.blocks))
        tapped = {}
        for index, block in enumerate(self.blocks):
            tokens = self.run_block(block, tokens, grid)
            if index in taps:
                tapped[index] = as_image(tokens, grid)
        first, second, third, fourth = (tapped[tap] for tap in taps)
        return self.fpn1(first), self.fpn2(second), self.fpn3(third), self.fpn4(fourth)

    def before_last(
        self, patches: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N C"], ClassAttentionBlock]:
        """Class token and patches as the last class-attention block takes them, and that block."""
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        *earlier, last = self.cls_attn_blocks
        assert isinstance(last, ClassAttentionBlock)
        for block in earlier:
            cls, patches = block(cls, patches)
        return cls, patches, last

    def forward(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The normalised final class token, in train and in eval mode."""
        cls, patches, last = self.before_last(self.patch_tokens(x)[0])
        return self.norm(last.class_token(cls, last.normed(cls, patches))[:, 0])

    def forward_features(
        self,
        x: Float[Tensor, "B in_chans H W"],
        mask: Bool[Tensor, "B h w"] | None = None,
        mask_token: Float[Tensor, " C"] | None = None,
        exclude_masked: bool = False,
    ) -> Features:
        """Class token (B, C) and patches (B, C, ceil(H / p), ceil(W / p)), after the last norm.

        Args:
            x: images.
            mask: patches whose stem output is replaced by `mask_token`, before positions are added
                (iBOT, arXiv:2111.07832). The stem itself sees the whole image, each of its outputs
                2 p - 1 pixels a side, so a masked patch's border is seen by its neighbours.
            mask_token: a vector that whoever masks has learned; it is no weight of this network.
            exclude_masked: leave masked tokens out of the statistics of q and k in all XCA blocks.

        Raises:
            UserError: a mask without its token, or of another grid than the image's.
        """
        tokens, grid = self.patch_tokens(x, mask, mask_token, exclude_masked)
        cls, patches, last = self.before_last(tokens)
        cls, patches = last(cls, patches)
        return Features(self.norm(cls[:, 0]), as_image(self.norm(patches), grid))

    def parts(self, x: Float[Tensor, "B in_chans H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Features of the last four blocks, each after the last norm (as DINOv2 takes several
        blocks, arXiv:2304.07193, section 7.1).

        Class tokens `cls` (the output of `forward`) and `cls_1` of the two class-attention blocks,
        mean patch tokens `patch` (of the output) and `block_1`, `block_2` of the last two XCA
        blocks, the last of them first; these have no class token.
        """
        block_means: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda *args: block_means.append(self.norm(args[2]).mean(dim=1))
            )
            for block in self.blocks[-2:]
        ]
        try:
            tokens, _ = self.patch_tokens(x)
        finally:
            for hook in hooks:
                hook.remove()
        earlier, patches, last = self.before_last(tokens)
        cls, patches = last(earlier, patches)
        return {
            "cls": self.norm(cls[:, 0]),
            "cls_1": self.norm(earlier[:, 0]),
            "patch": self.norm(patches).mean(dim=1),
            **{f"block_{i}": mean for i, mean in enumerate(reversed(block_means), start=1)},
        }

    def attention(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B heads h w"]:
        """Class attention of the last block over the patches; the class token has the rest to 1."""
        tokens, grid = self.patch_tokens(x)
        cls, patches, last = self.before_last(tokens)
        return last.attn.weights(last.normed(cls, patches))[:, :, 1:].unflatten(-1, grid)


def create_model(
    name: str,
    in_chans: Count = 3,
    drop_path: DropRate = 0.0,
    num_classes: NumClasses = 0,
    pyramid: bool = False,
) -> XCiT:
    """A network of the published sizes with fresh weights.

    Args:
        name: `xcit_SIZE_pPATCH` with SIZE one of nano_12, tiny_12, tiny_24, small_12, small_24,
            medium_24, large_24 and PATCH one of 4, 8, 16 (4 is not in the paper).
        in_chans: channels of the image.
        drop_path: rate of stochastic depth (paper: 0.05 for small_12, 0.15 for medium_24).
        num_classes: size of the classifier that supervised checkpoints carry.
        pyramid: whether it has the layers of `XCiT.pyramid`.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    match = re.fullmatch(r"xcit_([a-z]+_\d+)_p(\d+)", name)
    if match is None or match[1] not in SIZES or int(match[2]) not in STEM_WIDTHS:
        raise UserError(
            f"no model {name!r}; sizes: {', '.join(f'xcit_{size}' for size in SIZES)}, "
            "each with _p4, _p8 or _p16"
        )
    embed_dim, depth, num_heads, layer_scale, tokens_norm = SIZES[match[1]]
    return XCiT(
        embed_dim, depth, num_heads, int(match[2]), layer_scale, tokens_norm,
        in_chans, drop_path, num_classes, pyramid,
    )  # fmt: skip
