"""Exponential moving average of weights: torch's own `AveragedModel`.

Its state dict has all weights and the number of updates, so a resumed run goes on bit for bit.
"""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def weights_ema(module: nn.Module, decay: float) -> AveragedModel:
    """Return the average of a module's weights, to be updated after each step with
    `update_parameters(module)`: average <- decay * average + (1 - decay) * weights, of buffers as
    well; counts of batches are rounded down. The first update copies.

    Args:
        module: is copied.
        decay: 0.99996 as published, for 400 epochs of ImageNet; a run of T steps wants about
            1 - 10 / T.
    """
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.requires_grad_(False)
    return average.eval()
