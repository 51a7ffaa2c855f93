"""The loss of masked patches against loops written from its definition."""

import pytest
import torch

from ssl_xcit.objectives import ibot_loss as module
from ssl_xcit.objectives.ibot_loss import ibot_loss
from ssl_xcit.objectives.masking import patch_weights, sample_masks


def loss_by_loops(student, teacher, mask, student_temp):
    """Of (B, h, w, K) logits and probabilities: the mean over an image's masked patches of
    -sum_k q_k log p_k, then the mean over all images.
    """
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(mask)):
        costs = []
        for row, column in mask[b].nonzero().tolist():
            z = student[b, row, column].double() / student_temp
            log_p = z - z.max() - (z - z.max()).exp().sum().log()
            costs.append(-(teacher[b, row, column].double() * log_p).sum())
        if costs:
            total = total + sum(costs) / len(costs)
    return total / len(mask)


def batch(num_images=6, num_prototypes=13, dtype=torch.float32, seed=0):
    """Logits, probabilities and masks; half of the images have no mask."""
    torch.manual_seed(seed)
    mask = sample_masks(num_images, (3, 4), (0.2, 0.8), 0.5, None, False)
    assert 0 < mask.any((1, 2)).sum() < num_images
    student = torch.randn(num_images, 3, 4, num_prototypes, dtype=dtype, requires_grad=True)
    teacher = torch.randn(num_images, 3, 4, num_prototypes, dtype=dtype).mul(4).softmax(-1)
    return student, teacher, mask


def ours(student, teacher, mask, student_temp=0.1):
    weights = patch_weights(mask)
    return ibot_loss(student[mask], teacher[mask], weights, len(mask), student_temp)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_the_loops(chunk, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    student, teacher, mask = batch(dtype=dtype)
    loss, expected = ours(student, teacher, mask), loss_by_loops(student, teacher, mask, 0.1)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    (wanted,) = torch.autograd.grad(3 * expected, student)
    assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (gradient[~mask] == 0).all()


def test_uniform_student_and_teacher_cost_the_log_of_k():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    student, teacher = torch.zeros(2, 3, 4, 8), torch.full((2, 3, 4, 8), 1 / 8)
    assert ours(student, teacher, mask).item() == pytest.approx(torch.tensor(8.0).log().item())
    mask[1] = False  # an image without a mask counts as 0
    assert ours(student, teacher, mask).item() == pytest.approx(torch.tensor(8.0).log().item() / 2)


def test_without_a_masked_patch_all_gradients_are_zero():
    """But there are gradients, which other ranks wait for."""
    head, mask = torch.nn.Linear(4, 7), torch.zeros(3, 2, 2, dtype=torch.bool)
    tokens = torch.randn(3, 2, 2, 4, requires_grad=True)
    teacher = torch.full((3, 2, 2, 7), 1 / 7)
    loss = ibot_loss(head(tokens[mask]), teacher[mask], patch_weights(mask), 3, 0.1)
    assert loss.item() == 0.0
    loss.backward()
    for value in (tokens, head.weight, head.bias):
        assert (value.grad == 0).all()


def test_mean_gradient_of_ranks_is_that_of_all_images():
    """Two parts of a batch with different numbers of masked images and patches, as DDP has them."""
    student, teacher, mask = batch(8, dtype=torch.float64)
    mask[:4], mask[0, 0] = False, True
    (whole,) = torch.autograd.grad(ours(student, teacher, mask), student)
    parts = [ours(student[p], teacher[p], mask[p]) for p in (slice(0, 4), slice(4, 8))]
    (mean,) = torch.autograd.grad(sum(parts) / 2, student)
    assert torch.allclose(mean, whole, rtol=1e-12, atol=1e-15)


def test_autocast_leaves_the_loss_in_float32():
    student, teacher, mask = batch(num_prototypes=500)
    low = student.detach().bfloat16().requires_grad_()
    expected = loss_by_loops(low, teacher, mask, 0.1)
    (wanted,) = torch.autograd.grad(expected, low)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(low, teacher, mask)
    (gradient,) = torch.autograd.grad(loss, low)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == torch.bfloat16
    assert (gradient - wanted).float().norm() < 1e-2 * wanted.float().norm()


def test_one_backward_pass_or_none():
    student, teacher, mask = batch()
    teacher.requires_grad_()
    loss = ours(student, teacher, mask)
    with torch.no_grad():
        assert ours(student, teacher, mask).item() == loss.item()
    assert not ours(student.detach(), teacher, mask).requires_grad
    loss.backward(retain_graph=True)
    assert teacher.grad is None
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
