"""Balanced assignment against the matrix that is scaled in turn."""

import numpy as np
import pytest
import torch

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.sinkhorn import check_prototypes, sinkhorn_knopp


def paper_sinkhorn(logits, temperature, iterations):
    """Q, K x B, scaled to sum 1, then its rows to 1/K and columns to 1/B in turn; times B."""
    Q = np.exp(logits.T.astype(np.longdouble) / temperature)
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        for k in range(K):
            Q[k] /= Q[k].sum() * K
        for b in range(B):
            Q[:, b] /= Q[:, b].sum() * B
    return (Q * B).T.astype(np.float64)


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_equals_the_scaled_matrix(temperature, iterations):
    torch.manual_seed(0)
    logits = torch.randn(13, 7, dtype=torch.float64)
    before = logits.clone()
    ours = sinkhorn_knopp(logits, temperature, iterations)
    expected = paper_sinkhorn(logits.numpy(), temperature, iterations)
    assert np.allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(logits, before)
    assert not ours.requires_grad


def test_prototypes_get_the_same_share():
    """Where softmax gives nearly all to one."""
    torch.manual_seed(0)
    logits = torch.randn(64, 8)
    logits[:, 0] += 5
    assert logits.softmax(-1).sum(0)[0] > 50
    assert sinkhorn_knopp(logits, 1.0, 50).sum(dim=0).numpy() == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_temperature_overflows_nothing(dtype):
    """Logits of hundreds, a row and a prototype far from all others."""
    torch.manual_seed(0)
    logits = torch.randn(32, 16).mul(100)
    logits[3] -= 1000
    logits[:, 5] -= 2000
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        rows = sinkhorn_knopp(logits, 0.02)
    assert rows.dtype == torch.float32
    assert rows.isfinite().all()
    assert rows.sum(dim=-1).numpy() == pytest.approx(1, abs=1e-5)


def test_more_prototypes_than_rows():
    check_prototypes(128, 128)
    with pytest.raises(UserError, match=r"objective\.num_prototypes=129.*lower.*to 64"):
        check_prototypes(129, 128)
