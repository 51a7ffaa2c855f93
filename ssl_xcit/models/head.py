"""Projection heads: DINO's (arXiv:2104.14294, section 3.1 and appendix C), and one for embeddings
that are compared with each other (as in MoCo v3, arXiv:2104.02057, section 4).
"""

from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import linear, normalize

from ssl_xcit.models.layers import init_linear_
from ssl_xcit.utils.validation import Count


class Prototypes(nn.Module):
    """Linear without bias; rows are gain (`weight_g`, init 1) * direction (`weight_v`)."""

    def __init__(self, in_dim: int, num_prototypes: int, trainable_gain: bool):
        super().__init__()
        # torch's initial values of a linear layer, as published: 0.02 is for the layers before
        like_linear = nn.Linear(in_dim, num_prototypes, bias=False).weight
        self.weight_v = nn.Parameter(like_linear.detach())
        gain = torch.ones(num_prototypes, 1)
        self.weight_g = nn.Parameter(gain, requires_grad=trainable_gain)

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any K"]:
        """Logits of K prototypes: the product is divided by the norms, not the weights. Training
        computes them together with the loss, see `objectives.dino.prototype_loss`.
        """
        norm = vector_norm(self.weight_v, dim=-1).clamp_min(1e-12)
        return linear(x, self.weight_v) * (self.weight_g[:, 0] / norm)


class DINOHead(nn.Module):
    """C -> hidden -> hidden -> bottleneck with GELU between, L2-normalised, then K prototypes.

    Args:
        in_dim: width C of the backbone.
        num_prototypes: K (paper: 65536; small data wants fewer); of one the loss is always 0.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes.
        norm_last_layer: keep the prototypes' gains at 1 (steadier; the XCiT recipe turns it off).
    """

    def __init__(
        self,
        in_dim: Count,
        num_prototypes: Annotated[int, Ge(2)] = 65536,
        hidden_dim: Count = 2048,
        bottleneck_dim: Count = 256,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, not norm_last_layer)
        self.apply(init_linear_)

    def embed(self, x: Float[Tensor, "*any C"]) -> Float[Tensor, "*any D"]:
        """The bottleneck, of length 1, to be compared with the prototypes."""
        return normalize(self.mlp(x), dim=-1)

    def forward(self, x: Float[Tensor, "*any C"]) -> Float[Tensor, "*any K"]:
        """Logits before centering and temperature."""
        return self.last_layer(self.embed(x))


class ProjectionHead(nn.Module):
    """C -> hidden -> ... -> D with GELU between; not normalised.

    Args:
        in_dim: width C of the backbone.
        out_dim: width D of the embeddings.
        num_layers: linear layers; 1: a linear projection.
        hidden_dim: width between them.
        batch_norm: BatchNorm after each linear layer, after the last one without gain and bias:
            embeddings of a batch cannot become alike in a direction.
    """

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count = 256,
        num_layers: Count = 2,
        hidden_dim: Count = 2048,
        batch_norm: bool = True,
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
            layers.append(nn.Linear(width_in, width_out, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width_out, affine=i < num_layers))
            if i < num_layers:
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.apply(init_linear_)

    def forward(self, x: Float[Tensor, "*any C"]) -> Float[Tensor, "*any D"]:
        """Embeddings."""
        return self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class MaskedHead(nn.Module):
    """A head of patches, with what stands for patches that are masked.

    Args:
        projection: C to whatever the objective compares.
        embed_dim: width C.
    """

    def __init__(self, projection: nn.Module, embed_dim: Count):
        super().__init__()
        self.projection = projection
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x: Float[Tensor, "*any C"]) -> Tensor:
        """The projection."""
        output: Tensor = self.projection(x)
        return output
