"""Coding rate of embeddings, and self-distillation that needs nothing else against collapse
(SimDINO, arXiv:2502.10385, section 3; the coding rate is that of arXiv:2006.08558, section 2).

The paper leaves to its code the balance gamma = (p + N m) / (p N m), for width p and N ranks with m
images each, and which views are spread: the student's global ones, each by itself. The code divides
by the rows of all ranks, but sums Z^T Z over ranks only if asked to, so its loss depends on how a
batch is split; here Z has the rows of all ranks. The coding rate's eps^2 is `eps`, as in the code.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import normalize

from ssl_xcit.objectives.prototype_loss import check_views
from ssl_xcit.utils.ranks import gathered_with_grad


def coding_rate(z: Float[Tensor, "m D"], eps: float = 0.05) -> Float[Tensor, ""]:
    """1/2 log det(I + D / (m eps) Z^T Z): nats for a row of Z if coded to a squared error of eps.

    det(I + A B) = det(I + B A), so the smaller of Z^T Z and Z Z^T serves (Sylvester).

    Args:
        z: rows of unit length.
        eps: squared error, above 0.

    Returns:
        A scalar, float32 at least; not below 0, and at most D/2 log(1 + 1/eps) for m >= D.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        m, D = z.shape
        gram = z.mT @ z if m >= D else z @ z.mT
        shifted = gram * (D / (m * eps)) + torch.eye(len(gram), dtype=z.dtype, device=z.device)
        # half the log of a determinant; what is not finite comes out as nan, and raises nothing
        return torch.linalg.cholesky_ex(shifted).L.diagonal().log().sum()


def isotropy(features: Float[Tensor, "B C"], eps: float = 0.05) -> Float[Tensor, ""]:
    """How evenly features fill all directions: the coding rate of all their rows, of all ranks,
    scaled to length 1, as a share of the largest that so many rows may have.

    Args:
        features: of a view of this rank's B images.
        eps: see `coding_rate`; directions with less than this share of the mean variance hardly
            count.

    Returns:
        A scalar in [0, 1], float32 at least; 1 where all directions have the same second moment, or
        with fewer rows than these where rows are orthogonal.
    """
    exact = features.dtype if features.dtype == torch.float64 else torch.float32
    rows = gathered_with_grad(normalize(features.to(exact), dim=-1))
    rank, D = min(rows.shape), rows.shape[1]
    return coding_rate(rows, eps) / (rank / 2 * math.log1p(D / (rank * eps)))


def simdino_loss(
    student: Float[Tensor, "V B D"],
    teacher: Float[Tensor, "G B D"],
    eps: float = 0.05,
    gamma: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Minus the mean cosine of student and teacher over pairs of different views, minus gamma times
    the mean coding rate of the student's global views.

    Args:
        student: embeddings of V views of this rank; the first G are the teacher's, in the same
            order.
        teacher: embeddings of the G global views; not differentiated.
        eps: see `coding_rate`.
        gamma: weight of the coding rate; None: 1/D + 1/(images of all ranks).

    Returns:
        The loss, float32 at least, and for the log `distance`, half the mean squared distance (1 -
        cosine), and `coding_rate`.

    Raises:
        UserError: one view, which has no other to be near.
    """
    check_views(len(student))
    with torch.autocast(student.device.type, enabled=False):
        exact = student.dtype if student.dtype == torch.float64 else torch.float32
        ours = normalize(student.to(exact), dim=-1)
        theirs = normalize(teacher.detach().to(exact), dim=-1)
        (V, B, D), G = ours.shape, len(theirs)
        dots = vecdot(ours, theirs.sum(dim=0)).sum() - vecdot(ours[:G], theirs).sum()
        cosine = dots / (G * (V - 1) * B)
        views = gathered_with_grad(ours[:G].transpose(0, 1)).transpose(0, 1)  # (G, ranks B, D)
        rate = torch.stack([coding_rate(view, eps) for view in views]).mean()
        if gamma is None:
            gamma = 1 / D + 1 / views.shape[1]
        numbers = {"distance": 1 - cosine.detach(), "coding_rate": rate.detach()}
        return -cosine - gamma * rate, numbers
