"""The queue against Python's own."""

from collections import deque

import pytest
import torch

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.queue import EmbeddingQueue


def in_any_order(rows):
    return sorted(row.tolist() for row in rows)


def test_it_holds_the_last_rows():
    torch.manual_seed(0)
    queue, expected = EmbeddingQueue(7, 3), deque(maxlen=7)
    assert queue.filled().shape == (0, 3)
    for size in (2, 3, 1, 7, 4, 7, 2, 5):
        rows = torch.randn(size, 3, requires_grad=True)
        queue.push_(rows)
        expected.extend(rows.detach())
        assert in_any_order(queue.filled()) == in_any_order(expected)
    assert not queue.filled().requires_grad
    assert queue.count.item() == 31


def test_a_loaded_queue_goes_on_as_the_one_that_was_saved():
    torch.manual_seed(0)
    saved, loaded = EmbeddingQueue(5, 2), EmbeddingQueue(5, 2)
    for _ in range(3):
        saved.push_(torch.randn(3, 2))
    loaded.load_state_dict(saved.state_dict())
    assert set(saved.state_dict()) == {"rows", "count"}
    for _ in range(3):
        rows = torch.randn(2, 2)
        saved.push_(rows)
        loaded.push_(rows)
        assert torch.equal(saved.rows, loaded.rows)
        assert torch.equal(saved.count, loaded.count)


def test_rows_of_low_precision():
    queue = EmbeddingQueue(4, 2)
    queue.push_(torch.ones(3, 2, dtype=torch.bfloat16))
    assert queue.filled().dtype == torch.float32
    assert queue.filled().tolist() == [[1, 1]] * 3


def test_a_batch_that_does_not_fit():
    queue = EmbeddingQueue(4, 2)
    queue.push_(torch.ones(4, 2))
    with pytest.raises(UserError, match=r"objective\.queue=4 does not hold a batch of 5"):
        queue.push_(torch.ones(5, 2))
    assert queue.count.item() == 4
