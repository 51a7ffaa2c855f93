"""SimDINO (arXiv:2502.10385): views of an image close to each other, images spread over all
directions by their coding rate; no prototypes, centering or temperatures.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.objectives.coding_rate import simdino_loss
from ssl_xcit.objectives.embeddings import EmbeddingObjective, Projected
from ssl_xcit.objectives.objective import Clip, Embedded, RunLength, Table
from ssl_xcit.utils.validation import Positive, Share


class SimDINO(EmbeddingObjective):
    """Cosine between the student's and the teacher's views, and the coding rate of the student's.

    Args:
        length: of the run.
        head: makes a projection of a width.
        eps: precision to which embeddings are coded, a squared distance.
        gamma: weight of the coding rate; null: the paper's, by width and batch.
        ema: see `Objective`; null: from the table.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.
        projected: see `EmbeddingObjective`.

    Raises:
        UserError: a batch of one image, whose coding rate is always the same.
    """

    def __init__(
        self,
        length: RunLength,
        head: Callable[[int], nn.Module],
        eps: Positive = 0.05,
        gamma: Positive | None = None,
        ema: Share | None = None,
        by_steps_and_images: Table = (),
        clip_norm: Positive = 3.0,
        clip: Clip = "tensor",
        projected: Projected = "cls",
    ):
        super().__init__(length, head, ema, by_steps_and_images, clip_norm, clip, projected)
        self.require_others()
        self.eps = eps
        self.gamma = gamma

    def loss(
        self, head: nn.Module, student: Embedded, targets: Float[Tensor, "G B D"], step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Distance less coding rate, and both by name."""
        return simdino_loss(self.project(head, student), targets, self.eps, self.gamma)
