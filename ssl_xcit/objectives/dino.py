"""Self-distillation with no labels: loss, centering, sharpening (DINO, arXiv:2104.14294, section
3.1, algorithm 1).
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError


def dino_loss(
    student: Float[Tensor, "V B K"], teacher: Float[Tensor, "G B K"], student_temp: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy H(teacher_g, softmax(student_v / student_temp)) over the pairs of
    different views.

    Rows of the teacher sum to 1, so a pair costs logsumexp(s_v) - q_g . s_v, and its sum over g
    needs only the sum of the q_g: no log-softmax is built.

    Args:
        student: logits of V views; the first G are the teacher's views, in the same order.
        teacher: probabilities of the G global views; not differentiated.
        student_temp: temperature, above 0.

    Returns:
        A scalar in nats; ln K when both are uniform. Pairs: G (V - 1).
    """
    V, B, _ = student.shape
    G = teacher.shape[0]
    with torch.autocast(student.device.type, enabled=False):  # a difference of large sums
        logits, teacher = student.float() / student_temp, teacher.float()
        lse = logits.logsumexp(dim=-1)  # (V, B)
        every = teacher.sum(dim=0)  # (B, K), the targets of a local view
        total = G * lse.sum() - torch.einsum("vbk,bk->", logits[G:], every)
        total = total - lse[:G].sum()
        total = total - torch.einsum("gbk,gbk->", logits[:G], every - teacher)
        return total / (G * (V - 1) * B)


class Center(nn.Module):
    """Running mean of the teacher's logits, subtracted before its softmax so that no prototype wins
    everywhere.

    center <- momentum * center + (1 - momentum) * mean over views, images and ranks (equation 4);
    zeros at first. It is a buffer: a checkpoint carries it.

    Args:
        num_prototypes: K.
        momentum: of the running mean, in [0, 1).
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"center_momentum={momentum}: a number in [0, 1); the paper has 0.9")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    def targets(self, logits: Float[Tensor, "G B K"], temperature: float) -> Float[Tensor, "G B K"]:
        """softmax((logits - center) / temperature), with the center of the steps before."""
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update_(self, logits: Float[Tensor, "G B K"]) -> None:
        """Take in this step's logits, of all ranks."""
        mean = logits.float().mean(dim=(0, 1))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1.0 - self.momentum)
