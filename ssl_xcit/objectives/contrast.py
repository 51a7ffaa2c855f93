"""Contrastive loss of a student against a momentum teacher (InfoNCE; MoCo v3, arXiv:2104.02057,
equation 1; with a queue, MoCo, arXiv:1911.05722, equation 1).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.prototype_loss import check_views
from ssl_xcit.utils.ranks import gathered, rank


def info_nce(
    student: Float[Tensor, "V B D"],
    teacher: Float[Tensor, "G B D"],
    temperature: float,
    queue: Float[Tensor, "Q D"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over pairs of different views (v, g) and images b of -log softmax_k(s_vb . t_gk /
    temperature) at k = b, where k runs over all ranks' images and the queue; s, t and the queue are
    of unit length.

    The paper has two views, sums their two terms and multiplies them by 2 temperature; this is the
    mean, not multiplied.

    Args:
        student: embeddings of V views of this rank; the first G are the teacher's, in the same
            order.
        teacher: embeddings of the G global views; not differentiated.
        temperature: above 0.
        queue: embeddings of earlier images, the same on all ranks; may be empty.

    Returns:
        A scalar in nats, float32 at least; log of the number of candidates if all are alike.

    Raises:
        UserError: one view, or one image in all and no queue.
    """
    check_views(len(student))
    with torch.autocast(student.device.type, enabled=False):
        exact = student.dtype if student.dtype == torch.float64 else torch.float32
        ours = normalize(student.to(exact), dim=-1) / temperature
        theirs = normalize(teacher.detach().to(exact), dim=-1)
        everyone = gathered(theirs.transpose(0, 1)).transpose(0, 1)  # (G, ranks B, D)
        if everyone.shape[1] < 2 and queue is None:
            raise UserError(
                "batch_size=1: an image is told from the others of its batch, and there are none; "
                "raise batch_size, or set objective.queue"
            )
        earlier = [] if queue is None else [normalize(queue.detach().to(exact), dim=-1)]
        V, B, _ = ours.shape
        own = torch.arange(B, device=ours.device).add_(rank() * B).repeat(V - 1)
        losses = []
        for g, of_view in enumerate(everyone):
            others = torch.cat((ours[:g], ours[g + 1 :])).flatten(0, 1)
            losses.append(cross_entropy(others @ torch.cat((of_view, *earlier)).mT, own))
        return torch.stack(losses).mean()
