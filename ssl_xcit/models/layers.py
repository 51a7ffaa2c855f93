"""What both kinds of blocks are made of: MLP, stochastic depth, initial values."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


def scaled(layer: nn.Linear | nn.Conv2d, gain: Float[Tensor, " C"] | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose output is times `gain` by channel.

    So layer scale costs as much as there are weights, and not a pass over all tokens each way.
    """
    assert layer.bias is not None
    if gain is None:
        return layer.weight, layer.bias
    return layer.weight * gain.view(-1, *[1] * (layer.weight.ndim - 1)), layer.bias * gain


class DropPath(nn.Module):
    """A residual connection with stochastic depth: a sample keeps its branch with probability
    1 - rate, scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, x: Float[Tensor, "B N C"], branch: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B N C"]:
        """x + branch in eval mode, or at rate 0."""
        if not self.training or self.rate == 0.0:
            return x + branch
        keep = 1.0 - self.rate
        kept = branch.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)
        return x + branch * kept if x.dtype != branch.dtype else torch.addcmul(x, branch, kept)


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
        """Each token by itself; the output is times `gain`."""
        return nn.functional.linear(self.act(self.fc1(x)), *scaled(self.fc2, gain))


def init_linear_(module: nn.Module) -> None:
    """Linear layers: truncated normal 0.02, bias 0. Norms start at 1 and 0, convolutions as torch
    has them.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
