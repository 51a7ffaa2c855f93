"""The teacher's temperature as a pure function of the optimizer step (DINO, arXiv:2104.14294)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearByEpoch:
    """`start` to `end` over `warmup_epochs` epochs in equal stairs, one an epoch, then `end`."""

    start: float
    end: float
    warmup_epochs: float
    steps_per_epoch: float

    def __call__(self, step: int) -> float:
        """Value at `step`; the last warm-up epoch already has `end`."""
        epoch = math.floor(step / self.steps_per_epoch)
        if epoch >= self.warmup_epochs:
            return self.end
        share = min(1.0, epoch / max(1.0, self.warmup_epochs - 1))
        return self.start + share * (self.end - self.start)
