"""Cross-entropy between views over prototypes (DINO, arXiv:2104.14294, section 3.1, equation 3).

Rows of the teacher sum to 1, so a pair of views costs logsumexp(s_v) - q_g . s_v, and a view's cost
against all others needs only the sum of their q: no log-softmax is built. The gradient is
softmax(s_v) minus the mean of those q, made in the logits' own memory while they are at hand.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import linear

from ssl_xcit.errors import UserError

EPS = 1e-12  # the smallest norm divided by
CHUNK = 1 << 23  # logits that exist at a time: 32 MB in float32


def dino_loss(
    student: Float[Tensor, "V B K"],
    teacher: Float[Tensor, "G B K"],
    student_temp: float,
    overwrite: bool = False,
) -> Float[Tensor, ""]:
    """Mean cross-entropy H(teacher_g, softmax(student_v / student_temp)) over the pairs of
    different views.

    Args:
        student: logits of V views; the first G are the teacher's views, in the same order.
        teacher: probabilities of the G global views; not differentiated.
        student_temp: temperature, above 0.
        overwrite: build the gradient in the logits' memory, whose values are then lost. float32
            logits only; torch raises if another backward pass still needs them.

    Returns:
        A scalar in nats, float32 at least; ln K when both are uniform. Pairs: G (V - 1). No second
        derivatives.

    Raises:
        UserError: one view, which has no other to agree with.
    """
    check_views(len(student))
    with torch.autocast(student.device.type, enabled=False):  # a difference of large sums
        if student.dtype != torch.float64:
            student = student.float()
        teacher, grad_enabled = teacher.detach().to(student.dtype), torch.is_grad_enabled()
        return LogitsLoss.apply(student, teacher, student_temp, overwrite, grad_enabled)


def prototype_loss(
    x: Float[Tensor, "V B D"],
    weight: Float[Tensor, "K D"],
    gain: Float[Tensor, "K 1"],
    teacher: Float[Tensor, "G B K"],
    student_temp: float,
) -> Float[Tensor, ""]:
    """`dino_loss` of the logits gain_k (x . w_k) / |w_k|, which exist only `CHUNK` at a time.

    Gradients are made on the way forward and kept: D values a view and K x D in all, instead of K a
    view. Under autocast the products are of low precision, all else is float32.

    Args:
        x: embeddings of V views before the prototypes; the first G are the teacher's.
        weight: directions of the prototypes, of any length.
        gain: their gains.
        teacher: probabilities of the G global views; not differentiated.
        student_temp: temperature, above 0.

    Returns:
        A scalar in nats, float32 at least, for one backward pass.

    Raises:
        UserError: one view, which has no other to agree with.
    """
    check_views(len(x))
    enabled = torch.is_grad_enabled()
    return PrototypeLoss.apply(x, weight, gain, teacher.detach(), student_temp, enabled)


def check_views(count: int) -> None:
    """Raise UserError for fewer views than the loss compares."""
    if count < 2:
        raise UserError(f"the loss needs at least 2 views, not {count}: augment.num_local from 1")


def cross_entropy_(
    z: Float[Tensor, "*rows K"], target: Float[Tensor, "*views K"]
) -> Float[Tensor, ""]:
    """Summed cross-entropy of softmax(z) with broadcast `target`; z becomes softmax(z) - target."""
    lse = z.amax(dim=-1)
    dots = vecdot(z, target)
    torch.softmax(z, dim=-1, out=z)
    lse -= z.amax(dim=-1).log()  # the largest probability is exp(largest logit - lse)
    z.sub_(target)
    return (lse - dots).sum()


def targets_by_view(teacher: Float[Tensor, "G n K"]) -> tuple[Tensor, Tensor]:
    """Targets of each global view, (G, n, K): the mean teacher of all views but its own; and of the
    local views, (n, K): the mean of all.
    """
    G, total = len(teacher), teacher.sum(dim=0)
    return (total - teacher) / max(G - 1, 1), total / G


def chunks(num_images: int, values_an_image: int) -> Iterator[slice]:
    """Yield equal parts of the images, each with about `CHUNK` logits."""
    count = min(num_images, -(-num_images * values_an_image // CHUNK))
    size = -(-num_images // count)
    for start in range(0, num_images, size):
        yield slice(start, min(start + size, num_images))


def require_unconsumed(gradients: Any) -> Any:
    """Gradients that a forward pass kept for its only backward pass.

    Raises:
        RuntimeError: a backward pass has used them up.
    """
    if gradients is None:
        raise RuntimeError("this loss keeps its gradient for one backward pass; compute it again")
    return gradients


class LogitsLoss(torch.autograd.Function):
    """See `dino_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "V B K"],
        teacher: Float[Tensor, "G B K"],
        student_temp: float,
        overwrite: bool,
        grad_enabled: bool,
    ) -> Float[Tensor, ""]:
        """Compute the loss, and beside it the gradient without its factors."""
        V, B, K = student.shape
        G = len(teacher)
        keep = grad_enabled and ctx.needs_input_grad[0]
        gradient = student if overwrite else torch.empty_like(student) if keep else None
        total = student.new_zeros(())
        for images in chunks(B, K):
            of_global, of_local = targets_by_view(teacher[:, images])
            for v in range(V):
                z = student[v, images] / student_temp if gradient is None else gradient[v, images]
                if gradient is not None:
                    torch.div(student[v, images], student_temp, out=z)
                cost = cross_entropy_(z, of_global[v] if v < G else of_local)
                total += cost * (G - 1 if v < G else G)
        if keep:
            ctx.gradient, ctx.overwrite = gradient, overwrite
            ctx.scale, ctx.num_global = 1.0 / (G * (V - 1) * B * student_temp), G
        return total / (G * (V - 1) * B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        """Multiply the kept gradient by its factors."""
        gradient = require_unconsumed(ctx.gradient)
        if ctx.overwrite:
            ctx.gradient = None
        else:
            gradient = gradient.clone()
        gradient[: ctx.num_global].mul_(grad * (ctx.scale * (ctx.num_global - 1)))
        gradient[ctx.num_global :].mul_(grad * (ctx.scale * ctx.num_global))
        return gradient, None, None, None, None


class PrototypeLoss(torch.autograd.Function):
    """See `prototype_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "V B D"],
        weight: Float[Tensor, "K D"],
        gain: Float[Tensor, "K 1"],
        teacher: Float[Tensor, "G B K"],
        student_temp: float,
        grad_enabled: bool,
    ) -> Float[Tensor, ""]:
        """Compute the loss and, with dz the gradient of a logit of unit gain and norm, sum up
        dx = dz w and dw = dz^T x beside it.
        """
        V, B, _ = x.shape
        K, G = len(weight), len(teacher)
        exact = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
        autocast = torch.is_autocast_enabled(x.device.type)
        low = torch.get_autocast_dtype(x.device.type) if autocast else exact
        pairs = torch.full((V, 1, 1), float(G), dtype=exact, device=x.device)
        pairs[:G] = G - 1
        pairs /= G * (V - 1) * B
        norm = vector_norm(weight, dim=-1, dtype=exact).clamp_min(EPS)
        scale = gain[:, 0].to(exact) / norm / student_temp  # (K,)
        keep = grad_enabled and any(ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            w, total = weight.to(low), torch.zeros((), dtype=exact, device=x.device)
            dx = torch.empty_like(x, dtype=exact) if keep else None
            dw = torch.zeros_like(weight, dtype=exact) if keep else None
            for images in chunks(B, V * K):
                rows = x[:, images].to(low)
                z = linear(rows.flatten(0, 1), w).to(exact).mul_(scale).unflatten(0, (V, -1))
                of_global, of_local = targets_by_view(teacher[:, images].to(exact))
                total += cross_entropy_(z[:G], of_global) * pairs[0, 0, 0]
                total += cross_entropy_(z[G:], of_local) * pairs[-1, 0, 0]
                if dx is not None and dw is not None:
                    weighted = (rows * pairs).flatten(0, 1).to(low)
                    low_z = z.flatten(0, 1).to(low)
                    if low == exact:
                        dw.addmm_(low_z.T, weighted)
                    else:
                        dw += low_z.T @ weighted
                    # z's buffer is free from here on
                    low_z = z.mul_(scale).flatten(0, 1).to(low)
                    torch.mul((low_z @ w).unflatten(0, (V, -1)), pairs, out=dx[:, images])
        if keep:
            ctx.save_for_backward(weight, gain, norm)
            ctx.gradients, ctx.temp, ctx.dtype = (dx, dw), student_temp, x.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and, where it is trained, the gain."""
        weight, gain, norm = ctx.saved_tensors
        dx, dw = require_unconsumed(ctx.gradients)
        ctx.gradients = None  # no second owner: no copy is made
        dgain = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            exact = weight.to(dw.dtype)
            radial = vecdot(dw, exact)  # (K,)
            # a norm that was clamped is a constant
            along = (radial / norm.square()).masked_fill_(norm <= EPS, 0.0)
            dw.addcmul_(exact, along[:, None], value=-1)
            dw *= grad * gain / (norm[:, None] * ctx.temp)
            if ctx.needs_input_grad[2]:
                dgain = (grad * radial / (norm * ctx.temp))[:, None].to(gain.dtype)
        return dx.mul_(grad).to(ctx.dtype), dw.to(weight.dtype), dgain, None, None, None
