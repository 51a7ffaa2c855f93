"""A batch split over ranks: whose images are whose, and collectives, which do nothing without a
process group.

Each rank has the same number of rows. A loss that is a mean over its own rows, computed from the
rows of all, has its value over the whole batch as the mean over ranks, and the gradient that DDP
averages is the one of a single process with the whole batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


class BatchPart(NamedTuple):
    """Which images of a step's batch a pass computes: of `total`, `size` from `start`."""

    start: int
    size: int
    total: int


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_rank(source: int, value: T) -> T:
    """What a rank has, on all ranks, which call it together."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=source)
    return values[0]


@torch.no_grad()
def gathered(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "ranks_n *rest"]:
    """Rows of all ranks in their order, without gradient."""
    x = x.detach()
    if world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def gathered_with_grad(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "ranks_n *rest"]:
    """Rows of all ranks in their order. A row's gradient is the sum of what all ranks make of it,
    so either all ranks go backward through it or none.
    """
    return x if world_size() == 1 else Gathered.apply(x)


@torch.no_grad()
def summed_(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over ranks, in the memory of `x`, without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class LateSum:
    """A sum over ranks that goes on while the host does something else.

    Args:
        x: this rank's, the same shape on all; it becomes the sum.
    """

    def __init__(self, x: Shaped[Tensor, "*shape"]):
        self.x = x
        self.work = dist.all_reduce(x, async_op=True) if world_size() > 1 else None

    def result(self) -> Shaped[Tensor, "*shape"]:
        """The sum; on a GPU what is queued next waits for it, and not the host."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.x


def averaged(values: Mapping[str, Float[Tensor, ""]]) -> dict[str, Tensor]:
    """Means over ranks, without gradient: what a batch that is split over them has as a whole."""
    if world_size() == 1:
        return dict(values)
    means = summed_(torch.stack([value.detach() for value in values.values()])) / world_size()
    return dict(zip(values, means, strict=True))


class Gathered(torch.autograd.Function):
    """See `gathered_with_grad`."""

    @staticmethod
    def forward(ctx: Any, x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "ranks_n *rest"]:
        """Gather."""
        ctx.num_rows = len(x)
        return gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Shaped[Tensor, "ranks_n *rest"]) -> Shaped[Tensor, "n *rest"]:
        """Sum over ranks what each has for these rows."""
        total = summed_(grad.clone(memory_format=torch.contiguous_format))
        return total[rank() * ctx.num_rows :][: ctx.num_rows]
