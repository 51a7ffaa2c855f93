"""The step on real images: it learns, the teacher is the EMA, nothing else moves it."""

import json
import math
from copy import deepcopy
from functools import partial

import lightning
import numpy as np
import pytest
import torch

from ssl_xcit.data.multicrop import TorchvisionMultiCrop
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Subset
from ssl_xcit.models.head import DINOHead, ProjectionHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.distillation import Distillation
from ssl_xcit.objectives.objective import RunLength
from ssl_xcit.training.datamodule import multi_crop_data
from ssl_xcit.training.frozen_teacher import TeacherBackbone
from ssl_xcit.training.module import Pretraining, Schedules, make_networks
from ssl_xcit.training.optim import parameter_groups
from ssl_xcit.training.schedules import Cosine

K = 64


SIZE = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4}


def make(
    drop_path=0.0, lr=2e-3, freeze_steps=0, steps=40, teacher_temp=0.04, ema=0.9, objective=None
):
    torch.manual_seed(0)
    objective = objective or dino(freeze_steps, teacher_temp)
    backbone = XCiT(**SIZE, drop_path=drop_path)
    student, teacher = make_networks(backbone, objective.make_head(32), XCiT(**SIZE))
    schedules = Schedules(
        lr=Cosine(lr, 1e-6, steps, 5),
        weight_decay=Cosine(0.04, 0.4, steps),
        ema=lambda step: ema,
    )
    return Pretraining(student, teacher, objective, schedules, torch.optim.AdamW)


def dino(freeze_steps=0, teacher_temp=0.04, **settings):
    """For a run of an epoch a step."""
    return DINO(
        RunLength(12, 12, 1.0, 1000, 1000.0), partial(DINOHead, hidden_dim=64, bottleneck_dim=32),
        freeze_epochs=freeze_steps, num_prototypes=K, ema=0.9, teacher_temp_start=teacher_temp,
        teacher_temp=teacher_temp, **settings,
    )  # fmt: skip


def fit(module, source, steps, folder, callbacks=(), **trainer):
    data = multi_crop_data(source, TorchvisionMultiCrop(16, 8, 2), 12, steps, 1, RGB, num_workers=0)
    runner = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), **trainer,
    )  # fmt: skip
    runner.fit(module, datamodule=data)
    return runner


def entropy(p):
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


class Watch(lightning.Callback):
    """Losses, and the teacher recomputed by the paper's rule beside the module's."""

    def on_train_start(self, trainer, module):
        self.losses = []
        self.expected = deepcopy(module.teacher)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(module.output.loss.item())
        self.targets = module.output.signs.rows
        with torch.no_grad():
            for mine, student in zip(
                self.expected.parameters(), module.student.parameters(), strict=True
            ):
                ema = module.schedules.ema(0)
                mine.mul_(ema).add_((1 - ema) * student)


@pytest.fixture
def handful(photos_pair):
    return Subset(photos_pair.train, np.arange(0, len(photos_pair.train), 120))


def test_it_learns_from_real_images(handful, tmp_path):
    module, watch = make(lr=1e-3, steps=150, teacher_temp=0.05, ema=0.95), Watch()
    fit(module, handful, 150, tmp_path, [watch])
    assert np.mean(watch.losses[-5:]) < math.log(K) - 0.5
    # neither uniform nor the same for every image: the prototypes tell the images apart
    rows = watch.targets.flatten(0, 1)
    assert entropy(rows.mean(0)) - entropy(rows).mean() > 0.4
    for (name, teacher), expected in zip(
        module.teacher.named_parameters(), watch.expected.parameters(), strict=True
    ):
        assert torch.allclose(teacher, expected, atol=1e-6), name
        if name != "head.last_layer.weight_g":
            assert not torch.equal(teacher, dict(module.student.named_parameters())[name])
    assert not any(p.requires_grad for p in module.teacher.parameters())
    own = dict(module.student.named_buffers())["backbone.blocks.0.local_mp.bn.running_mean"]
    theirs = dict(module.teacher.named_buffers())["backbone.blocks.0.local_mp.bn.running_mean"]
    assert not torch.equal(own, theirs)


def test_the_average_of_a_frozen_teachers_student_has_its_running_statistics(handful, tmp_path):
    """It sees no images, and is what is evaluated: at momentum 0 it is the student itself."""
    frozen = TeacherBackbone(XCiT(**SIZE), Preprocess(), None, Preprocess())
    module = make(
        ema=0.0,
        objective=Distillation(
            RunLength(12, 12, 1.0, 5, 5.0), partial(ProjectionHead, num_layers=1, batch_norm=False),
            lambda *_, **__: frozen, teacher="x", queue=12, ema=0.0,
        ),
    )  # fmt: skip
    fit(module, handful, 5, tmp_path)
    images = torch.randn(4, 3, 16, 16)
    student, average = module.student.backbone.eval(), module.teacher.backbone.eval()
    assert not torch.equal(student.blocks[0].local_mp.bn.running_mean, torch.zeros(32))
    assert torch.equal(student(images), average(images))


def test_one_step_equals_the_papers_loop(handful, tmp_path):
    """The same step with plain modules: one pass a resolution, pairwise loss, clip by tensor,
    AdamW, EMA, center.
    """
    module = make()
    student, teacher = deepcopy(module.student), deepcopy(module.teacher)
    seen = []

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([part.clone() for part in batch])

    fit(module, handful, 2, tmp_path, [Keep()])

    optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0)
    center = torch.zeros(K)
    for step, (large, small) in enumerate(seen):
        for group, decayed in zip(optimizer.param_groups, (True, False), strict=True):
            group["lr"] = module.schedules.lr(step)
            group["weight_decay"] = module.schedules.weight_decay(step) if decayed else 0.0
        out = [student.backbone(views.flatten(0, 1)) for views in (large, small)]
        logits = student.head(torch.cat(out)).chunk(4)
        with torch.no_grad():
            targets = teacher.head(teacher.backbone(large.flatten(0, 1))).chunk(2)
        loss, pairs = 0.0, 0
        for g in range(2):
            q = ((targets[g] - center) / 0.04).softmax(-1)
            for v in range(4):
                if v != g:
                    loss = loss - (q * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        optimizer.zero_grad()
        (loss / pairs).backward()
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, 3.0 / (parameter.grad.norm().item() + 1e-6)))
        optimizer.step()
        center = 0.9 * center + 0.1 * torch.cat(targets).mean(0)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(0.9 * t + 0.1 * s)

    assert torch.allclose(module.objective.center.center, center, atol=1e-5)
    for ours, theirs in ((module.student, student), (module.teacher, teacher)):
        for (name, a), b in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert torch.allclose(a.float(), b.float(), atol=2e-4), name


def test_prototypes_are_frozen_at_first(handful, tmp_path):
    module = make(freeze_steps=3)
    before = module.student.head.last_layer.weight_v.detach().clone()
    fit(module, handful, 3, tmp_path)
    assert torch.equal(module.student.head.last_layer.weight_v, before)
    module = make(freeze_steps=2)
    fit(module, handful, 3, tmp_path)
    assert not torch.equal(module.student.head.last_layer.weight_v, before)


def test_two_runs_are_equal_whatever_was_drawn_before(handful, tmp_path):
    states = []
    for noise in (0, 7):
        module = make(drop_path=0.3)
        torch.rand(noise)
        fit(module, handful, 4, tmp_path)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_loss_that_is_not_finite_stops_with_a_hint(handful, tmp_path):
    module = make()
    with torch.no_grad():
        module.student.backbone.norm.weight.fill_(torch.nan)
    before = deepcopy(module.state_dict())
    with pytest.raises(FloatingPointError, match=r"5 steps in a row, up to 5, .* lower optim\.lr"):
        fit(module, handful, 9, tmp_path)
    after = module.state_dict()
    assert all(torch.equal(before[k].nan_to_num(7.0), after[k].nan_to_num(7.0)) for k in before)
    dump = json.loads((tmp_path / "nonfinite-step-000005-rank0.json").read_text())
    assert dump["weight_norms"]["student.backbone.norm.weight"] == "NaN"
    assert len(dump["images"]) == 12


def test_parts_of_a_batch_have_the_gradient_of_all(handful, tmp_path):
    """But for BatchNorm, which is frozen here."""
    grads = []
    for accumulate in (1, 3):
        module = make(lr=0.0, steps=1)
        module.accumulate = accumulate
        for one in module.modules():
            if isinstance(one, torch.nn.BatchNorm2d):
                one.momentum = 0.0
                one.train = lambda mode=True, one=one: setattr(one, "training", False) or one
                one.training = False
        fit(module, handful, 1, tmp_path)
        grads.append([p.grad for p in module.student.parameters() if p.grad is not None])
    assert len(grads[0]) > 20
    for one, parts in zip(*grads, strict=True):
        assert torch.allclose(one, parts, rtol=1e-3, atol=1e-5)


def test_bfloat16(handful, tmp_path):
    module, watch = make(), Watch()
    fit(module, handful, 10, tmp_path, [watch], precision="bf16-mixed")
    assert np.isfinite(watch.losses).all()
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_student_temperature_out_of_range():
    with pytest.raises(ValueError, match="student_temp=0"):
        dino(student_temp=0.0)


def test_a_copy_of_a_compiled_network_runs_its_own_backbone():
    network, _ = make_networks(XCiT(32, 1, 2, 4), DINOHead(32, 4), XCiT(32, 1, 2, 4))
    network.compile_backbone()
    assert deepcopy(network).compiled is None
    assert network.compiled is not None


def test_stochastic_depth_is_the_same_in_parts_and_whole(handful, tmp_path):
    """What each part drops is what the whole batch drops, image by image."""
    drawn = []
    for accumulate in (1, 3):
        module = make(drop_path=0.5, steps=2)
        module.accumulate = accumulate
        layer, found = module.student.backbone.blocks[0].drop_path, []
        draw = layer.draw

        def kept(x, draw=draw, found=found):
            found.append(factor := draw(x))
            return factor

        layer.draw = kept
        fit(module, handful, 1, tmp_path)
        passes = len(found) // accumulate  # branches of the block, each for two resolutions
        parts = [found[n * passes : (n + 1) * passes] for n in range(accumulate)]
        drawn.append(
            [torch.cat([p[i].unflatten(0, (2, -1)) for p in parts], 1) for i in range(passes)]
        )
        assert layer.rows is None
    for whole, in_parts in zip(*drawn, strict=True):
        assert torch.equal(whole, in_parts)
    assert {v for factor in drawn[0] for v in factor.unique().tolist()} == {0.0, 2.0}


def test_parts_of_a_batch_draw_from_one_seed_for_their_own_images(handful, tmp_path):
    """What an objective draws for its images, such as masks and mixtures."""
    module, drawn, parts = make(drop_path=0.5, steps=2), [], []
    module.accumulate = 4
    inputs = module.objective.inputs

    def drawing(views, patch_size, step, part):
        drawn.append(torch.rand(()).item())
        parts.append(part)
        return inputs(views, patch_size, step, part)

    module.objective.inputs = drawing
    fit(module, handful, 2, tmp_path)
    assert drawn == [drawn[0]] * 4 + [drawn[4]] * 4
    assert drawn[0] != drawn[4]
    total = parts[0].total
    for of_step in (parts[:4], parts[4:]):
        images = [i for p in of_step for i in range(p.start, p.start + p.size)]
        assert images == list(range(total))
