"""DINO's projection head (arXiv:2104.14294, section 3.1 and appendix C)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import linear, normalize

from ssl_xcit.errors import UserError
from ssl_xcit.models.layers import init_linear_


class NormalisedLinear(torch.autograd.Function):
    """out = gain * (x v^T) / |v|, rows of v divided by their norms without being written again.

    Gradient: with G' = G * gain / |v| and c_k = sum_b G_bk out_bk / |v_k|^2, dv = G'^T x - c v: one
    pass over K x D beside the product, where autograd takes three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "B D"],
        v: Float[Tensor, "K D"],
        gain: Float[Tensor, "K 1"],
    ) -> Float[Tensor, "B K"]:
        """Logits, in the precision of `gain`; the product is autocast."""
        norm = vector_norm(v, dim=-1).clamp_min(1e-12)
        product = linear(x, v)
        out = product * (gain[:, 0] / norm)
        ctx.save_for_backward(x, v, gain, norm, out)
        ctx.dtype = product.dtype  # of the products in the backward pass too
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "B K"]) -> tuple[Tensor | None, ...]:
        """Of x, v and, where it is trained, the gain."""
        x, v, gain, norm, out = ctx.saved_tensors
        radial = (gradients[0] * out).sum(dim=0)  # (K,)
        scaled = (gradients[0] * (gain[:, 0] / norm)).to(ctx.dtype)
        dx = (scaled @ v.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dv = dgain = None
        if ctx.needs_input_grad[1]:
            dv = (scaled.T @ x.to(ctx.dtype)).to(v.dtype)
            dv.addcmul_(v, (radial / norm.square())[:, None], value=-1)
        if ctx.needs_input_grad[2]:
            dgain = (radial / gain[:, 0])[:, None]
        return dx, dv, dgain


class Prototypes(nn.Module):
    """Linear without bias whose rows are gain * direction: `weight_v` holds directions, `weight_g`
    the gains, init 1.
    """

    def __init__(self, in_dim: int, num_prototypes: int, trainable_gain: bool):
        super().__init__()
        # torch's initial values of a linear layer, as published: 0.02 is for the layers before
        like_linear = nn.Linear(in_dim, num_prototypes, bias=False).weight
        self.weight_v = nn.Parameter(like_linear.detach())
        gain = torch.ones(num_prototypes, 1)
        self.weight_g = nn.Parameter(gain, requires_grad=trainable_gain)

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any K"]:
        """Logits, K prototypes."""
        flat = NormalisedLinear.apply(x.flatten(0, -2), self.weight_v, self.weight_g)
        return flat.unflatten(0, x.shape[:-1])


class DINOHead(nn.Module):
    """C -> hidden -> hidden -> bottleneck with GELU between, L2-normalised, then K prototypes.

    Args:
        in_dim: width C of the backbone.
        num_prototypes: K (paper: 65536; small data wants fewer).
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes.
        norm_last_layer: keep the prototypes' gains at 1 (steadier; the XCiT recipe turns it off).
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        if num_prototypes < 2:
            raise UserError(f"num_prototypes={num_prototypes}: at least 2, or the loss is always 0")
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, not norm_last_layer)
        self.apply(init_linear_)

    def forward(self, x: Float[Tensor, "*any C"]) -> Float[Tensor, "*any K"]:
        """Logits before centering and temperature."""
        return self.last_layer(normalize(self.mlp(x), dim=-1))
