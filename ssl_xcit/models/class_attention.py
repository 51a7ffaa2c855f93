"""Class attention (CaiT, arXiv:2103.17239) as XCiT has it, where only the class token asks."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.models.layers import LAYER_NORM_EPS, MLP


class ClassAttention(nn.Module):
    """The class token looks at all tokens (CaiT, arXiv:2103.17239); scale d^-0.5."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def weights(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B H M"]:
        """Attention of the class token (the first of M = 1 + N) over all tokens; each row sums to
        1.
        """
        C = x.shape[-1]
        q = nn.functional.linear(x[:, 0], self.qkv.weight[:C], self.qkv.bias[:C])
        k = nn.functional.linear(x, self.qkv.weight[C : 2 * C], self.qkv.bias[C : 2 * C])
        q = q.unflatten(-1, (self.num_heads, -1))  # (B, H, d)
        k = k.unflatten(-1, (self.num_heads, -1))  # (B, M, H, d)
        return (torch.einsum("bhd,bmhd->bhm", q, k) * self.scale).softmax(dim=-1)

    def forward(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B 1 C"]:
        """The class token's new value."""
        C = x.shape[-1]
        v = nn.functional.linear(x, self.qkv.weight[2 * C :], self.qkv.bias[2 * C :])
        v = v.unflatten(-1, (self.num_heads, -1))  # (B, M, H, d)
        return self.proj(torch.einsum("bhm,bmhd->bhd", self.weights(x), v).flatten(1)[:, None])


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token, with the published quirk for the patch tokens.

    With a = norm1(x): x <- x + gamma1 * [attn(a), a_patches]; x <- norm2(x); out = x + [gamma2 *
    mlp(x_cls), x_patches], so patch tokens leave doubled. `tokens_norm=False` (nano) applies norm2
    to the class token only.
    """

    def __init__(self, dim: int, num_heads: int, layer_scale: float, tokens_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim)
        self.gamma1 = nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma2 = nn.Parameter(layer_scale * torch.ones(dim))
        self.tokens_norm = tokens_norm

    def forward(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        """x[:, 0] is the class token."""
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat((self.attn(normed), normed[:, 1:]), dim=1)
        if self.tokens_norm:
            x = self.norm2(x)
            cls, patches = x[:, :1], x[:, 1:]
        else:
            cls, patches = self.norm2(x[:, :1]), x[:, 1:]
        return torch.cat((cls + self.gamma2 * self.mlp(cls), 2 * patches), dim=1)
