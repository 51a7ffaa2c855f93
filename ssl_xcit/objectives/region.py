"""Cross-entropy between matched patches (region-level task of EsViT, arXiv:2106.09785, section 3.2,
equation 2).

Patches are matched by the cosine of what the student's and the teacher's backbones give, before the
heads. A patch's cost against its matches in all global views is the one against their mean
probabilities, see `prototype_loss`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from ssl_xcit.objectives.prototype_loss import (
    check_views,
    chunks,
    cross_entropy_,
    require_unconsumed,
)


def region_loss(
    student: Sequence[Float[Tensor, "_ B _ K"]],
    student_features: Sequence[Float[Tensor, "_ B _ C"]],
    teacher: Float[Tensor, "G B M K"],
    teacher_features: Float[Tensor, "G B M C"],
    student_temp: float,
) -> Float[Tensor, ""]:
    """Mean over pairs of different views (v, g), images and patches i of
    H(teacher_gj, softmax(student_vi / student_temp)), j = argmax_j cos(features_vi, features_gj).

    Gradients are made on the way forward, in memory of the logits' size and type; a target for each
    patch exists for a few images at a time (`CHUNK`), and none for each pair of patches.

    Args:
        student: logits (v, B, N, K), one tensor a resolution; of all views in this order the first
            G are the teacher's.
        student_features: of the backbone (v, B, N, C), for the same patches; not differentiated.
        teacher: probabilities of the M patches of the G global views; not differentiated.
        teacher_features: of the backbone, for the same patches.
        student_temp: temperature, above 0.

    Returns:
        A scalar in nats, float32 at least; ln K when all is uniform. For one backward pass.

    Raises:
        UserError: one view, which has no other to agree with.
    """
    counts = [len(logits) for logits in student]
    check_views(sum(counts))
    pairs, enabled = len(teacher) * (sum(counts) - 1), torch.is_grad_enabled()
    losses, first = [], 0
    with torch.autocast(teacher.device.type, enabled=False):
        for logits, features in zip(student, student_features, strict=True):
            matches = nearest_patches(features, teacher_features)
            losses.append(
                MatchedLoss.apply(
                    logits, teacher.detach(), matches, first, student_temp, pairs, enabled
                )
            )
            first += len(logits)
        return torch.stack(losses).sum()


@torch.no_grad()
def nearest_patches(
    student: Float[Tensor, "v B N C"], teacher: Float[Tensor, "G B M C"]
) -> Int[Tensor, "v G B N"]:
    """Index of the most similar of the M patches of each global view, by the cosine."""
    exact = student.dtype if student.dtype == torch.float64 else torch.float32
    theirs = normalize(teacher.to(exact), dim=-1).mT  # (G, B, C, M)
    return torch.stack(
        [
            torch.stack([(view.to(exact) @ of_view).argmax(dim=-1) for of_view in theirs])
            for view in student  # its own length does not change the order
        ]
    )


class MatchedLoss(torch.autograd.Function):
    """See `region_loss`: the part of the views of one resolution."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "v B N K"],
        teacher: Float[Tensor, "G B M K"],
        matches: Int[Tensor, "v G B N"],
        first: int,
        student_temp: float,
        pairs: int,
        grad_enabled: bool,
    ) -> Float[Tensor, ""]:
        """Compute the loss, and beside it the gradient without its factors."""
        v, B, N, K = student.shape
        exact = student.dtype if student.dtype == torch.float64 else torch.float32
        gradient = torch.zeros_like(student) if grad_enabled and ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=exact, device=student.device)
        others = [[g for g in range(len(teacher)) if g != first + view] for view in range(v)]
        weights = [len(of_view) / (pairs * B * N) for of_view in others]
        for view in (view for view in range(v) if others[view]):
            for images in chunks(B, N * K):
                z = student[view, images].to(exact) / student_temp  # (b, N, K)
                target, image = torch.zeros_like(z), torch.arange(len(z), device=z.device)[:, None]
                for g in others[view]:
                    target += teacher[g, images][image, matches[view, g, images]]
                total += cross_entropy_(z, target.div_(len(others[view]))) * weights[view]
                if gradient is not None:
                    gradient[view, images] = z
        ctx.gradient, ctx.weights, ctx.temp = gradient, weights, student_temp
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        """Multiply the kept gradient by its factors."""
        gradient = require_unconsumed(ctx.gradient)
        ctx.gradient = None
        for view, weight in zip(gradient, ctx.weights, strict=True):
            view.mul_(grad * (weight / ctx.temp))
        return gradient, *[None] * 6
