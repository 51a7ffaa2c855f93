"""Masked patches learn what the teacher, who sees them, says of them (iBOT, arXiv:2111.07832,
section 3.2; a separate head as in DINOv2, arXiv:2304.07193).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Len
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.esvit import tokens
from ssl_xcit.objectives.ibot_loss import ibot_loss
from ssl_xcit.objectives.masking import check_ratio, patch_weights, sample_masks
from ssl_xcit.objectives.objective import (
    Embedded,
    Inputs,
    Objective,
    PatchMask,
    RunLength,
    Signs,
    concatenated,
)
from ssl_xcit.objectives.sinkhorn import check_prototypes
from ssl_xcit.utils.ranks import BatchPart, world_size
from ssl_xcit.utils.validation import Share, Words

Ratio = Annotated[Sequence[float], Len(2, 2), Words("[low,high], two shares of 0 to 1")]
SHOWN = 128  # masked patches, or twice as many, by which a step is judged


class MaskedTargets(NamedTuple):
    """What the teacher says of the M masked patches."""

    logits: Float[Tensor, "1 M K"]
    rows: Float[Tensor, "1 M K"]  # probabilities
    mask: PatchMask


class IBOT(Objective):
    """DINO's loss at masked patches of the global views, of the same view. To be used beside the
    loss of class tokens (`WeightedSum`).

    XCiT's patches see each other through convolutions, in which a masked patch shows at its border,
    and through channel statistics common to all; so ratios are lower than published, masks may
    begin late, and masked patches are left out of those statistics.

    Args:
        length: of the run.
        new_head: makes a `MaskedHead` of a projection and a width.
        prototypes: makes the `DINO` whose head, center and temperatures are for patches.
        ratio: lowest and highest share of an image's patches that are masked (paper: 0.1 to 0.5).
        probability: of a view to have a mask.
        blocks: mask rectangles; otherwise single patches at random.
        start: share of the run after which masks begin, and the head with them.
        exclude_masked: leave masked patches out of the statistics of channel attention.

    Raises:
        UserError: a ratio that is not within 0 to 1, or prototypes with KoLeo; before the first
            step, more prototypes than Sinkhorn-Knopp can balance the masked patches on.
    """

    takes_patches = True

    def __init__(
        self,
        length: RunLength,
        new_head: Callable[[nn.Module, int], nn.Module],
        prototypes: Callable[[RunLength], DINO],
        ratio: Ratio = (0.1, 0.3),
        probability: Share = 0.5,
        blocks: bool = True,
        start: Share = 0.1,
        exclude_masked: bool = True,
    ):
        made = prototypes(length._replace(key=f"{length.key}.prototypes", of_patches=True))
        if made.koleo:
            raise UserError(
                f"{length.key}.prototypes.koleo={made.koleo:g}: it is for class tokens: set it to 0"
            )
        super().__init__(length, made.ema, made.clip_norm, made.clip)
        self.advice = made.advice
        low, high = ratio
        check_ratio((low, high), probability)
        self.prototypes = made
        self.new_head = new_head
        self.ratio = (float(low), float(high))
        self.probability = probability
        self.blocks = blocks
        self.start_step = round(start * length.total_steps)
        self.exclude_masked = exclude_masked

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection with K prototypes, and the mask token."""
        return self.new_head(self.prototypes.make_head(embed_dim), embed_dim)

    def inputs(self, views: list[Tensor], patch_size: int, step: int, part: BatchPart) -> Inputs:
        """Masks for the student's global views, drawn from torch's generator."""
        G, B, _, height, width = views[0].shape
        own = np.arange(G * part.total).reshape(G, -1)[:, part.start : part.start + B]
        grid = math.ceil(height / patch_size), math.ceil(width / patch_size)
        if self.prototypes.centering == "sinkhorn":
            expected = self.probability * sum(self.ratio) / 2 * G * B * math.prod(grid)
            check_prototypes(
                self.prototypes.num_prototypes,
                round(expected * world_size()),
                self.prototypes.length.key,
            )
        probability = self.probability if step >= self.start_step else 0.0
        masks = sample_masks(
            G * part.total, grid, self.ratio, probability, None, self.blocks, own.ravel()
        )
        # counted here, on the CPU: a GPU would have to be waited for
        parts = (masks.unflatten(0, (G, B)), masks.flatten().nonzero()[:, 0], patch_weights(masks))
        masked, places, weights = (p.to(views[0].device, non_blocking=True) for p in parts)
        return Inputs(views, PatchMask(masked, places, weights, self.exclude_masked))

    def mask_token(self, head: Any) -> Float[Tensor, " C"] | None:
        """It is learnt."""
        token: Tensor = head.mask_token
        return token

    def targets(
        self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> MaskedTargets:
        """Probabilities at the masked patches."""
        assert teacher is not None and inputs.mask is not None  # noqa: PT018
        logits = head(at_masked(teacher, inputs.mask))[None]
        rows = self.prototypes.probabilities(logits, max(0, step - self.start_step))
        return MaskedTargets(logits, rows, inputs.mask)

    def loss(
        self, head: nn.Module, student: Embedded, targets: MaskedTargets, step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Mean over the masked patches of a view, then over all views; 0 where none is masked."""
        mask, temperature = targets.mask, self.prototypes.student_temp
        logits = head(at_masked(student, mask))
        num_views = mask.masked.shape[:2].numel()
        return ibot_loss(logits, targets.rows[0], mask.weights, num_views, temperature), {}

    def update_(self, parts: Sequence[MaskedTargets]) -> None:
        """Move the center by the masked patches of all ranks, of which there may be none."""
        self.prototypes.update_(parts)

    def frozen(self, head: Any, step: int) -> Iterable[nn.Module]:
        """All before the masks begin; then the prototypes for a while."""
        if step < self.start_step:
            return (head,)
        return self.prototypes.frozen(head.projection, step - self.start_step)

    def scheduled(self, step: int) -> Mapping[str, float]:
        """The teacher's temperature for patches."""
        return {"teacher_temp": self.prototypes.teacher_temp(max(0, step - self.start_step))}

    def derived(self) -> dict[str, Any]:
        """What the length of the run decides."""
        return self.prototypes.derived() | {"start_step": self.start_step}

    def signs(self, parts: Sequence[MaskedTargets]) -> Signs:
        """The teacher's probabilities of some of the masked patches; all of them are large."""
        rows = [part.rows[0] for part in parts]
        few = [of_part[:: max(1, len(of_part) // SHOWN)].clone() for of_part in rows]
        return Signs(patch_rows=concatenated(few, dim=0))

    def described(self) -> str:
        """When masks begin."""
        return f"masks from step {self.start_step}, {super().described()}"


def at_masked(embedded: Embedded, mask: PatchMask) -> Float[Tensor, "M C"]:
    """Features of masked patches, view by view and image by image."""
    return tokens(embedded.patches[0]).flatten(0, 2).index_select(0, mask.places)
