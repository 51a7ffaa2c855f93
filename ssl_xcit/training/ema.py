"""The momentum teacher (DINO, arXiv:2104.14294, section 3.1)."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only.

    BatchNorm statistics are buffers, and each network keeps its own.
    """
    theirs: list[Tensor] = list(teacher.parameters())
    ours: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(theirs, ours, 1.0 - momentum)
