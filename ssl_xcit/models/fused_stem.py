"""The stem for training and inference on a CPU: convolutions by torch, BatchNorm and GELU between
them by `kernels`. Of each layer only the convolution is kept for the backward pass.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.models.fused_block import normalisation, precision_of
from ssl_xcit.models.kernels import Kernels

WIDE = 256  # channels that make a long loop
# of the convolutions: stride, padding, dilation, transposed, output padding, groups
HALVING = ((2, 2), (1, 1), (1, 1), False, (0, 0), 1)


class Layer(NamedTuple):
    """What is kept of a layer; BatchNorm is times * convolved + plus."""

    convolved: Float[Tensor, "B C h w"]  # channels-last, as all images here
    mean: Float[Tensor, " C"]
    rstd: Float[Tensor, " C"]
    times: Float[Tensor, " C"]
    plus: Float[Tensor, " C"]


def by_pixels(
    image: Float[Tensor, "B C h w"], *values: Float[Tensor, " C"]
) -> tuple[int, int, list[Float[Tensor, " wide"]]]:
    """(rows, channels, values a channel) of a channels-last image as kernels take it: several
    pixels as one with more channels, so that loops over channels are long.
    """
    C = image.shape[1]
    rows, pixels = image.numel() // C, 1
    while rows % (2 * pixels) == 0 and 2 * pixels * C <= WIDE:
        pixels *= 2
    return rows // pixels, C * pixels, [value.repeat(pixels) for value in values]


def moments(
    kernels: Kernels, image: Float[Tensor, "B C h w"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance of each channel."""
    rows, wide, _ = by_pixels(image)
    means, variances = image.new_empty(2, wide, dtype=torch.float32)
    kernels("column_moments", image.dtype, image, rows, wide, means, variances)
    means, variances = (t.view(-1, image.shape[1]) for t in (means, variances))
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)


class FusedStem(torch.autograd.Function):
    """(B, in_chans, H, W) -> (B, C, h, w), float32; no gradient of the pixels."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        low: torch.dtype,
        norms: list[nn.BatchNorm2d],
        x: Float[Tensor, "B in_chans H W"],
        *parameters: Tensor,
    ) -> Float[Tensor, "B C h w"]:
        """Of each layer: weight, and BatchNorm's weight and bias."""
        layers: list[Layer] = []
        weights: list[Tensor] = []
        pixels = x.to(low, memory_format=torch.channels_last)
        for i, bn in enumerate(norms):
            weight, bn_weight, bn_bias = parameters[3 * i : 3 * i + 3]
            weights.append(weight.to(low, memory_format=torch.channels_last))
            inputs = activated(kernels, layers[-1]) if layers else pixels
            convolved = torch.ops.aten.convolution(inputs, weights[-1], None, *HALVING)
            convolved = convolved.contiguous(memory_format=torch.channels_last)
            mean, var = moments(kernels, convolved) if bn.training else (None, None)
            count = convolved.numel() // len(weight)
            found = normalisation(bn, bn_weight, bn_bias, mean, var, count)
            layers.append(Layer(convolved, *found))
        last = layers[-1]
        out = torch.empty_like(last.convolved, dtype=x.dtype)
        rows, wide, values = by_pixels(out, last.times, last.plus)
        kernels("affine", low, last.convolved, *values, rows, wide, out)
        ctx.kernels, ctx.low = kernels, low
        ctx.is_training = [bn.training for bn in norms]
        ctx.save_for_backward(pixels, *weights, *(t for layer in layers for t in layer))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B C h w"]) -> tuple[Tensor | None, ...]:
        """From the last layer to the first."""
        kernels, low, count = ctx.kernels, ctx.low, len(ctx.is_training)
        pixels, *kept = ctx.saved_tensors
        weights = kept[:count]
        layers = [Layer(*kept[i : i + 5]) for i in range(count, len(kept), 5)]
        d_normed = grad.contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        for i in reversed(range(count)):
            layer, C = layers[i], layers[i].convolved.shape[1]
            rows, wide, values = by_pixels(layer.convolved, *layer[1:])
            mean, rstd, times, plus = values
            sums = grad.new_empty(2, wide, dtype=torch.float32)
            if i == count - 1:
                kernels(
                    "batch_norm_sums", low, d_normed, layer.convolved, mean, rstd, rows, wide, sums
                )
            else:
                kernels(
                    "norm_gelu_backward", low, layer.convolved, times, plus, mean, rstd, rows, wide,
                    d_normed, sums,
                )  # fmt: skip
            d_bias, d_gain = sums.view(2, -1, C).sum(dim=1)
            share = C / layer.convolved.numel() if ctx.is_training[i] else 0.0
            d_convolved = torch.empty_like(layer.convolved)
            of_statistics = (t.mul(share).repeat(wide // C) for t in (d_bias, d_gain))
            kernels(
                "batch_norm_backward_last" if i == count - 1 else "batch_norm_backward", low,
                d_normed, layer.convolved, mean, rstd, times, *of_statistics, rows, wide,
                d_convolved,
            )  # fmt: skip
            inputs = activated(kernels, layers[i - 1]) if i else pixels
            d_normed, d_weight, _ = torch.ops.aten.convolution_backward(
                d_convolved, inputs, weights[i], None, *HALVING, [i > 0, True, False]
            )
            if i:
                d_normed = d_normed.contiguous(memory_format=torch.channels_last)
            found = [d_weight.to(grad.dtype), d_gain, d_bias, *found]
        return (None, None, None, None, *found)


def activated(kernels: Kernels, layer: Layer) -> Float[Tensor, "B C h w"]:
    """gelu(BatchNorm(convolved))."""
    out = torch.empty_like(layer.convolved)
    rows, wide, values = by_pixels(out, layer.times, layer.plus)
    kernels("norm_gelu", out.dtype, layer.convolved, *values, rows, wide, out)
    return out


def fused_stem(
    kernels: Kernels, x: Float[Tensor, "B in_chans H W"], layers: list[nn.Sequential]
) -> Float[Tensor, "B C h w"]:
    """The stem's layers of convolution and BatchNorm, GELU between; channels-last."""
    norms = [layer[1] for layer in layers]
    parameters = [p for layer in layers for p in (layer[0].weight, layer[1].weight, layer[1].bias)]
    return FusedStem.apply(kernels, precision_of(x), norms, x, *parameters)
