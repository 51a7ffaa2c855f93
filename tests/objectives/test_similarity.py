"""Distilled similarities against loops over images and patches."""

import pytest
import torch
from loss_checks import assert_same_with_gradients, unit

from ssl_xcit.objectives.similarity import patch_similarity_loss, queue_similarity_loss


def distribution(x, others, temperature):
    scores = torch.stack([(unit(x) * unit(y)).sum() / temperature for y in others]).exp()
    return scores / scores.sum()


def kl(p, q):
    return (p * (p / q).log()).sum()


def paper_queue(student, teacher, queue, temperature):
    terms = [
        kl(distribution(t, queue, temperature), distribution(s, queue, temperature))
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(terms) / len(terms)


def resampled(x, size):
    """One axis (h, ...) to a smaller size by a triangle as wide as two new cells."""
    scale, rows = len(x) / size, []
    for i in range(size):
        middle = (i + 0.5) * scale
        weights = [max(0.0, 1 - abs(j + 0.5 - middle) / scale) for j in range(len(x))]
        rows.append(sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights))
    return torch.stack(rows)


def paper_patches(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        h, w = (min(a, b) for a, b in zip(s.shape[:2], t.shape[:2], strict=True))
        grids = [
            resampled(resampled(x, h).transpose(0, 1), w).transpose(0, 1).flatten(0, 1)
            for x in (s, t)
        ]
        for i in range(h * w):
            ours, theirs = (distribution(x[i], x, temperature) for x in grids)
            total = total + kl(theirs, ours) / (h * w * len(student))
    return total


@pytest.mark.parametrize("size", [1, 2, 9])
def test_queue_loss_and_gradient_equal_the_loop(size):
    torch.manual_seed(size)
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher, queue = torch.randn(4, 5).double() * 3, torch.randn(size, 5).double() * 2
    ours = queue_similarity_loss(student, teacher, queue)
    if size == 1:
        assert ours.item() == 0
        return
    assert_same_with_gradients(ours, paper_queue(student, teacher, queue, 0.07), student)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((3, 3), (3, 3)), ((4, 3), (2, 3)), ((2, 3), (5, 7)), ((5, 2), (3, 4))]
)
def test_patch_loss_and_gradient_equal_the_loop(ours, theirs):
    torch.manual_seed(0)
    student = torch.randn(2, *ours, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, *theirs, 6, dtype=torch.float64)
    loss = patch_similarity_loss(student, teacher, 0.2)
    assert_same_with_gradients(loss, paper_patches(student, teacher, 0.2), student, rel=1e-6)


def test_equal_similarities_cost_nothing():
    """Lengths, and a rotation of all, change none of them."""
    torch.manual_seed(0)
    x, (turn, _) = torch.randn(2, 3, 3, 6).double(), torch.linalg.qr(torch.randn(6, 6).double())
    lengths = torch.rand(2, 3, 3, 1).double() + 0.1
    assert patch_similarity_loss(x @ turn * lengths, x).item() == pytest.approx(0, abs=1e-12)
    rows = x[:, 0, 0]
    queue = torch.randn(5, 6).double()
    assert queue_similarity_loss(rows * 3, rows, queue).item() == pytest.approx(0, abs=1e-12)


def test_autocast_leaves_the_losses_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 4, 32), torch.randn(2, 6, 6, 32)
    queue = torch.randn(20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        of_patches = patch_similarity_loss(student, teacher)
        of_queue = queue_similarity_loss(student[:, 0, 0], teacher[:, 0, 0], queue)
    assert of_patches.dtype == of_queue.dtype == torch.float32
    exact = patch_similarity_loss(student.double(), teacher.double())
    assert of_patches.item() == pytest.approx(exact.item(), rel=1e-4)
    rows = (x[:, 0, 0].double() for x in (student, teacher))
    assert of_queue.item() == pytest.approx(
        paper_queue(*rows, queue.double(), 0.07).item(), rel=1e-4
    )


def test_teacher_and_queue_are_not_differentiated():
    student, teacher, queue = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    queue_similarity_loss(student, teacher, queue).backward()
    patches, of_teacher = (torch.randn(1, 3, 3, 4, requires_grad=True) for _ in range(2))
    patch_similarity_loss(patches, of_teacher).backward()
    assert teacher.grad is queue.grad is of_teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert patches.grad.abs().sum() > 0
