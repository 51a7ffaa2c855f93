"""SimDINO against its determinant and a loop over pairs of views."""

import math

import pytest
import torch
from loss_checks import assert_same_with_gradients, unit

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.coding_rate import coding_rate, isotropy, simdino_loss


def paper_rate(z, eps):
    """The sum of outer products of rows, and all D eigenvalues."""
    m, D = z.shape
    matrix = torch.eye(D, dtype=torch.float64)
    for row in z:
        matrix = matrix + D / (m * eps) * torch.outer(row, row)
    return 0.5 * torch.linalg.eigvalsh(matrix).log().sum()


def paper_simdino(student, teacher, eps, gamma):
    G, B, D = teacher.shape
    cosines = [
        (unit(student[v, b]) * unit(teacher[g, b])).sum()
        for g in range(G)
        for v in range(len(student))
        for b in range(B)
        if v != g
    ]
    rates = [paper_rate(torch.stack([unit(row) for row in student[g]]), eps) for g in range(G)]
    gamma = (D + B) / (D * B) if gamma is None else gamma
    cosine, rate = sum(cosines) / len(cosines), sum(rates) / G
    return -cosine - gamma * rate, cosine, rate


@pytest.mark.parametrize(("m", "D"), [(3, 8), (8, 3), (5, 5), (1, 4)])
def test_rate_and_gradient_equal_the_eigenvalues(m, D):
    torch.manual_seed(m)
    z = torch.randn(m, D, dtype=torch.float64)
    z = (z / z.norm(dim=-1, keepdim=True)).requires_grad_()
    assert_same_with_gradients(coding_rate(z, 0.05), paper_rate(z, 0.05), z)


def test_bounds():
    """Nothing in one direction only, D/2 log(1 + 1/eps) in all alike."""
    alike = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert coding_rate(alike, 0.05).item() == pytest.approx(2 * math.log(21))
    one = torch.eye(4, dtype=torch.float64)[:1].repeat(12, 1)
    assert coding_rate(one, 0.05).item() == pytest.approx(0.5 * math.log(81))


@pytest.mark.parametrize(("B", "C"), [(6, 4), (3, 8), (5, 5)])
def test_isotropy_and_gradient_equal_the_eigenvalues(B, C):
    torch.manual_seed(B)
    features = torch.randn(B, C, dtype=torch.float64).mul(3).requires_grad_()
    rows = torch.stack([unit(row) for row in features])
    least = min(B, C)
    largest = least / 2 * math.log(1 + C / (least * 0.05))
    assert_same_with_gradients(isotropy(features), paper_rate(rows, 0.05) / largest, features)


def test_isotropy_is_1_where_directions_are_alike():
    """And the same whatever the lengths; near 0 where there is one direction."""
    alike = torch.eye(4).repeat(3, 1) * torch.arange(1, 13)[:, None]
    assert isotropy(alike).item() == pytest.approx(1.0)
    assert isotropy(torch.eye(9)[:3]).item() == pytest.approx(1.0)  # fewer rows
    assert isotropy(torch.ones(60, 64)).item() < 0.06


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize(("G", "V", "B"), [(1, 3, 4), (2, 2, 4), (2, 5, 9), (3, 3, 2)])
def test_loss_and_gradient_equal_the_loop(G, V, B, gamma):
    torch.manual_seed(V)
    student = torch.randn(V, B, 6, dtype=torch.float64).mul(2).requires_grad_()
    teacher = torch.randn(G, B, 6, dtype=torch.float64)
    ours, numbers = simdino_loss(student, teacher, 0.05, gamma)
    theirs, cosine, rate = paper_simdino(student, teacher, 0.05, gamma)
    assert_same_with_gradients(ours, theirs, student)
    assert numbers["distance"].item() == pytest.approx(1 - cosine.item())
    assert numbers["coding_rate"].item() == pytest.approx(rate.item())
    assert not any(value.requires_grad for value in numbers.values())


@pytest.mark.parametrize("B", [16, 200])
def test_autocast_leaves_the_loss_in_float32(B):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, B, 64, requires_grad=True), torch.randn(2, B, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = simdino_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    exact, _ = simdino_loss(student.double(), teacher.double())
    (expected,) = torch.autograd.grad(exact, student)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_what_is_not_finite_comes_out_as_such():
    student = torch.randn(3, 4, 6)
    student[0, 2, 1] = torch.nan
    loss, numbers = simdino_loss(student, torch.randn(2, 4, 6))
    assert not loss.isfinite()
    assert not numbers["coding_rate"].isfinite()


def test_one_view_has_nothing_to_be_near():
    with pytest.raises(UserError, match="at least 2 views"):
        simdino_loss(torch.randn(1, 3, 4), torch.randn(1, 3, 4))
