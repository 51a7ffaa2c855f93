"""Objectives that compare embeddings of a projection head, without prototypes."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
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

Projected = Literal["cls", "cls_patch"]


class EmbeddingObjective(Objective):
    """The student's embeddings against the teacher's.

    Args:
        length: of the run.
        head: makes a projection of a width.
        projected: what the head sees: the class token, or it and the mean patch in a row.
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
        projected: Projected = "cls",
    ):
        table = f"{length.key}.by_steps_and_images"
        chosen = chosen_by_length({"ema": ema}, by_steps_and_images, table, length)
        super().__init__(length, chosen["ema"], clip_norm, clip)
        self.new_head = head
        self.takes_patches = projected == "cls_patch"

    def require_others(self) -> None:
        """Raise UserError where images are computed one at a time."""
        batch, parts = self.length.batch_size, self.length.accumulate
        if self.length.compared < 2:
            raise UserError(
                f"batch_size={batch} trainer.accumulate={parts}: an image is told from the others "
                "that are computed with it, and there are none: set batch_size=64 "
                "trainer.accumulate=1 or so"
            )

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection."""
        return self.new_head(2 * embed_dim if self.takes_patches else embed_dim)

    def project(self, head: nn.Module, embedded: Embedded) -> Float[Tensor, "V B D"]:
        """Embeddings of all views."""
        embeddings: Tensor = head(torch.cat(self.seen(embedded), dim=-1))
        return embeddings

    def seen(self, embedded: Embedded) -> list[Float[Tensor, "V B C"]]:
        """What the head sees of all views, before it is put in a row."""
        if not self.takes_patches:
            return [embedded.cls]
        means = [patches.mean(dim=(-2, -1)) for patches in embedded.patches]
        return [embedded.cls, torch.cat(means)]

    def targets(
        self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> Float[Tensor, "G B D"]:
        """Embeddings of the global views."""
        assert teacher is not None
        return self.project(head, teacher)

    def signs(self, parts: Sequence[Any]) -> Signs:
        """The teacher's embeddings."""
        return Signs(embeddings=concatenated([part[0] for part in parts], dim=0))
