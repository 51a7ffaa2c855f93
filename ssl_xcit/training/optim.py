"""Parameter groups, gradient clipping and the momentum teacher (DINO, arXiv:2104.14294)."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def parameter_groups(*modules: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and without (biases and whatever has
    one dimension).

    The second group carries `weight_decay: 0.0`; the first takes the optimizer's. XCA's temperature
    (H, 1, 1) and the class token (1, 1, C) have more dimensions and are decayed, as published.
    """
    named = [
        item for module in modules for item in module.named_parameters() if item[1].requires_grad
    ]
    plain = [p for name, p in named if name.endswith("bias") or p.ndim == 1]
    decayed = [p for name, p in named if not (name.endswith("bias") or p.ndim == 1)]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, " P"]:
    """Scale the gradient of each tensor by itself to an L2 norm of at most `max_norm`.

    Not the norm over all of them, which `torch.nn.utils.clip_grad_norm_` limits.

    Returns:
        The L2 norms before clipping, one a trainable tensor, for the log; 0 without a gradient.
    """
    trained = [p for p in parameters if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    scales = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(gradients, list(scales.unbind()))
    if len(gradients) == len(trained):
        return norms
    there = torch.tensor([p.grad is not None for p in trained], device=norms.device)
    return norms.new_zeros(len(trained)).masked_scatter_(there, norms)


@torch.no_grad()
def clip_all_(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Float[Tensor, " P"]:
    """Scale all gradients by one factor to an L2 norm of at most `max_norm` over all of them.

    Returns:
        The L2 norms before clipping, one a trainable tensor, for the log; 0 without a gradient.
    """
    trained = [p for p in parameters if p.requires_grad]
    zero = torch.zeros((), device=trained[0].device)
    norms = torch.stack([zero if p.grad is None else p.grad.norm() for p in trained])
    gradients = [p.grad for p in trained if p.grad is not None]
    if max_norm is not None and gradients:
        scale = (max_norm / (norms.norm() + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_(gradients, scale)
    return norms


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only.

    BatchNorm statistics are buffers, and each network keeps its own.
    """
    theirs: list[Tensor] = list(teacher.parameters())
    ours: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(theirs, ours, 1.0 - momentum)


@torch.no_grad()
def copy_buffers_(teacher: nn.Module, student: nn.Module) -> None:
    """teacher <- student, BatchNorm's running statistics: for a teacher that sees no images."""
    torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))
