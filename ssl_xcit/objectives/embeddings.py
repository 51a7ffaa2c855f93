"""Objectives that compare embeddings of a projection head, without prototypes."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.objectives.objective import (
    Clip,
    Embedded,
    Inputs,
    Objective,
    RunLength,
    Signs,
    Table,
    chosen_by_length,
    concatenated,
)
from ssl_xcit.utils.validation import Positive, Share


class EmbeddingObjective(Objective):
    """The student's embeddings against the teacher's.

    Args:
        length: of the run.
        head: makes a projection of a width.
        ema: see `Objective`; null: from the table.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.
    """

    def __init__(
        self,
        length: RunLength,
        head: Callable[[int], nn.Module],
        ema: Share | None,
        by_steps_and_images: Table,
        clip_norm: Positive,
        clip: Clip,
    ):
        table = f"{length.key}.by_steps_and_images"
        chosen = chosen_by_length({"ema": ema}, by_steps_and_images, table, length)
        super().__init__(length, chosen["ema"], clip_norm, clip)
        self.new_head = head

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection."""
        return self.new_head(embed_dim)

    def targets(
        self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> Float[Tensor, "G B D"]:
        """Embeddings of the global views."""
        assert teacher is not None
        embeddings: Tensor = head(teacher.cls)
        return embeddings

    def signs(self, parts: Sequence[Any]) -> Signs:
        """The teacher's embeddings."""
        return Signs(embeddings=concatenated([part[0] for part in parts], dim=0))
