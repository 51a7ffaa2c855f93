"""Entropy of a batch of embeddings by its nearest neighbours (Kozachenko and Leonenko; KoLeo,
arXiv:1806.03198, section 3.1; in DINOv2, arXiv:2304.07193, section 4).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from ssl_xcit.errors import UserError
from ssl_xcit.utils.ranks import gathered_with_grad, rank

EPS = 1e-8  # added to distances


def koleo_loss(x: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """-mean_i log(|z_i - z_n(i)| + 1e-8), z_i = x_i / |x_i|, n(i) the nearest other image of all
    ranks; DINOv2 looks among those of its own rank.

    Twins, at distance 0, cost 18.4 and do not move; what is nearly a twin has a gradient of up to
    1 / (B (distance + 1e-8)), so gradients have to be clipped.

    Args:
        x: embeddings of one view, of any length.

    Returns:
        A scalar, float32 at least, from -log 2 up; the lower, the more spread.

    Raises:
        UserError: one image in all.
    """
    with torch.autocast(x.device.type, enabled=False):
        z = normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        everyone = gathered_with_grad(z)  # (ranks B, D)
        if len(everyone) < 2:
            raise UserError(
                "objective.koleo: a batch of one image has no neighbours; raise batch_size, or set "
                "objective.koleo=0"
            )
        with torch.no_grad():
            similarity = z @ everyone.mT
            own = torch.arange(len(z), device=z.device)
            similarity[own, own + rank() * len(z)] = -torch.inf
            nearest = similarity.argmax(dim=-1)
        # the norm's gradient at 0 is 0
        return -(vector_norm(z - everyone[nearest], dim=-1) + EPS).log().mean()
