"""Matched patches against a loop over views, images and patches."""

import math

import pytest
import torch
from loss_checks import assert_same_with_gradients, unit

from ssl_xcit.errors import UserError
from ssl_xcit.objectives import prototype_loss
from ssl_xcit.objectives.region import region_loss

TEMP = 0.3


def paper_region(student, features, teacher, teacher_features):
    """Of lists of views: each pair by itself, in equation 2's order."""
    total, pairs = 0.0, 0
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v == g:
                continue
            B, N, _ = student[v].shape
            cost = 0.0
            for b in range(B):
                theirs = [unit(z) for z in teacher_features[g][b]]
                for i in range(N):
                    cosines = [(unit(features[v][b, i]) * z).sum().item() for z in theirs]
                    j = cosines.index(max(cosines))
                    log_p = torch.log_softmax(student[v][b, i] / TEMP, dim=-1)
                    cost = cost - (teacher[g][b, j] * log_p).sum()
            total, pairs = total + cost / (B * N), pairs + 1
    return total / pairs


def drawn(G, resolutions, B=3, M=5, K=7, C=4):
    """Logits and features of each resolution (views, patches), and the teacher's."""
    torch.manual_seed(G)
    logits = [
        torch.randn(v, B, N, K, dtype=torch.float64, requires_grad=True) for v, N in resolutions
    ]
    features = [torch.randn(v, B, N, C, dtype=torch.float64) * 5 for v, N in resolutions]
    teacher = torch.randn(G, B, M, K, dtype=torch.float64).mul(3).softmax(-1)
    # of many lengths: the closest is not the one with the largest product
    lengths = torch.rand(G, B, M, 1, dtype=torch.float64).mul(4).exp()
    return logits, features, teacher, torch.randn(G, B, M, C, dtype=torch.float64) * lengths


@pytest.mark.parametrize("chunk", [1, 80, 1 << 20])
@pytest.mark.parametrize(
    ("G", "resolutions"),
    [(2, [(2, 5)]), (2, [(2, 5), (3, 2)]), (1, [(2, 5), (2, 2)]), (2, [(3, 5), (1, 9), (1, 1)])],
)
def test_value_and_gradient_equal_the_loop(G, resolutions, chunk, monkeypatch):
    monkeypatch.setattr(prototype_loss, "CHUNK", chunk)
    logits, features, teacher, teacher_features = drawn(G, resolutions)
    ours = region_loss(logits, features, teacher, teacher_features, TEMP)
    views = [view for x in logits for view in x]
    feature_views = [view for x in features for view in x]
    theirs = paper_region(views, feature_views, teacher, teacher_features)
    assert_same_with_gradients(ours, theirs, *logits)


def test_the_only_global_view_has_no_other_to_learn_from():
    logits, features, teacher, teacher_features = drawn(1, [(1, 5), (2, 2)])
    region_loss(logits, features, teacher, teacher_features, TEMP).backward()
    assert not logits[0].grad.any()
    assert logits[1].grad.any()


def test_only_logits_are_differentiated_once():
    logits, features, teacher, teacher_features = drawn(2, [(2, 5), (3, 2)])
    others = [x.requires_grad_() for x in (*features, teacher, teacher_features)]
    loss = region_loss(logits, features, teacher, teacher_features, TEMP)
    with torch.no_grad():
        assert loss.item() == region_loss(logits, features, teacher, teacher_features, TEMP).item()
    loss.backward(retain_graph=True)
    assert all(x.grad is None for x in others)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_low_precision_logits_lose_nothing_more():
    """The sum is of float32, and the gradient has the type of the logits."""
    logits, features, teacher, teacher_features = drawn(2, [(2, 5), (3, 2)], K=300)
    low = [z.detach().bfloat16().requires_grad_() for z in logits]
    exact = [z.detach().double().requires_grad_() for z in low]
    rest = (teacher.float(), teacher_features.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = region_loss(low, [z.float() for z in features], *rest, TEMP)
    expected = region_loss(exact, features, teacher, teacher_features, TEMP)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, low), torch.autograd.grad(expected, exact), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.01 * b.norm()


def test_uniform_patches_cost_the_log_of_k():
    uniform = torch.full((2, 3, 4, 8), 1 / 8)
    features = torch.randn(2, 3, 4, 5)
    loss = region_loss([torch.zeros(2, 3, 4, 8)], [features], uniform, features, 0.1)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_one_view_has_nothing_to_agree_with():
    one = torch.rand(1, 2, 3, 4)
    with pytest.raises(UserError, match="at least 2 views"):
        region_loss([one], [one], one.softmax(-1), one, 0.1)
