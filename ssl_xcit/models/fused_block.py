"""The three branches of an XCA block with their norm and residual connection, for training and
inference on a CPU: products by torch, all that is between them by `kernels`.

Each equals x + factor * branch(norm(x)) as `xcit.XCABlock` writes it out. Activations between
products are float32, or bfloat16 under autocast; statistics, sums, the residual stream x and its
gradient are float32. For the backward pass x and what the large products gave are kept; norms, GELU
and attention are computed again, inside the cache. No second derivatives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ssl_xcit.models.kernels import BAND, NAMES, Kernels
from ssl_xcit.models.layers import DropPath, autocasting, scaled


class Samples(NamedTuple):
    """Which samples of a batch of B take a branch; `kept=None`: all."""

    kept: Int32[Tensor, " K"] | None  # the samples
    slot: Int32[Tensor, " B"] | None  # the place of each among them, or -1
    scale: float  # of the branch


ALL = Samples(None, None, 1.0)


def applies(x: Tensor, module: nn.Module) -> bool:
    """Whether there are kernels for such tokens or pixels and a module's weights."""
    return (
        type(x) in (Tensor, FakeTensor)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and precision_of(x) in NAMES
        and all(weight.dtype == torch.float32 for weight in module.parameters())
        and not is_watched(module)
    )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for a layer inside to be called, which the kernels would not do."""
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        for layer in module.modules()
        if layer is not module
    )


def precision_of(x: Tensor) -> torch.dtype:
    """What activations are kept in."""
    return torch.get_autocast_dtype("cpu") if autocasting(x.device) else x.dtype


def samples_of(drop_path: DropPath, x: Float[Tensor, "B N C"]) -> Samples:
    """Draw who drops the branch."""
    factor = drop_path.draw(x)
    if factor is None:
        return ALL
    is_kept = factor.flatten() > 0
    slot = is_kept.cumsum(0, dtype=torch.int32).sub_(1).masked_fill_(~is_kept, -1)
    kept = is_kept.nonzero().flatten().to(torch.int32)
    return Samples(kept, slot, 1.0 / (1.0 - drop_path.rate))


class Branch:
    """What the branches of tokens share: shapes, the norm before and the sum behind."""

    def __init__(
        self, kernels: Kernels, x: Tensor, norm: nn.LayerNorm, samples: Samples, low: torch.dtype
    ):
        self.kernels, self.samples, self.low, self.eps = kernels, samples, low, float(norm.eps)
        self.B, self.N, self.C = x.shape
        self.images = self.B if samples.kept is None else len(samples.kept)
        self.rows = self.images * self.N
        self.keeps = torch.is_grad_enabled()

    def normed(self, x: Tensor, gain: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
        """The norm of those that take the branch, (rows, C)."""
        out = x.new_empty(self.rows, self.C, dtype=self.low) if out is None else out
        self.kernels(
            "layer_norm", self.low, x, self.samples.kept, self.rows, self.N, self.C, gain, shift,
            self.eps, out,
        )  # fmt: skip
        return out

    def added(self, x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
        """x + scale * (branch + bias)."""
        out = torch.empty_like(x)
        self.kernels(
            "residual", self.low, x, branch, bias, self.samples.slot, self.samples.scale,
            self.B * self.N, self.N, self.C, out,
        )  # fmt: skip
        return out

    def of_branch(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the branch, (rows, C), and of its bias."""
        out = grad.new_empty(self.rows, self.C, dtype=self.low)
        d_bias = grad.new_empty(self.C)
        self.kernels(
            "residual_backward", self.low, grad, self.samples.kept, self.samples.scale, self.rows,
            self.N, self.C, out, d_bias,
        )  # fmt: skip
        return out, d_bias

    def of_norm(
        self, d_normed: Tensor, x: Tensor, gain: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, both ways, and of the norm's gain and shift."""
        dx, sums = torch.empty_like(x), gain.new_empty(2, self.C)
        self.kernels(
            "layer_norm_backward", self.low, d_normed, x, self.samples.slot, grad,
            self.B * self.N, self.N, self.C, gain, self.eps, dx, sums,
        )  # fmt: skip
        return dx, sums[0], sums[1]


class MLPBranch(torch.autograd.Function):
    """x + scale * MLP(norm(x))."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Branch,
        x: Float[Tensor, "B N C"],
        gain: Float[Tensor, " C"],
        shift: Float[Tensor, " C"],
        weight1: Float[Tensor, "hidden C"],
        bias1: Float[Tensor, " hidden"],
        weight2: Float[Tensor, "C hidden"],
        bias2: Float[Tensor, " C"],
    ) -> Float[Tensor, "B N C"]:
        """Keep x and the hidden layer before its bias."""
        low = branch.low
        w1, w2 = weight1.to(low), weight2.to(low)
        normed = branch.normed(x, gain, shift)
        inner = normed @ w1.T
        active = torch.empty_like(inner) if branch.keeps else inner
        branch.kernels("bias_gelu", low, inner, bias1, branch.rows, len(w1), active)
        ctx.branch = branch
        ctx.save_for_backward(x, gain, shift, w1, bias1, w2, inner)
        return branch.added(x, torch.mm(active, w2.T, out=normed), bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B N C"]) -> tuple[Tensor | None, ...]:
        """Gradients of the weights are summed in `low`'s products."""
        x, gain, shift, w1, bias1, w2, inner = ctx.saved_tensors
        branch: Branch = ctx.branch
        grad = grad.contiguous()
        d_out, d_bias2 = branch.of_branch(grad)
        d_inner, active, d_bias1 = d_out @ w2, torch.empty_like(inner), torch.empty_like(bias1)
        branch.kernels(
            "bias_gelu_backward", branch.low, inner, bias1, branch.rows, len(w1), d_inner, active,
            d_bias1,
        )  # fmt: skip
        d_weight2 = d_out.T @ active
        normed = branch.normed(x, gain, shift, d_out)
        d_weight1 = d_inner.T @ normed
        dx, d_gain, d_shift = branch.of_norm(torch.mm(d_inner, w1, out=normed), x, gain, grad)
        return (
            None, dx, d_gain, d_shift, d_weight1.to(x.dtype), d_bias1, d_weight2.to(x.dtype),
            d_bias2,
        )  # fmt: skip


class AttentionBranch(torch.autograd.Function):
    """x + scale * XCA(norm(x)), in the direct form of `xca`."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Branch,
        x: Float[Tensor, "B N C"],
        gain: Float[Tensor, " C"],
        shift: Float[Tensor, " C"],
        weight_qkv: Float[Tensor, "qkv C"],
        bias_qkv: Float[Tensor, " qkv"],
        temperature: Float[Tensor, "H 1 1"],
        weight_proj: Float[Tensor, "C C"],
        bias_proj: Float[Tensor, " C"],
    ) -> Float[Tensor, "B N C"]:
        """Keep x, q, k and v before their biases, and the mixed channels."""
        low, H = branch.low, len(temperature)
        w_qkv, w_proj = weight_qkv.to(low), weight_proj.to(low)
        normed = branch.normed(x, gain, shift)
        qkv = normed @ w_qkv.T
        mixed = torch.empty_like(normed)
        branch.kernels(
            "channel_mixing", low, qkv, bias_qkv, temperature, branch.images, branch.N, H,
            branch.C // H, mixed,
        )  # fmt: skip
        ctx.branch = branch
        ctx.save_for_backward(x, gain, shift, w_qkv, bias_qkv, temperature, w_proj, qkv, mixed)
        return branch.added(x, torch.mm(mixed, w_proj.T, out=normed), bias_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B N C"]) -> tuple[Tensor | None, ...]:
        """As `xca.ChannelMixing` derives it."""
        x, gain, shift, w_qkv, bias_qkv, temperature, w_proj, qkv, mixed = ctx.saved_tensors
        branch: Branch = ctx.branch
        H = len(temperature)
        grad = grad.contiguous()
        d_out, d_bias_proj = branch.of_branch(grad)
        d_mixed, d_weight_proj = d_out @ w_proj, d_out.T @ mixed
        d_qkv, sums = torch.empty_like(qkv), x.new_empty(len(bias_qkv) + H)
        branch.kernels(
            "channel_mixing_backward", branch.low, qkv, bias_qkv, temperature, d_mixed,
            branch.images, branch.N, H, branch.C // H, d_qkv, sums,
        )  # fmt: skip
        d_bias_qkv, d_temperature = sums.split((len(bias_qkv), H))
        normed = branch.normed(x, gain, shift, d_out)
        d_weight_qkv = d_qkv.T @ normed
        dx, d_gain, d_shift = branch.of_norm(torch.mm(d_qkv, w_qkv, out=normed), x, gain, grad)
        return (
            None, dx, d_gain, d_shift, d_weight_qkv.to(x.dtype), d_bias_qkv,
            d_temperature.view_as(temperature), d_weight_proj.to(x.dtype), d_bias_proj,
        )  # fmt: skip


def normalisation(
    bn: nn.BatchNorm2d, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(mean, 1 / deviation, times, plus) with which BatchNorm is times * x + plus: by a batch's
    mean and biased variance of so many values, with which running statistics go on, or by these.
    """
    running_mean, running_var, momentum = bn.running_mean, bn.running_var, bn.momentum
    assert running_mean is not None and running_var is not None  # noqa: PT018
    if mean is None or var is None:
        mean, var = running_mean.clone(), running_var
    else:
        assert momentum is not None and bn.num_batches_tracked is not None  # noqa: PT018
        bn.num_batches_tracked += 1
        # by .data: a pass by torch's BatchNorm may have saved them for its gradient
        running_mean.data.lerp_(mean, momentum)
        running_var.data.lerp_(var * (count / max(count - 1, 1)), momentum)
    rstd = (var + bn.eps).rsqrt()
    times = weight * rstd
    return mean, rstd, times, bias - mean * times


def has_kernels(norms: Sequence[nn.Module]) -> bool:
    """Whether there are kernels for these BatchNorms; not for those of several ranks."""
    return all(
        type(bn) is nn.BatchNorm2d and bn.momentum is not None and bn.running_mean is not None
        for bn in norms
    )


def bands_of(images: int, grid: tuple[int, int]) -> int:
    """Parts in which `LocalBranch` computes images, each by one thread."""
    rows, columns = grid
    return images * min(rows, -(-rows * columns // BAND))


class LocalBranch(torch.autograd.Function):
    """x + factor * LPI(norm(x)): in bands of an image's rows, so that all of its passes but those
    for BatchNorm's statistics stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        low: torch.dtype,
        bn: nn.BatchNorm2d,
        grid: tuple[int, int],
        factor: Float[Tensor, " B"] | None,
        eps: float,
        x: Float[Tensor, "B N C"],
        gain: Float[Tensor, " C"],
        shift: Float[Tensor, " C"],
        weight1: Float[Tensor, "C 1 3 3"],
        bias1: Float[Tensor, " C"],
        bn_weight: Float[Tensor, " C"],
        bn_bias: Float[Tensor, " C"],
        weight2: Float[Tensor, "C 1 3 3"],
        bias2: Float[Tensor, " C"],
    ) -> Float[Tensor, "B N C"]:
        """Keep x and the first convolution's output."""
        B, N, C = x.shape
        taps1, taps2 = (w.view(C, 9).T.contiguous() for w in (weight1, weight2))
        convolved = torch.empty_like(x, dtype=low)
        mean, var = (torch.empty_like(gain) for _ in range(2)) if bn.training else (None, None)
        kernels(
            "local_first", low, x, gain, shift, eps, taps1, bias1, B, *grid, C, convolved, mean,
            var,
        )  # fmt: skip
        mean, rstd, times, plus = normalisation(bn, bn_weight, bn_bias, mean, var, B * N)
        out = torch.empty_like(x)
        kernels(
            "local_second", low, x, convolved, times, plus, taps2, bias2, factor, B, *grid, C, out
        )
        ctx.kernels, ctx.low, ctx.grid, ctx.eps, ctx.training = kernels, low, grid, eps, bn.training
        ctx.save_for_backward(
            x, gain, shift, taps1, mean, rstd, times, plus, taps2, factor, convolved
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B N C"]) -> tuple[Tensor | None, ...]:
        """Two passes, between which BatchNorm's sums are complete."""
        x, gain, shift, taps1, mean, rstd, times, plus, taps2, factor, convolved = ctx.saved_tensors
        B, N, C = x.shape
        grad = grad.contiguous()
        d_normed = torch.empty_like(convolved)
        of_second = x.new_empty(12, C)
        ctx.kernels(
            "local_second_backward", ctx.low, grad, convolved, mean, rstd, times, plus, taps2,
            factor, B, *ctx.grid, C, d_normed, of_second,
        )  # fmt: skip
        d_weight2, (d_bias2, d_bn_bias, d_bn_weight) = of_second[:9], of_second[9:]
        share = 1.0 / (B * N) if ctx.training else 0.0  # statistics that are not the batch's
        dx, of_first = torch.empty_like(x), x.new_empty(12, C)
        ctx.kernels(
            "local_first_backward", ctx.low, d_normed, convolved, mean, rstd, times,
            d_bn_bias * share, d_bn_weight * share, x, gain, shift, ctx.eps, taps1, grad, B,
            *ctx.grid, C, dx, of_first,
        )  # fmt: skip
        d_weight1, (d_bias1, d_gain, d_shift) = of_first[:9], of_first[9:]
        return (
            None, None, None, None, None, None, dx, d_gain, d_shift,
            d_weight1.T.reshape(C, 1, 3, 3), d_bias1, d_bn_weight, d_bn_bias,
            d_weight2.T.reshape(C, 1, 3, 3), d_bias2,
        )  # fmt: skip


def attention_branch(
    kernels: Kernels, x: Tensor, norm: nn.LayerNorm, attn: Any, gain: Tensor, samples: Samples
) -> Float[Tensor, "B N C"]:
    """x with channel attention, times `gain`, added to the samples that take it."""
    return AttentionBranch.apply(
        Branch(kernels, x, norm, samples, precision_of(x)), x.contiguous(), norm.weight, norm.bias,
        attn.qkv.weight, attn.qkv.bias, attn.temperature, *scaled(attn.proj, gain),
    )  # fmt: skip


def mlp_branch(
    kernels: Kernels, x: Tensor, norm: nn.LayerNorm, mlp: Any, gain: Tensor, samples: Samples
) -> Float[Tensor, "B N C"]:
    """x with the MLP, times `gain`, added to the samples that take it."""
    return MLPBranch.apply(
        Branch(kernels, x, norm, samples, precision_of(x)), x.contiguous(), norm.weight, norm.bias,
        mlp.fc1.weight, mlp.fc1.bias, *scaled(mlp.fc2, gain),
    )  # fmt: skip


def local_branch(
    kernels: Kernels, x: Tensor, norm: nn.LayerNorm, local: Any, grid: tuple[int, int],
    gain: Tensor, factor: Float[Tensor, " B"] | None,
) -> Float[Tensor, "B N C"]:  # fmt: skip
    """x with local patch interaction, times `gain` and a factor a sample."""
    return LocalBranch.apply(
        kernels, precision_of(x), local.bn, grid, factor, float(norm.eps), x.contiguous(),
        norm.weight, norm.bias, local.conv1.weight, local.conv1.bias, local.bn.weight,
        local.bn.bias, *scaled(local.conv2, gain),
    )  # fmt: skip
