"""Losses and their gradients against those of a loop."""

import pytest
import torch


def assert_same_with_gradients(ours, theirs, *inputs, rel=1e-9):
    """Equal values, and equal gradients of the inputs."""
    assert ours.shape == ()
    assert ours.item() == pytest.approx(theirs.item(), rel=rel, abs=rel)
    gradients = torch.autograd.grad(1.7 * ours, inputs)
    expected = torch.autograd.grad(1.7 * theirs, inputs)
    for a, b in zip(gradients, expected, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() < rel * b.abs().max()


def unit(x):
    """A vector of length 1, without torch's normalize."""
    return x / (x * x).sum().sqrt()
