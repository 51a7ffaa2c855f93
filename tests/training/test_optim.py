"""Parameter groups, clipping and EMA against plain loops."""

from copy import deepcopy

import pytest
import torch

from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.optim import clip_each_, ema_update_, parameter_groups


def small():
    torch.manual_seed(0)
    return XCiT(32, 1, 2, patch_size=4), DINOHead(32, 16, 8, 8)


def test_groups_decay_what_the_reference_decays():
    backbone, head = small()
    decayed, plain = parameter_groups(backbone, head)
    ids = {id(p) for p in decayed["params"]}
    for name, parameter in [*backbone.named_parameters(), *head.named_parameters()]:
        if not parameter.requires_grad:
            assert name == "last_layer.weight_g"
        else:
            assert (id(parameter) in ids) == (parameter.ndim > 1 and not name.endswith("bias"))
    assert id(backbone.cls_token) in ids
    assert id(backbone.blocks[0].attn.temperature) in ids
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0.0


def test_clip_is_by_tensor():
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
    for scale, parameter in zip((0.0, 0.1, 10.0, 1000.0), parameters, strict=True):
        parameter.grad = scale * torch.randn_like(parameter)
    parameters.append(torch.nn.Parameter(torch.randn(2)))  # without gradient
    before = [p.grad.clone() for p in parameters[:-1]]
    norms = clip_each_(parameters, 3.0)
    assert norms.tolist() == pytest.approx([*(g.norm().item() for g in before), 0.0])
    for parameter, gradient in zip(parameters, before, strict=False):
        coefficient = min(1.0, 3.0 / (gradient.norm().item() + 1e-6))
        assert torch.allclose(parameter.grad, gradient * coefficient)
    assert parameters[-1].grad is None


def test_ema_moves_parameters_and_leaves_buffers():
    student, _ = small()
    teacher = deepcopy(student)
    with torch.no_grad():
        for tensor in student.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1.0)
    before = deepcopy(teacher)
    ema_update_(teacher, student, 0.9)
    for (name, new), old, target in zip(
        teacher.named_parameters(), before.parameters(), student.parameters(), strict=True
    ):
        assert torch.allclose(new, 0.9 * old + 0.1 * target, atol=1e-6), name
    for new, old in zip(teacher.buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old)
