"""Cross-entropy at masked patches (iBOT, arXiv:2111.07832, the loss L_MIM).

The teacher sees the whole view, the student the masked one, and each masked patch is compared with
itself. An image's loss is the mean over its masked patches, and the loss is the mean over all
images, where one without a mask counts 0, as in the code of iBOT and of DINOv2.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vecdot

from ssl_xcit.objectives.prototype_loss import CHUNK, require_unconsumed


def ibot_loss(
    student: Float[Tensor, "M K"],
    teacher: Float[Tensor, "M K"],
    weights: Float[Tensor, " M"],
    num_images: int,
    student_temp: float,
) -> Float[Tensor, ""]:
    """sum_m weights_m H(teacher_m, softmax(student_m / student_temp)) / num_images.

    The divisor does not depend on the masks. So ranks with equally many images need no
    communication: the mean of their gradients, as DDP takes it, is that of all images. The same
    holds for parts of a batch.

    Args:
        student: logits at the masked patches of all images.
        teacher: probabilities at the same patches; not differentiated.
        weights: 1 / (masked patches of its image) of each patch.
        num_images: B of this rank, those without a mask included; with two masked views an image,
            the number of views.
        student_temp: temperature, above 0.

    Returns:
        A scalar in nats, float32 at least, for one backward pass; 0 without any masked patch, with
        gradients of 0. No second derivatives.
    """
    enabled = torch.is_grad_enabled()
    return PatchLoss.apply(student, teacher.detach(), weights, num_images, student_temp, enabled)


class PatchLoss(torch.autograd.Function):
    """See `ibot_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "M K"],
        teacher: Float[Tensor, "M K"],
        weights: Float[Tensor, " M"],
        num_images: int,
        student_temp: float,
        grad_enabled: bool,
    ) -> Float[Tensor, ""]:
        """Compute the loss and beside it its gradient, with about `CHUNK` log-probabilities at a
        time.
        """
        exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        keep = grad_enabled and ctx.needs_input_grad[0]
        gradient = torch.empty_like(student, dtype=exact) if keep else None
        total = student.new_zeros((), dtype=exact)
        size = max(1, CHUNK // student.shape[1])
        with torch.autocast(student.device.type, enabled=False):
            for start in range(0, len(student), size):
                part = slice(start, start + size)
                log_p = (student[part].to(exact) / student_temp).log_softmax(dim=-1)
                target, weight = teacher[part].to(exact), weights[part].to(exact) / num_images
                total -= (vecdot(log_p, target) * weight).sum()
                if gradient is not None:
                    scale = weight[:, None] / student_temp
                    torch.mul(log_p.exp_().sub_(target), scale, out=gradient[part])
        if keep:
            ctx.gradient, ctx.dtype = gradient, student.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        """Multiply the kept gradient by that of the loss."""
        gradient = require_unconsumed(ctx.gradient)
        ctx.gradient = None  # no second owner: no copy is made
        return gradient.mul_(grad).to(ctx.dtype), None, None, None, None, None
