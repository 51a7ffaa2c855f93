"""Balanced assignment to prototypes (Sinkhorn-Knopp; SwAV, arXiv:2006.09882, section 3.1, equation
3; as a teacher's targets in DINOv2, arXiv:2304.07193).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.utils.ranks import gathered


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "B K"], temperature: float, iterations: int = 3
) -> Float[Tensor, "B K"]:
    """Rows of exp(logits / temperature), scaled in turn so that each prototype gets the same share
    of all ranks' rows, and each row sums to 1.

    In logarithms: at a low temperature nothing overflows, and neither a row nor a prototype far
    from all others vanishes. Shares of 1/K and 1/B are factors that the next step cancels.

    Args:
        logits: of the rows of this rank.
        temperature: above 0; epsilon of SwAV, the teacher's of DINOv2.
        iterations: at least 1; the prototypes come first, the rows last.

    Returns:
        Probabilities, float32 at least; those of a prototype sum to about ranks B / K over ranks.
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits if logits.dtype == torch.float64 else logits.float()
        log_rows = exact / temperature
        for _ in range(iterations):
            log_rows -= gathered(log_rows.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
            log_rows = log_rows.log_softmax(dim=-1)
        return log_rows.exp_()


def check_prototypes(num_prototypes: int, batch_rows: int, key: str = "objective") -> None:
    """Check that there are enough rows to balance.

    Args:
        num_prototypes: K.
        batch_rows: rows that are assigned at a time: of all ranks, images and global views.
        key: of the settings, for messages.

    Raises:
        UserError: more prototypes than rows: a share is then less than a row, and all rows get
            nearly the same targets.
    """
    if num_prototypes > batch_rows:
        raise UserError(
            f"{key}.num_prototypes={num_prototypes}: Sinkhorn-Knopp gives each prototype the "
            f"same share of the {batch_rows} rows of a batch, less than one row; lower "
            f"{key}.num_prototypes to {max(2, batch_rows // 2)} or so, raise batch_size, or lower "
            "trainer.accumulate"
        )
