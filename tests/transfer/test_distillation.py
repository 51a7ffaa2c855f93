"""Distillation against loops written from the paper (DeiT, section 4)."""

import copy
import sys
from math import exp, log

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import interpolate

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sets import Arrays
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.classification.data import of_pair
from ssl_xcit.transfer.classification.distillation import Teacher, load_teacher
from ssl_xcit.transfer.classification.task import Classification

K = 4
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture
def train():
    source = Arrays(np.zeros((K, 16, 16, 3), np.uint8), "made", np.arange(K), list("abcd"))
    return of_pair(LabelledPair(source, source, "made", 16, 16)).train


@pytest.fixture
def pixels():
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.integers(0, 256, (5, 3, 24, 24), dtype=np.uint8))


def classifier(num_classes=K, **options):
    model = XCiT(16, 1, 2, patch_size=8, num_classes=num_classes, **options)
    if num_classes:
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A classifier of ours in a file."""
    torch.manual_seed(1)
    model = classifier()
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth", model


def student(**settings):
    torch.manual_seed(2)
    return Classification(classifier(), list("abcd"), size=24, **settings).eval()


def log_softmax(row):
    total = log(sum(exp(float(z)) for z in row))
    return [float(z) - total for z in row]


@pytest.mark.parametrize("tau", [None, 3.0])
def test_loss_is_the_papers(tau, checkpoint, pixels, train, monkeypatch):
    """(1 - alpha) CE(mixed soft targets) + alpha CE(argmax teacher), or tau^2 KL; the teacher sees
    the mixed images.
    """
    path, model = checkpoint
    task = student(
        teacher=str(path), alpha=0.3, tau=tau, cutmix=0.0, erase_prob=0.0, label_smoothing=0.1
    )
    task.before_training(train)
    monkeypatch.setattr(task.mixup, "make_params", lambda flat: {"lam": 0.8})
    monkeypatch.setattr(torch, "randperm", torch.arange)  # mixed with the one before
    targets = [0, 3, 1, 2, 1]
    with torch.no_grad():
        x = (pixels / 255 - MEAN) / STD
        mixed = 0.8 * x + 0.2 * x.roll(1, 0)
        ours = [log_softmax(row) for row in task.backbone.head(task.backbone(mixed)).double()]
        theirs = model.head(model(mixed)).double()
        tempered = [log_softmax(row / (tau or 1)) for row in task.logits(mixed).double()]
        losses = task.losses(pixels, torch.tensor(targets))
    supervised = distilled = 0.0
    for i in range(5):
        for k in range(K):
            y = sum(
                weight * ((1 - 0.1) * (k == targets[j]) + 0.1 / K)
                for j, weight in ((i, 0.8), (i - 1, 0.2))
            )
            supervised -= y * ours[i][k] / 5
        if tau is None:
            distilled -= ours[i][int(theirs[i].argmax())] / 5
        else:
            soft = log_softmax(theirs[i] / tau)
            pairs = zip(soft, tempered[i], strict=True)
            distilled += tau**2 * sum(exp(p) * (p - q) for p, q in pairs) / 5
    assert float(losses["cross_entropy"]) == pytest.approx(0.7 * supervised, abs=1e-5)
    assert float(losses["distillation"]) == pytest.approx(0.3 * distilled, abs=1e-5)
    assert losses.keys() == {"cross_entropy", "distillation"}


def test_the_teacher_is_frozen_and_in_no_state_dict(checkpoint, pixels, train):
    path, model = checkpoint
    task = student(teacher=str(path))
    names = set(task.state_dict())
    task.before_training(train)
    assert set(task.state_dict()) == names
    assert len(list(task.parameters())) == len(list(task.backbone.parameters()))
    network = task.teacher.network
    task.train()
    assert not network.training
    sum(task.losses(pixels, torch.tensor([0, 1, 2, 3, 0])).values()).backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in task.parameters())
    state = network.backbone.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert copy.deepcopy(task).teacher is None

    # its name and digest are what is kept
    digest = task.settings["teacher_sha256"]
    assert len(digest) == 64
    student(**{"teacher": str(path), "teacher_sha256": digest}).before_training(train)
    other = student(teacher=str(path), teacher_sha256="0" * 64)
    with pytest.raises(UserError, match=f"digest {digest}, not 000"):
        other.before_training(train)
    assert student(teacher="nothing.pth").teacher is None  # not needed to predict


def test_the_teacher_has_its_own_statistics_and_size(pixels):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, K))
    own = Preprocess(3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    teacher = Teacher(network, own, size=32)
    logits = teacher.logits((pixels / 255 - MEAN) / STD, Preprocess())
    mean, std = (torch.tensor(v)[:, None, None] for v in own.statistics())
    seen = interpolate(pixels / 255, (32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert torch.allclose(logits, network((seen - mean) / std), atol=1e-4)


def test_teachers_of_timm(tmp_path, pixels, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=K).eval()
    torch.nn.init.normal_(network.head.weight)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "vit.pth")
    file = str(tmp_path / "vit.pth")
    teacher = load_teacher("timm/test_vit", file, K, 3)
    settings = network.pretrained_cfg
    size = settings["input_size"][-1]
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    seen = interpolate(pixels / 255, (size, size), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = network((seen - mean) / std)
    logits = teacher.logits((pixels / 255 - MEAN) / STD, Preprocess())
    assert torch.allclose(logits, expected, atol=1e-4)
    # one that takes all sizes gets the student's, as published, or the one that is asked for
    torch.save(timm.create_model("test_resnet", num_classes=K).state_dict(), tmp_path / "r.pth")
    assert load_teacher("timm/test_resnet", str(tmp_path / "r.pth"), K, 3).size is None
    assert load_teacher("timm/test_resnet", str(tmp_path / "r.pth"), K, 3, 48).size == 48

    with pytest.raises(UserError, match="knows 4 classes, and the data set has 10"):
        load_teacher("timm/test_vit", file, 10, 3)
    with pytest.raises(UserError, match="does not fit teacher=timm/test_resnet: missing"):
        load_teacher("timm/test_resnet", file, K, 3)
    with pytest.raises(UserError, match="takes images of 3 channels, and these have 1"):
        load_teacher("timm/test_vit", file, K, 1)
    with pytest.raises(UserError, match="has no such model"):
        load_teacher("timm/regnet_z", None, K, 3)
    with pytest.raises(
        UserError, match=r"teacher=timm/test_vit: .* cannot be downloaded .* teacher_ckpt=FILE"
    ):
        load_teacher("timm/test_vit", None, K, 3)
    with pytest.raises(UserError, match="no such file"):
        load_teacher("timm/test_vit", str(tmp_path / "none.pth"), K, 3)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-xcit\[timm\]'"):
        load_teacher("timm/test_vit", file, K, 3)


def test_teachers_that_do_not_fit(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(UserError, match="knows 4 classes, and the data set has 7"):
        load_teacher(str(path), None, 7, 3)
    torch.save(classifier(0).state_dict(), tmp_path / "headless.pth")
    with pytest.raises(UserError, match="has no classifier"):
        load_teacher(str(tmp_path / "headless.pth"), None, K, 3)
    with pytest.raises(UserError, match=f"teacher={path}"):
        load_teacher("xcit_nano_12_p16_224", str(path), K, 3)
    with pytest.raises(UserError, match="distillation is of one class an image"):
        student(teacher=str(path), multi_label=True)


def test_autocast_covers_the_teacher(checkpoint, pixels, train):
    path, _ = checkpoint
    task = student(teacher=str(path), mixup=0.0, cutmix=0.0, erase_prob=0.0)
    task.before_training(train)
    types = []
    task.teacher.network.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = task.losses(pixels, torch.zeros(5, dtype=torch.int64))
    assert types == [torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
