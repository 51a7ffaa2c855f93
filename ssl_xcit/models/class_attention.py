"""Class attention (CaiT, arXiv:2103.17239) as XCiT has it: the class token is the only query.

Keys and values of the tokens are never computed. With one query a head, q . (W_k n_m + b_k) is
(W_k^T q) . n_m and a constant, which softmax does not see; and the values' mean W_v n_m + b_v under
the attention is W_v times the mean of n_m, plus b_v. So the heads are H queries of width C that
share the normed tokens n as keys and values: 2 M C H multiplications an image, not 2 M C^2.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ssl_xcit.models.layers import LAYER_NORM_EPS, MLP, autocasting, scaled


class ClassAttention(nn.Module):
    """The class token attends to all tokens; scale d^-0.5, d = C / H."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries(self, cls: Float[Tensor, "B C"]) -> Float[Tensor, "B H C"]:
        """W_k^T q of each head, to be compared with the tokens themselves."""
        C = cls.shape[-1]
        q = linear(cls, self.qkv.weight[:C], self.qkv.bias[:C]).unflatten(-1, (self.num_heads, -1))
        keys = self.qkv.weight[C : 2 * C].unflatten(0, (self.num_heads, -1))  # (H, d, C)
        return torch.einsum("bhd,hdc->bhc", q, keys)

    def weights(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B H M"]:
        """Attention of the class token (the first of M = 1 + N) over all tokens; rows sum to 1."""
        return (self.queries(x[:, 0]) @ x.mT * self.scale).softmax(dim=-1)

    def pooled(
        self, queries: Float[Tensor, "B H C"], x: Float[Tensor, "B M C"]
    ) -> Float[Tensor, "B H C"]:
        """The mean token of each head under its attention."""
        q, tokens = queries[:, None], x[:, None]
        return scaled_dot_product_attention(q, tokens, tokens, scale=self.scale)[:, 0]

    def forward(
        self, x: Float[Tensor, "B M C"], gain: Float[Tensor, " C"] | None = None
    ) -> Float[Tensor, "B 1 C"]:
        """The class token's new value, times `gain`."""
        C = x.shape[-1]
        queries = self.queries(x[:, 0])
        if x.device.type == "cpu" and autocasting(x.device):  # in bfloat16 several times slower
            with torch.autocast("cpu", enabled=False):
                pooled = self.pooled(queries.float(), x.float())
        else:
            pooled = self.pooled(queries, x)
        values = self.qkv.weight[2 * C :].unflatten(0, (self.num_heads, -1))
        mean = torch.einsum("bhc,hdc->bhd", pooled, values).flatten(1) + self.qkv.bias[2 * C :]
        return linear(mean[:, None], *scaled(self.proj, gain))


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
        self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.tokens_norm = tokens_norm

    def normed(
        self, cls: Float[Tensor, "B 1 C"], patches: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B M C"]:
        """The M = 1 + N tokens that class attention attends to, the class token first."""
        return self.norm1(torch.cat((cls, patches), dim=1))

    def class_token(
        self, cls: Float[Tensor, "B 1 C"], normed: Float[Tensor, "B M C"]
    ) -> Float[Tensor, "B 1 C"]:
        """The class token, which depends on no other output of this block."""
        cls = self.norm2(cls + self.attn(normed, self.gamma1))
        return cls + self.mlp(cls, self.gamma2)

    def forward(
        self, cls: Float[Tensor, "B 1 C"], patches: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N C"]]:
        """Class token and patch tokens."""
        normed = self.normed(cls, patches)
        patches = torch.addcmul(patches, normed[:, 1:], self.gamma1)
        if self.tokens_norm:
            patches = self.norm2(patches)
        return self.class_token(cls, normed), 2 * patches
