"""BatchNorm with the statistics of all ranks' images, on any device (torch's SyncBatchNorm refuses
CPUs), so that a batch that is split over ranks is normalised as it is on one.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_xcit.utils.validation import BatchNormScope

aten = torch.ops.aten


class SharedBatchNorm(_BatchNorm):
    """BatchNorm over the batches of a group of ranks, of one image or more each; the state is
    BatchNorm's.

    Each training pass exchanges a mean and a variance a channel forward, and two sums backward.

    Args:
        norm: what it stands for; its parameters and buffers are taken, not copied.
        group: the ranks; None: all.
    """

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup | None = None):
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
            device="meta",
        )  # fmt: skip
        self.group = group
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions behind images and channels."""

    def forward(self, input: Float[Tensor, "B C *rest"]) -> Float[Tensor, "B C *rest"]:
        """Normalise each channel by all ranks' images in training, by running statistics else."""
        x = input
        if not self.training or dist.get_world_size(self.group) == 1:
            return super().forward(x)
        out, mean, var, count = SharedNormalisation.apply(
            x, self.weight, self.bias, self.eps, self.group
        )
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None  # noqa: PT018
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * (count / (count - 1.0).clamp_min(1.0))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return out


class SharedNormalisation(torch.autograd.Function):
    """See `SharedBatchNorm`: (output, mean, biased variance, number of values a channel), the last
    three of all ranks and without gradient.

    Means and variances of the ranks are combined, not sums of squares, in which small variances
    would be lost. In the backward pass the gradient with constant statistics is torch's; what the
    statistics add is a + b x a channel, from the sums of the gradient and of the gradient times
    the output over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "B C *rest"],
        weight: Float[Tensor, " C"] | None,
        bias: Float[Tensor, " C"] | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One exchange of 2 C + 1 numbers."""
        exact = torch.promote_types(x.dtype, torch.float32)
        C = x.shape[1]
        ones = x.new_ones(C, dtype=exact)
        own_mean, own_var = aten.batch_norm_update_stats(x, torch.zeros_like(ones), ones, 0.0)
        own = torch.cat((own_mean, own_var, ones.new_tensor([x.numel() // C]))).to(exact)
        every = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather(list(every.unbind()), own, group=group)
        means, variances, counts = every[:, :C], every[:, C:-1], every[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(dim=0) / count
        var = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
        out = batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B C *rest"], *_: Tensor) -> tuple[Any, ...]:
        """One exchange of 2 C numbers; gradients of weight and bias are this rank's."""
        x, weight, mean, var, count = ctx.saved_tensors
        gain = torch.ones_like(mean) if weight is None else weight
        dx, d_gain, d_shift = aten.native_batch_norm_backward(
            grad, x, gain, mean, var, None, None, False, ctx.eps, (True, True, True)
        )
        sums = torch.stack((d_shift, d_gain)).to(mean.dtype)
        dist.all_reduce(sums, group=ctx.group)
        scale = (var + ctx.eps).rsqrt()
        of_shift, of_gain = sums / count * (gain.to(mean.dtype) * scale)
        b = of_gain * scale
        a = of_shift - b * mean
        by_channel = (1, -1, *[1] * (x.ndim - 2))
        dx = (dx - torch.addcmul(a.view(by_channel), b.view(by_channel), x)).to(x.dtype)
        if weight is None:
            return dx, None, None, None, None
        return dx, d_gain.to(weight.dtype), d_shift.to(weight.dtype), None, None


def share_batch_norm(
    module: nn.Module, scope: BatchNormScope = "global", ranks_per_node: int = 1
) -> None:
    """Let every BatchNorm inside a module take the statistics of all ranks, or of those of its
    machine, or leave it with its own; names, parameters and buffers stay. For all ranks to call.
    """
    if scope == "local":
        return
    group = dist.new_subgroups(ranks_per_node)[0] if scope == "node" else None
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SharedBatchNorm):
                setattr(parent, name, SharedBatchNorm(child, group))
