"""The loss and the center against loops written from the paper (algorithm 1)."""

import math

import pytest
import torch

from ssl_xcit.objectives.dino import Center, dino_loss


def paper_loss(student, teacher, student_temp):
    """Every pair by itself: -q log p, averaged over images and over the pairs of different
    views.
    """
    total, pairs = 0.0, 0
    for g, q in enumerate(teacher):
        for v, s in enumerate(student):
            if v == g:
                continue
            log_p = torch.log_softmax(s.double() / student_temp, dim=-1)
            total = total + (-q.double() * log_p).sum(dim=-1).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("V", [2, 3, 10])
def test_loss_and_gradient_equal_the_double_loop(V):
    torch.manual_seed(V)
    student = torch.randn(V, 5, 33, requires_grad=True)
    teacher = torch.randn(2, 5, 33).mul(4).softmax(-1)
    ours = dino_loss(student, teacher, 0.1)
    (gradient,) = torch.autograd.grad(ours, student)
    theirs = paper_loss(student, teacher, 0.1)
    (expected,) = torch.autograd.grad(theirs, student)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(gradient, expected.float(), rtol=1e-4, atol=1e-7)


def test_autocast_leaves_the_loss_in_float32():
    torch.manual_seed(0)
    student = torch.randn(10, 4, 1000, requires_grad=True)
    teacher = torch.randn(2, 4, 1000).mul(4).softmax(-1)
    (expected,) = torch.autograd.grad(paper_loss(student, teacher, 0.1), student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(student, teacher, 0.1)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_uniform_everything_costs_ln_k():
    K = 65536
    assert dino_loss(
        torch.zeros(4, 2, K), torch.full((2, 2, K), 1 / K), 0.1
    ).item() == pytest.approx(math.log(K), rel=1e-5)


def test_center_is_the_papers_running_mean():
    torch.manual_seed(0)
    center, expected = Center(7, momentum=0.9), torch.zeros(7, dtype=torch.float64)
    for _ in range(5):
        logits = torch.randn(2, 4, 7)
        targets = center.targets(logits, 0.04)
        reference = torch.stack(
            [((view.double() - expected) / 0.04).softmax(dim=-1) for view in logits]
        )
        assert torch.allclose(targets.double(), reference, atol=1e-5)
        center.update_(logits)
        expected = 0.9 * expected + 0.1 * torch.cat(list(logits)).double().mean(dim=0)
        assert torch.allclose(center.center.double(), expected, atol=1e-6)
    assert "center" in center.state_dict()


def test_center_momentum_out_of_range():
    with pytest.raises(ValueError, match="center_momentum=1"):
        Center(4, momentum=1.0)
