"""Contrast with a momentum teacher (MoCo v3, arXiv:2104.02057, algorithm 1; a queue as in MoCo,
arXiv:1911.05722), for all views of multi-crop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.coding_rate import isotropy
from ssl_xcit.objectives.contrast import info_nce
from ssl_xcit.objectives.embeddings import EmbeddingObjective, Projected
from ssl_xcit.objectives.objective import (
    ALIKE,
    EMBEDDINGS_ALIKE,
    Clip,
    Embedded,
    RunLength,
    Table,
)
from ssl_xcit.objectives.queue import EmbeddingQueue, check_queue
from ssl_xcit.utils.validation import NonNegative, Positive, Share


class InfoNCE(EmbeddingObjective):
    """Tell an image's other views, as the teacher sees them, from those of all other images.

    Args:
        length: of the run.
        head: makes a projection of a width; with BatchNorm, or the embeddings may become alike.
        temperature: of the softmax over images.
        queue: embeddings of earlier images to tell it from as well (0: none); at least a batch.
        ema: see `Objective`; null: from the table.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.
        projected: see `EmbeddingObjective`.
        spread: weight of the `isotropy` of the backbone's own features, which the head sees. A few
            directions dominate those of random weights, and contrast behind a head leaves it so;
            k-NN, which compares them by their cosine, then sees little else.

    Raises:
        UserError: a batch of one image, or a queue smaller than the batch or larger than the data.
    """

    def __init__(
        self,
        length: RunLength,
        head: Callable[[int], nn.Module],
        temperature: Positive = 0.2,
        queue: Annotated[int, Ge(0)] = 0,
        ema: Share | None = None,
        by_steps_and_images: Table = (),
        clip_norm: Positive = 3.0,
        clip: Clip = "tensor",
        projected: Projected = "cls",
        spread: NonNegative = 0.0,
    ):
        super().__init__(length, head, ema, by_steps_and_images, clip_norm, clip, projected)
        self.require_others()
        if queue:
            check_queue(queue, length.batch_size, length.key)
            if queue + length.batch_size > length.num_images:
                half = length.num_images // 2
                raise UserError(
                    f"{length.key}.queue={queue} would still hold an image when it comes again, to "
                    f"be told from itself, for there are {length.num_images:,} images: set "
                    f"{length.key}.queue={half if half >= length.batch_size else 0}"
                )
        words = f"lower optim.lr first, then raise {length.key}.temperature"
        self.advice = dict.fromkeys((ALIKE, EMBEDDINGS_ALIKE), words)
        self.temperature = temperature
        self.spread = spread
        self.queue_size = queue
        self.queue: EmbeddingQueue | None = None

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection; the queue is of its width."""
        head = super().make_head(embed_dim)
        if self.queue_size:
            self.queue = EmbeddingQueue(self.queue_size, width_of(head))
        return head

    def loss(
        self, head: nn.Module, student: Embedded, targets: Float[Tensor, "G B D"], step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Mean over pairs of different views, minus the weighted isotropy of the global views."""
        earlier = None if self.queue is None else self.queue.filled()
        loss = info_nce(self.project(head, student), targets, self.temperature, earlier)
        if not self.spread:
            return loss, {}
        seen = (features[: len(targets)] for features in self.seen(student))
        filled = torch.stack([isotropy(view) for views in seen for view in views]).mean()
        return loss - self.spread * filled, {"contrast": loss, "isotropy": filled}

    def update_(self, parts: Sequence[Float[Tensor, "G _ D"]]) -> None:
        """Put the batch into the queue."""
        if self.queue is not None:
            for part in parts:
                self.queue.push_(part[0])


def width_of(head: nn.Module) -> int:
    """Width of what a head makes: that of its last linear layer."""
    widths = [module.out_features for module in head.modules() if isinstance(module, nn.Linear)]
    return int(widths[-1])
