"""InfoNCE against a loop over pairs of views and images."""

import math

import pytest
import torch
from loss_checks import assert_same_with_gradients, unit

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.contrast import info_nce


def paper_info_nce(student, teacher, temperature, queue=()):
    total, terms = 0.0, 0
    for v, view in enumerate(student):
        for g, targets in enumerate(teacher):
            if v == g:
                continue
            keys = [unit(row) for row in (*targets, *queue)]
            for b, row in enumerate(view):
                scores = torch.stack([(unit(row) * key).sum() / temperature for key in keys])
                total = total - torch.log(scores[b].exp() / scores.exp().sum())
                terms += 1
    return total / terms


@pytest.mark.parametrize("queued", [None, 0, 5])
@pytest.mark.parametrize(("G", "V"), [(1, 2), (2, 2), (2, 6), (3, 4)])
def test_value_and_gradient_equal_the_loop(G, V, queued):
    torch.manual_seed(V)
    student = torch.randn(V, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(G, 4, 6, dtype=torch.float64) * 3
    queue = None if queued is None else torch.randn(queued, 6, dtype=torch.float64)
    ours = info_nce(student, teacher, 0.2, queue)
    theirs = paper_info_nce(student, teacher, 0.2, () if queue is None else queue)
    assert_same_with_gradients(ours, theirs, student)


def test_the_teacher_is_not_differentiated():
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    info_nce(student, teacher, 0.2, torch.randn(5, 4, requires_grad=True)).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()


def test_embeddings_that_are_alike_cost_the_log_of_their_number():
    loss = info_nce(torch.ones(3, 4, 5), torch.ones(2, 4, 5), 0.1, torch.ones(7, 5))
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)


def test_autocast_leaves_the_loss_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 8, 32), torch.randn(2, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(student.requires_grad_(), teacher, 0.07)
    assert loss.dtype == torch.float32
    expected = paper_info_nce(student.detach().double(), teacher.double(), 0.07)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_to_tell_an_image_from():
    one = torch.randn(2, 1, 4)
    with pytest.raises(UserError, match="batch_size=1"):
        info_nce(one, one, 0.2)
    assert info_nce(one, one, 0.2, torch.randn(3, 4)).item() > 0
    with pytest.raises(UserError, match="at least 2 views"):
        info_nce(torch.randn(1, 3, 4), torch.randn(1, 3, 4), 0.2)
