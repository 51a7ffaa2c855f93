"""Cross-covariance attention (XCiT, arXiv:2106.09681, section 3.2).

Differs from the paper's formulas in the place of one division: q and k are not rewritten as unit
vectors; the d x d product is divided by their norms, which is the same number and touches d x d
values instead of N x d.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm

from ssl_xcit.errors import UserError

EPS = 1e-12  # the smallest norm divided by, as in torch.nn.functional.normalize


def channel_attention(
    q: Float[Tensor, "B H d N"],
    k: Float[Tensor, "B H d N"],
    temperature: Float[Tensor, "H 1 1"],
) -> Float[Tensor, "B H d d"]:
    """softmax_j((q_i . k_j) / (|q_i| |k_j|) * temperature): every channel i of q attends to the
    channels j of k.
    """
    gram = q @ k.mT  # (B, H, d, d)
    q_norm = vector_norm(q, dim=-1).clamp_min(EPS).unsqueeze(-1)  # (B, H, d, 1)
    k_norm = vector_norm(k, dim=-1).clamp_min(EPS).unsqueeze(-2)  # (B, H, 1, d)
    return (gram / (q_norm * k_norm) * temperature).softmax(dim=-1)


class CrossCovarianceAttention(nn.Module):
    """Attention across channels: per head a d x d matrix mixes the channels of v, at a cost linear
    in N.

    Args:
        dim: width C, a multiple of `num_heads`; d = C / num_heads.
        num_heads: heads H, each with its own learned temperature (init 1). There is no 1 / sqrt(d).
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"dim={dim} does not divide into num_heads={num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Mix channels; tokens meet only inside the d x d statistics."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)  # each (B, H, d, N), a view
        attention = channel_attention(q, k, self.temperature)  # (B, H, d, d)
        mixed = v.mT @ attention.mT  # (B, H, N, d)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))
