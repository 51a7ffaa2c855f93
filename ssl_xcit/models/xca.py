"""Cross-covariance attention (XCiT, arXiv:2106.09681, section 3.2), in two equal forms.

Direct: q, k and v of every token. Differs from the paper's formulas in the place of one division: q
and k are not rewritten as unit vectors; the d x d product is divided by their norms, which is the
same number and touches d x d values instead of N x d.

From the Gram matrix: with S = x^T x all that attention needs of q and k follows, and the output is
x times one C x C matrix an image,

    q k^T = W_q S W_k^T,   |q_i|^2 = (W_q S W_q^T)_ii,   y = x (W_proj blockdiag(A) W_v)^T,

the biases belonging to a column of ones beside x. That is 2 N C^2 + 3 C^3 multiplications an image
instead of 4 N C^2 + 2 N C d, backwards 3 N C^2 instead of about 8, and of all that is N long only x
is kept. It wins when N is some times C; `gram_is_faster` decides. Its limit: norms are differences
of sums over all tokens, so where a bias all but cancels a query (to a thousandth, say) the direct
form keeps more digits.

Tokens can be left out of these statistics, as masked patches that carry no image (the paper has no
such option): norms and q k^T are then sums over the other tokens, while v and the output are of
all. Without any token all cosines are 0 and attention is even.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import linear

from ssl_xcit.errors import UserError
from ssl_xcit.models.layers import autocasting, scaled

EPS = 1e-12  # the smallest norm divided by, as in torch.nn.functional.normalize
# From N = factor * C + offset tokens the Gram form is faster on a CPU, by (with gradients, in
# bfloat16); fitted by benchmarks/xca.py, those for bfloat16 when the direct form was slower.
GRAM_FROM = {
    (True, False): (1.51, 18),
    (False, False): (1.92, 1),
    (True, True): (4.09, -24),
    (False, True): (5.18, -2),
}


def channel_attention(
    q: Float[Tensor, "B H d N"], k: Float[Tensor, "B H d N"], temperature: Float[Tensor, "H 1 1"]
) -> Float[Tensor, "B H d d"]:
    """softmax_j((q_i . k_j) / (|q_i| |k_j|) * temperature): channel i of q attends to j of k."""
    exact = torch.promote_types(q.dtype, torch.float32)
    gram = (q @ k.mT).to(exact)  # (B, H, d, d)
    q_norm = vector_norm(q, dim=-1, dtype=exact).clamp_min(EPS).unsqueeze(-1)  # (B, H, d, 1)
    k_norm = vector_norm(k, dim=-1, dtype=exact).clamp_min(EPS).unsqueeze(-2)  # (B, H, 1, d)
    return (gram / (q_norm * k_norm) * temperature).softmax(dim=-1)


def gram_is_faster(
    num_tokens: int, dim: int, gradients: bool, low: bool, device: torch.device
) -> bool:
    """Whether the form from the Gram matrix is faster; never on a GPU, where it is not measured."""
    factor, offset = GRAM_FROM[gradients, low]
    return device.type == "cpu" and num_tokens >= factor * dim + offset


def in_low_precision(x: Tensor) -> bool:
    """Whether products with x are rounded to 16 bits."""
    return autocasting(x.device) or x.dtype in (torch.bfloat16, torch.float16)


def without_tokens(
    qkv: Float[Tensor, "B N qkv"], left_out: Bool[Tensor, "B N"]
) -> Float[Tensor, "B N qkv"]:
    """q and k of some tokens set to 0, so that they add nothing to norms and products; v stays."""
    is_statistic = torch.arange(3, device=qkv.device) < 2  # q and k
    zeroed = left_out[:, :, None] & is_statistic  # (B, N, 3)
    return qkv.unflatten(-1, (3, -1)).masked_fill(zeroed[..., None], 0.0).flatten(-2)


class ChannelMixing(torch.autograd.Function):
    """(q k v) -> softmax(cosines * temperature) v, head by head on strided views of the tokens.

    For CPUs. Equals `channel_attention(q, k, temperature)` times v, for which torch copies q, k and
    v once in each pass to batch the heads, takes norms across strides and sums up gradients padded
    with zeros; `benchmarks/layers.py` compares the two. No second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Float[Tensor, "B N qkv"], temperature: Float[Tensor, "H 1 1"]
    ) -> Float[Tensor, "B N C"]:
        """Compute in float32 at least whatever has d x d values an image and head."""
        B, N, C3 = qkv.shape
        H = len(temperature)
        q, k, v = qkv.view(B, N, 3, H, -1).unbind(2)
        qk = qkv[..., : C3 // 3 * 2]
        exact = qkv.dtype if qkv.dtype == torch.float64 else torch.float32
        norms = (qk * qk).sum(dim=1, dtype=exact).sqrt_().clamp_min_(EPS)  # (B, 2C)
        q_norm, k_norm = norms.view(B, 2, H, -1).permute(1, 2, 0, 3)  # (H, B, d)
        d = q.shape[-1]
        gram = qkv.new_empty(H, B, d, d)
        for h in range(H):
            torch.bmm(q[:, :, h].mT, k[:, :, h], out=gram[h])
        cosine = gram.to(exact).div_(q_norm.unsqueeze(-1)).div_(k_norm.unsqueeze(-2))
        attention = (cosine * temperature[:, None].to(exact)).softmax(dim=-1).to(qkv.dtype)
        mixed = qkv.new_empty(H, B, N, d)
        for h in range(H):
            torch.bmm(v[:, :, h], attention[h].mT, out=mixed[h])
        ctx.save_for_backward(qkv, temperature, norms, cosine, attention)
        return mixed.permute(1, 2, 0, 3).reshape(B, N, H * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B N C"]) -> tuple[Tensor, Tensor]:
        """dq = k (G / |q| |k|)^T - q r with G the gradient of a cosine and r_i = sum_j G_ij cos_ij
        / |q_i|^2; dk likewise.
        """
        qkv, temperature, norms, cosine, attention = ctx.saved_tensors
        B, N, _ = qkv.shape
        H, d = len(temperature), cosine.shape[-1]
        q, k, v = qkv.view(B, N, 3, H, d).unbind(2)
        grad = grad.view(B, N, H, d)
        parts = qkv.new_empty(3, H, B, N, d)
        d_attention = torch.empty_like(attention)
        for h in range(H):
            torch.bmm(grad[:, :, h].mT, v[:, :, h], out=d_attention[h])
            torch.bmm(grad[:, :, h], attention[h], out=parts[2, h])
        probability = attention.to(cosine.dtype)
        d_cosine = torch._softmax_backward_data(
            d_attention.to(cosine.dtype), probability, -1, cosine.dtype
        )
        radial = d_cosine * cosine
        d_temperature = radial.sum(dim=(1, 2, 3)).view_as(temperature)
        d_cosine *= temperature[:, None]
        radial *= temperature[:, None]
        q_norm, k_norm = norms.view(B, 2, H, d).permute(1, 2, 0, 3)
        d_gram = d_cosine.div_(q_norm.unsqueeze(-1)).div_(k_norm.unsqueeze(-2)).to(qkv.dtype)
        for h in range(H):
            torch.bmm(k[:, :, h], d_gram[h].mT, out=parts[0, h])
            torch.bmm(q[:, :, h], d_gram[h], out=parts[1, h])
        # a norm that was clamped is a constant
        through_norms = torch.stack((radial.sum(dim=-1), radial.sum(dim=-2))).permute(2, 0, 1, 3)
        factor = (through_norms / norms.square().view(B, 2, H, d)).masked_fill_(
            norms.view(B, 2, H, d) <= EPS, 0.0
        )
        d_qkv = torch.empty_like(qkv)
        by_head = d_qkv.view(B, N, 3, H, d)
        torch.addcmul(
            parts[:2].permute(2, 3, 0, 1, 4),
            qkv.view(B, N, 3, H, d)[:, :, :2],
            factor.to(qkv.dtype).unsqueeze(1),
            value=-1,
            out=by_head[:, :, :2],
        )
        by_head[:, :, 2].copy_(parts[2].permute(1, 2, 0, 3))
        return d_qkv, d_temperature.to(temperature.dtype)


class Gram(torch.autograd.Function):
    """S = x^T x; its gradient is x (G + G^T), one product where autograd takes two."""

    @staticmethod
    def forward(x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C C"]:
        """Sum over the tokens."""
        return x.mT @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep x."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "B C C"]) -> Float[Tensor, "B N C"]:
        """Gradient of the tokens."""
        (x,) = ctx.saved_tensors
        return x @ (grad + grad.mT)


def from_gram(
    x: Float[Tensor, "B N C"],
    qkv: nn.Linear,
    temperature: Float[Tensor, "H 1 1"],
    proj_weight: Float[Tensor, "C C"],
    proj_bias: Float[Tensor, " C"],
    left_out: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N C"]:
    """Cross-covariance attention without q, k and v; see the module docstring. Tokens `left_out`
    are not in S, nor in the column of ones.

    Under autocast x times the C x C matrix is of low precision; S and all that is C x C stay in
    float32.
    """
    B, N, C = x.shape
    H = temperature.shape[0]
    low = torch.get_autocast_dtype(x.device.type) if in_low_precision(x) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        exact = x if x.dtype == torch.float64 else x.float()
        weight, bias = qkv.weight.to(exact.dtype), qkv.bias.to(exact.dtype)
        wqk, bqk = weight[: 2 * C], bias[: 2 * C]
        counted: Tensor = exact
        count: int | Tensor = N
        if left_out is not None:
            counted = exact.masked_fill(left_out[..., None], 0.0)
            count = (~left_out).sum(dim=1, keepdim=True)  # (B, 1)
        sums = counted.sum(dim=1)  # (B, C)
        qk_sums = sums @ wqk.mT + count * bqk  # (B, 2C), of q and k over the tokens
        qk_x = wqk @ Gram.apply(counted) + bqk[:, None] * sums[:, None]  # (B, 2C, C), (q k)^T x
        squares = (qk_x * wqk).sum(dim=-1) + qk_sums * bqk  # (B, 2C)
        q_norm, k_norm = squares.clamp_min(EPS**2).sqrt().view(B, 2, H, -1).unbind(1)  # (B, H, d)
        gram = qk_x[:, :C].reshape(B, H, -1, C) @ wqk[C:].view(H, -1, C).mT
        gram = gram + qk_sums[:, :C].view(B, H, -1, 1) * bqk[C:].view(H, 1, -1)  # (B, H, d, d)
        # no cosine is beyond 1, but a difference of large sums may come out so
        cosine = (gram / (q_norm.unsqueeze(-1) * k_norm.unsqueeze(-2))).clamp(-1.0, 1.0)
        attention = (cosine * temperature.to(exact.dtype)).softmax(dim=-1)
        mix = proj_weight.to(exact.dtype).view(C, H, -1).transpose(0, 1) @ attention  # (B, H, C, d)
        mix = mix.transpose(1, 2).reshape(B, C, C)
        matrix = mix @ weight[2 * C :]  # (B, C, C)
        offset = mix @ bias[2 * C :] + proj_bias.to(exact.dtype)  # (B, C)
        return torch.baddbmm(offset[:, None].to(low), x.to(low), matrix.mT.to(low))


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
        self.head_dim = dim // num_heads  # d
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        gain: Float[Tensor, " C"] | None = None,
        left_out: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Mix channels by their d x d statistics over the tokens, except those `left_out`; multiply
        the result by `gain`.
        """
        _, N, C = x.shape
        weight, bias = scaled(self.proj, gain)
        exporting = torch.compiler.is_exporting()  # one program for any number of tokens
        low = in_low_precision(x)
        if not exporting and gram_is_faster(N, C, torch.is_grad_enabled(), low, x.device):
            return from_gram(x, self.qkv, self.temperature, weight, bias, left_out)
        return self.direct(x, weight, bias, left_out)

    def direct(
        self,
        x: Float[Tensor, "B N C"],
        weight: Float[Tensor, "C C"],
        bias: Float[Tensor, " C"],
        left_out: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """The direct form; weight and bias are the output projection's."""
        B, N, C = x.shape
        qkv = self.qkv(x)
        if left_out is not None:
            qkv = without_tokens(qkv, left_out)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return linear(ChannelMixing.apply(qkv, self.temperature), weight, bias)
        qkv = qkv.view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)  # each (B, H, d, N), a view
        attention = channel_attention(q, k, self.temperature)  # (B, H, d, d)
        mixed = v.mT @ attention.mT  # (B, H, N, d)
        return linear(mixed.transpose(1, 2).reshape(B, N, C), weight, bias)
