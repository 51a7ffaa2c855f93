"""Layers of both kinds of blocks: MLP, stochastic depth, recomputation, initial values."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils.checkpoint import checkpoint

from ssl_xcit.utils.ranks import BatchPart

LAYER_NORM_EPS = 1e-6


def autocasting(device: torch.device) -> bool:
    """Whether autocast rounds products on this device to 16 bits; never on meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def scaled(layer: nn.Linear | nn.Conv2d, gain: Float[Tensor, " C"] | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with each output channel multiplied by `gain`.

    Layer scale then touches the weights only, and not all tokens in both passes.
    """
    assert layer.bias is not None
    if gain is None:
        return layer.weight, layer.bias
    return layer.weight * gain.view(-1, *[1] * (layer.weight.ndim - 1)), layer.bias * gain


class DropPath(nn.Module):
    """A residual connection with stochastic depth: a sample keeps its branch with probability
    1 - rate, scaled by 1 / (1 - rate).

    Samples are drawn for the whole batch of a step, of which a pass takes its part (see
    `computing`): with the same seed an image is treated alike however a batch is split over
    ranks and parts.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.rows: Tensor | None = (
            None  # its images among all of the step; None: it has all of them
        )
        self.total = 0  # images of the step

    def draw(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B 1 1"] | None:
        """The factor of each sample's branch: 0 or 1 / (1 - rate); None for ones."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        if self.rows is None:
            return x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)
        views = len(x) // len(self.rows)  # of each image, one after another
        factors = x.new_empty(views, self.total, 1, 1).bernoulli_(keep).div_(keep)
        return factors.index_select(1, self.rows).flatten(0, 1)

    def forward(
        self, x: Float[Tensor, "B N C"], branch: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B N C"]:
        """x + factor * branch."""
        factor = self.draw(x)
        if factor is None:
            return x + branch
        return x + branch * factor if x.dtype != branch.dtype else torch.addcmul(x, branch, factor)

    def by_sample(
        self, x: Float[Tensor, "B N C"], branch: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B N C"]:
        """x + factor * branch(x), for a branch that treats samples separately: on a CPU it is not
        computed for those that drop it, unless all do, or its parameters would have no gradient.
        """
        factor = self.draw(x)
        if factor is None:
            return x + branch(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            kept = factor.flatten().nonzero().flatten()
            if len(kept):
                change = branch(x.index_select(0, kept)).to(x.dtype)
                return x.index_add(0, kept, change, alpha=1.0 / (1.0 - self.rate))
        return x + branch(x) * factor


@contextlib.contextmanager
def computing(module: nn.Module, part: BatchPart, device: torch.device) -> Iterator[None]:
    """Let stochastic depth know which images of the step's batch passes inside have: batches of
    `part.size` images, or of as many views of each, view by view. They are a tensor, so that a
    compiled program serves all parts of one size.
    """
    layers = [inner for inner in module.modules() if isinstance(inner, DropPath)]
    rows = torch.arange(part.start, part.start + part.size, device=device)
    for layer in layers:
        layer.rows, layer.total = rows, part.total
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None


class MLP(nn.Module):
    """Linear to 4 C, GELU, linear back."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(
        self, x: Float[Tensor, "*any C"], gain: Float[Tensor, " C"] | None = None
    ) -> Float[Tensor, "*any C"]:
        """Apply the MLP to each token and multiply the result by `gain`."""
        return linear(self.act(self.fc1(x)), *scaled(self.fc2, gain))

    def of_norm(
        self, x: Float[Tensor, "*any C"], norm: nn.LayerNorm, gain: Float[Tensor, " C"]
    ) -> Float[Tensor, "*any C"]:
        """The MLP of norm(x), times `gain`."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return NormMLP.apply(
                x, norm.weight, norm.bias, self.fc1.weight, self.fc1.bias,
                *scaled(self.fc2, gain), norm.eps, torch.is_grad_enabled(),
            )  # fmt: skip
        return self(norm(x), gain)


class NormMLP(torch.autograd.Function):
    """LayerNorm, linear, GELU, linear, `ROWS` tokens at a time, for CPUs.

    Of the activations only x and the hidden layer before its GELU are kept; norm and GELU are
    computed again in the backward pass, inside the cache. As fast as the four layers one after
    another (`benchmarks/layers.py`), and keeps 4 widths where they keep 9. No second derivatives.
    """

    ROWS = 4096

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*any C"],
        gain: Float[Tensor, " C"],
        shift: Float[Tensor, " C"],
        weight1: Float[Tensor, "hidden C"],
        bias1: Float[Tensor, " hidden"],
        weight2: Float[Tensor, "C hidden"],
        bias2: Float[Tensor, " C"],
        eps: float,
        grad_enabled: bool,
    ) -> Float[Tensor, "*any C"]:
        """Under autocast, products and the result are of low precision."""
        C = x.shape[-1]
        low = torch.get_autocast_dtype(x.device.type) if autocasting(x.device) else x.dtype
        keep = grad_enabled and any(ctx.needs_input_grad)
        rows = x.reshape(-1, C)
        with torch.autocast(x.device.type, enabled=False):
            w1, b1, w2, b2 = (t.to(low) for t in (weight1, bias1, weight2, bias2))
            hidden = rows.new_empty(len(rows) if keep else 0, len(w1), dtype=low)
            out = rows.new_empty(len(rows), C, dtype=low)
            for start in range(0, len(rows), NormMLP.ROWS):
                part = slice(start, start + NormMLP.ROWS)
                normed = layer_norm(rows[part], (C,), gain, shift, eps).to(low)
                if keep:
                    inner = torch.addmm(b1, normed, w1.T, out=hidden[part])
                else:
                    inner = torch.addmm(b1, normed, w1.T)
                torch.addmm(b2, gelu(inner), w2.T, out=out[part])
        if keep:
            ctx.save_for_backward(rows, gain, shift, w1, w2, hidden)
            ctx.eps, ctx.dtype = eps, weight1.dtype
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*any C"]) -> tuple[Tensor | None, ...]:
        """Gradients of the weights are summed up over the parts in their own precision."""
        rows, gain, shift, w1, w2, hidden = ctx.saved_tensors
        C, low = rows.shape[-1], w1.dtype
        grads = grad.reshape(-1, C)
        dx = torch.empty_like(rows)
        dw1, dw2 = (torch.zeros_like(w, dtype=ctx.dtype) for w in (w1, w2))
        dgain, dshift = torch.zeros_like(gain), torch.zeros_like(shift)
        db1 = gain.new_zeros(len(w1))
        for start in range(0, len(rows), NormMLP.ROWS):
            part = slice(start, start + NormMLP.ROWS)
            x, inner, g = rows[part], hidden[part], grads[part]
            add_product_(dw2, g.T, gelu(inner))
            d_inner = torch.ops.aten.gelu_backward(g @ w2, inner)
            normed, mean, rstd = torch.native_layer_norm(x, (C,), gain, shift, ctx.eps)
            add_product_(dw1, d_inner.T, normed.to(low))
            db1 += d_inner.sum(dim=0, dtype=db1.dtype)
            dx[part], d_gain, d_shift = torch.ops.aten.native_layer_norm_backward(
                (d_inner @ w1).to(x.dtype), x, (C,), mean, rstd, gain, shift, (True, True, True)
            )
            dgain += d_gain
            dshift += d_shift
        db2 = grads.sum(dim=0, dtype=ctx.dtype)
        return dx.view(grad.shape), dgain, dshift, dw1, db1, dw2, db2, None, None


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where the factors may be of lower precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """block(*inputs) with activation checkpointing: the inputs are kept and the rest is computed
    again in the backward pass, with the same random numbers. Running statistics see the batch once.
    """
    return checkpoint(
        block, *inputs, use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), FrozenStatistics(block)),
    )  # fmt: skip


class FrozenStatistics(contextlib.AbstractContextManager[None]):
    """Keep BatchNorm's running statistics while a block runs; can be entered several times."""

    def __init__(self, block: nn.Module):
        self.norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.momenta = [norm.momentum for norm in self.norms]

    def __enter__(self) -> None:
        """Set momentum 0, with which running statistics stay."""
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        """Restore the momentum; the batch was counted in the first pass."""
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


def init_linear_(module: nn.Module) -> None:
    """Initialise linear layers: truncated normal 0.02, bias 0; others keep torch's values."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
