"""What both kinds of blocks are made of: MLP, stochastic depth, initial values."""

from jaxtyping import Float
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


class DropPath(nn.Module):
    """Stochastic depth: a sample keeps its branch with probability 1 - rate, scaled by 1 / (1 -
    rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """In eval mode, or at rate 0, x itself."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class MLP(nn.Module):
    """Linear to 4 C, GELU, linear back."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "*any C"]) -> Float[Tensor, "*any C"]:
        """Each token by itself."""
        return self.fc2(self.act(self.fc1(x)))


def init_linear_(module: nn.Module) -> None:
    """Linear layers: truncated normal 0.02, bias 0. Norms start at 1 and 0, convolutions as torch
    has them.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
