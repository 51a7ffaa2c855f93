"""The entropy estimator against a loop over all pairs."""

import math

import pytest
import torch
from loss_checks import assert_same_with_gradients, unit

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.koleo import koleo_loss


def paper_koleo(x):
    rows = [unit(row) for row in x]
    total = 0.0
    for i, row in enumerate(rows):
        distances = [((row - r) ** 2).sum().sqrt() for j, r in enumerate(rows) if j != i]
        total = total - torch.log(min(distances) + 1e-8)
    return total / len(rows)


@pytest.mark.parametrize(("B", "D"), [(2, 3), (9, 4), (16, 40)])
def test_value_and_gradient_equal_the_loop(B, D):
    torch.manual_seed(B)
    x = torch.randn(B, D, dtype=torch.float64).mul(3).requires_grad_()
    assert_same_with_gradients(koleo_loss(x), paper_koleo(x), x)


def test_twins_are_finite():
    """At distance 0 each costs -log 1e-8; the gradient comes from the others alone."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    x[1] = x[0]
    x.requires_grad_()
    loss = koleo_loss(x)
    (gradient,) = torch.autograd.grad(loss, x)
    alone = paper_koleo(x.detach().double()[1:])
    assert gradient.isfinite().all()
    assert loss.isfinite()
    assert loss.item() > alone.item()
    assert koleo_loss(torch.ones(3, 4)).item() == pytest.approx(8 * math.log(10), rel=1e-6)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    x = torch.randn(16, 32).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(paper_koleo(x.detach().double()).item(), rel=1e-5)


def test_one_image_has_no_neighbour():
    with pytest.raises(UserError, match="batch_size"):
        koleo_loss(torch.randn(1, 4))
