"""The teacher's temperature as a pure function of the optimizer step (DINO, arXiv:2104.14294)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearInStairs:
    """`start` to `end` over `warmup_steps` in equal stairs of `stair_steps`, then `end`."""

    start: float
    end: float
    warmup_steps: float
    stair_steps: float  # those of an epoch in the paper

    def __call__(self, step: int) -> float:
        """Value at `step`; the last stair of the warm-up already has `end`."""
        stair, stairs = math.floor(step / self.stair_steps), self.warmup_steps / self.stair_steps
        if stair >= stairs:
            return self.end
        share = min(1.0, stair / max(1.0, stairs - 1))
        return self.start + share * (self.end - self.start)
