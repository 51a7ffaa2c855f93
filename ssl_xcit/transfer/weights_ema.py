"""Exponential moving average of weights: torch's own `AveragedModel`, with XCiT's decay.

Its state dict has all weights and the number of updates, so a resumed run goes on bit for bit.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Decay = Annotated[float, Ge(0), Lt(1)]


def weights_ema(module: nn.Module, decay: Decay = 0.99996, warmup: bool = False) -> AveragedModel:
    """Return the average of a module's weights, to be updated after each step with
    `update_parameters(module)`: average <- decay * average + (1 - decay) * weights, of buffers as
    well; counts of batches are rounded down. The first update copies.

    Args:
        module: is copied.
        decay: 0.99996 as published, for 400 epochs of ImageNet; a run of T steps wants about
            1 - 10 / T.
        warmup: use min(decay, (1 + t) / (10 + t)) at update t, so that a short run does not
            remember its first weights.
    """
    update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def with_warmup(average: Sequence[Tensor], now: Sequence[Tensor], count: Tensor | int) -> None:
        t = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(average, now, count)

    average = AveragedModel(
        module, multi_avg_fn=with_warmup if warmup else update, use_buffers=True
    )
    average.requires_grad_(False)
    return average.eval()
