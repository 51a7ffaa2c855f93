"""Embeddings of earlier images (a queue as in MoCo, arXiv:1911.05722, section 3.2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.utils.ranks import gathered


def check_queue(size: int, batch_size: int, key: str = "objective") -> None:
    """Raise UserError for a queue that does not hold a batch of all ranks."""
    if size < batch_size:
        raise UserError(
            f"{key}.queue={size} does not hold a batch of {batch_size}: set "
            f"{key}.queue={16 * batch_size} or so"
        )


class EmbeddingQueue(nn.Module):
    """The last rows that were pushed, the same on all ranks. Buffers: a checkpoint carries them.

    Args:
        size: Q, rows that it holds.
        width: D.
    """

    rows: Float[Tensor, "Q D"]
    count: Int[Tensor, ""]  # rows that were ever pushed

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.pushed: int | None = None  # `count` as the host knows it; None: it is to be read
        self.register_load_state_dict_pre_hook(forget_count)

    @torch.no_grad()
    def push_(self, rows: Float[Tensor, "B D"]) -> None:
        """Write the rows of all ranks, in the order of ranks, over the oldest ones.

        Raises:
            UserError: more rows than it holds.
        """
        rows = gathered(rows)
        size = len(self.rows)
        check_queue(size, len(rows))
        places = (self.count + torch.arange(len(rows), device=self.rows.device)) % size
        self.rows[places] = rows.to(self.rows)
        self.count += len(rows)
        if self.pushed is not None:
            self.pushed += len(rows)

    def filled(self) -> Float[Tensor, "q D"]:
        """Rows that were pushed, in no order; a view that the next push changes."""
        if self.pushed is None:
            self.pushed = int(self.count)
        return self.rows[: min(self.pushed, len(self.rows))]


def forget_count(queue: EmbeddingQueue, *_: object) -> None:
    """Before a state is loaded: it has another count."""
    queue.pushed = None
