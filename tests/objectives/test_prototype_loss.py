"""The loss and the center against loops written from the paper (algorithm 1)."""

import pytest
import torch

from ssl_xcit.objectives import prototype_loss as losses
from ssl_xcit.objectives.dino import Center
from ssl_xcit.objectives.prototype_loss import dino_loss, prototype_loss


def paper_loss(student, teacher, student_temp):
    """Each pair by itself: -q log p, averaged over images and over pairs of different views."""
    total, pairs = 0.0, 0
    for g, q in enumerate(teacher):
        for v, s in enumerate(student):
            if v != g:
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


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_overwriting_the_logits_changes_nothing_else(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    leaf = torch.randn(4, 5, 33, requires_grad=True)
    teacher = torch.randn(2, 5, 33).mul(4).softmax(-1)
    (expected,) = torch.autograd.grad(3 * dino_loss(leaf, teacher, 0.1), leaf)
    logits = leaf * 1
    loss = dino_loss(logits, teacher, 0.1, overwrite=True)
    assert loss.item() == pytest.approx(dino_loss(leaf.detach(), teacher, 0.1).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_gradients_by_finite_differences_and_again():
    torch.manual_seed(0)
    student = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5).softmax(-1).requires_grad_()  # is not differentiated
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, 0.3), (student,))
    loss = dino_loss(student, teacher, 0.3)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    x, weight = torch.randn(3, 2, 4).double(), torch.randn(5, 4)
    mixed = prototype_loss(x, weight.requires_grad_(), torch.ones(5, 1), teacher, 0.3)
    mixed.backward()
    assert mixed.dtype == torch.float64
    assert weight.grad.dtype == torch.float32


def test_one_view_has_nothing_to_agree_with():
    one = torch.randn(1, 2, 5)
    with pytest.raises(ValueError, match="at least 2 views"):
        dino_loss(one, one.softmax(-1), 0.1)
    with pytest.raises(ValueError, match="at least 2 views"):
        prototype_loss(one, torch.randn(6, 5), torch.ones(6, 1), torch.ones(1, 2, 6) / 6, 0.1)


def test_overwriting_what_another_needs_is_an_error():
    leaf = torch.randn(3, 2, 7, requires_grad=True)
    loss = dino_loss(leaf.sigmoid(), torch.full((2, 2, 7), 1 / 7), 0.1, overwrite=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("views", [(1, 3), (2, 2), (2, 6)])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_loss_fused_with_the_prototypes(views, chunk, monkeypatch):
    """Value and gradients of embeddings, directions and gains, against the double loop over logits
    of torch's own weight normalisation.
    """
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    G, V, B, K, D = *views, 5, 11, 4
    x, weight = torch.randn(V, B, D).double(), torch.randn(K, D).double()
    inputs = [t.requires_grad_() for t in (x, weight, torch.rand(K, 1).double() + 0.5)]
    teacher = torch.randn(G, B, K).double().mul(4).softmax(-1)
    ours = prototype_loss(*inputs, teacher, 0.3)
    theirs = paper_loss(x @ torch._weight_norm(weight, inputs[2]).T, teacher, 0.3)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = torch.autograd.grad(ours * 1.7, inputs)
    expected = torch.autograd.grad(theirs * 1.7, inputs)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_fused_loss_rounds_no_worse_than_the_logits_under_autocast():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(10, 4, 64), dim=-1).requires_grad_()
    weight = torch.randn(500, 64, requires_grad=True)
    gain, teacher = torch.ones(500, 1), torch.randn(2, 4, 500).mul(4).softmax(-1)

    def both(loss):
        return torch.autograd.grad(loss, [x, weight])

    exact = both(paper_loss(x @ torch._weight_norm(weight, gain).T, teacher, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        fused = both(prototype_loss(x, weight, gain, teacher, 0.1))
        plain = both(dino_loss(x @ torch._weight_norm(weight, gain).T, teacher, 0.1))
    for a, b, c in zip(fused, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() < 1.2 * (b - c).norm() + 1e-3 * c.norm()


def test_a_frozen_backbone_or_no_gradient_at_all():
    x, weight, gain = torch.randn(3, 2, 4), torch.randn(6, 4), torch.ones(6, 1)
    teacher = torch.full((2, 2, 6), 1 / 6)
    plain = prototype_loss(x, weight, gain, teacher, 0.1)
    weight.requires_grad_()
    loss = prototype_loss(x, weight, gain, teacher, 0.1)
    assert not plain.requires_grad
    assert loss.item() == plain.item()
    loss.backward()
    assert weight.grad.isfinite().all()


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


def test_center_is_the_papers_running_mean():
    torch.manual_seed(0)
    center, expected = Center(7, momentum=0.9), torch.zeros(7, dtype=torch.float64)
    for _ in range(5):
        logits = torch.randn(2, 4, 7)
        targets = center.targets(logits, 0.04)
        reference = ((logits.double() - expected) / 0.04).softmax(dim=-1)
        assert torch.allclose(targets.double(), reference, atol=1e-5)
        center.update_(logits)
        expected = 0.9 * expected + 0.1 * torch.cat(list(logits)).double().mean(dim=0)
        assert torch.allclose(center.center.double(), expected, atol=1e-6)
    assert "center" in center.state_dict()
