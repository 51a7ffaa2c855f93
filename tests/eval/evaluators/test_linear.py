"""The linear probe against torch's own SGD, one head at a time, and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_xcit.eval.evaluators.linear import LinearProbe, measure, train_heads
from ssl_xcit.eval.evaluators.linear_heads import (
    AccuracyMeter,
    HeadSetting,
    LinearHead,
    ParallelHeads,
    load_head,
)
from ssl_xcit.eval.features.extract import FeatureSet
from ssl_xcit.models.xcit import XCiT


def problem(seed=0, n=600, classes=5, dim=24, noise=2.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    ids = rng.integers(classes, size=2 * n)
    rows = (centres[ids] + noise * rng.normal(size=(2 * n, dim))).astype(np.float32)
    return FeatureSet(rows[:n], ids[:n].astype(np.int64), rows[n:], ids[n:].astype(np.int64))


def one_head_with_torch(x, y, num_classes, lr, epochs, batch_size, seed, weight_decay):
    generator, order = (torch.Generator().manual_seed(s) for s in (seed, seed + 1))
    head = torch.nn.Linear(x.shape[1], num_classes)
    head.weight.data.copy_(0.01 * torch.randn(num_classes, x.shape[1], generator=generator))
    head.bias.data.zero_()
    options = {"momentum": 0.9, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(head.parameters(), lr * batch_size / 256, **options)
    per_epoch = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_heads_side_by_side_equal_heads_one_by_one(weight_decay):
    data = problem()
    y = torch.from_numpy(data.train_labels)
    whole = torch.from_numpy(data.train)
    x = {"cls": whole[:, :10].contiguous(), "cls_patch": whole}
    settings = [HeadSetting(kind, lr, weight_decay) for kind in x for lr in (0.01, 0.3, 1.0)]
    heads = train_heads(x, y, 5, settings, epochs=4, batch_size=128, seed=7)
    assert heads.settings == settings
    for i, setting in enumerate(settings):
        weight, bias = heads.one(i)
        reference = one_head_with_torch(x[setting.kind], y, 5, setting.lr, 4, 128, 7, weight_decay)
        assert torch.allclose(weight, reference.weight, atol=1e-4)
        assert torch.allclose(bias, reference.bias, atol=1e-4)


def test_near_scikit_learn():
    data = problem()
    values = dict(LinearProbe(epochs=50)(data))
    reference = LogisticRegression(C=1e4, max_iter=2000).fit(data.train, data.train_labels)
    expected = 100 * reference.score(data.test, data.test_labels)
    assert values["linear"] == pytest.approx(expected, abs=2.0)
    assert values["linear"] > 70


def test_the_test_set_has_no_say_in_the_choice():
    """With test labels shuffled the same learning rate is chosen, and the accuracy is chance."""
    data = problem()
    shuffled = np.random.default_rng(1).permutation(data.test_labels)
    honest = dict(LinearProbe(epochs=5)(data))
    blind = dict(LinearProbe(epochs=5)(replace(data, test_labels=shuffled)))
    assert honest["linear_lr"] == blind["linear_lr"]
    assert blind["linear"] < 35 < honest["linear"]


def test_a_diverged_head_counts_nothing_and_harms_no_other():
    data = problem(noise=0.5)
    x, y = {"cls": torch.from_numpy(100 * data.train)}, torch.from_numpy(data.train_labels)
    settings = [HeadSetting("cls", 1e-4, 0.0), HeadSetting("cls", 1e38, 0.0)]
    both = train_heads(x, y, 5, settings, epochs=3, batch_size=64, seed=0)
    alone = train_heads(x, y, 5, settings[:1], epochs=3, batch_size=64, seed=0)
    weight, bias = both.one(0)
    assert torch.allclose(weight, alone.one(0)[0], atol=1e-5)
    tally = measure(both, x, y)
    assert tally.correct[0] > 0.9 * len(y)
    assert tally.correct[1] == 0
    assert tally.best() == 0
    expected = torch.nn.functional.cross_entropy(x["cls"] @ weight.T + bias, y)
    assert tally.loss[0].item() / len(y) == pytest.approx(expected.item(), rel=1e-3)


def test_the_choice_is_by_accuracy_unless_chance_decides():
    def chosen(accuracy, loss, count):
        settings = [HeadSetting("cls", lr, 0.0) for lr in range(1, len(accuracy) + 1)]
        tally = AccuracyMeter(ParallelHeads(settings, {"cls": 2}, 2, 0))
        tally.correct, tally.count = torch.tensor(accuracy) * count / 100.0, count
        tally.loss = torch.tensor(loss) * count
        return tally.best()

    accuracy, loss = [70.0, 90.0, 92.0, 91.0], [0.1, 0.4, 0.9, 0.3]
    assert chosen(accuracy, loss, 300) == 3  # 1.6 points of standard error
    assert chosen(accuracy, loss, 1_000_000) == 2
    assert chosen([0.0, 0.0], [torch.inf, 2.0], 10) == 1


def test_the_kind_of_features_is_chosen_and_the_head_is_saved(tmp_path):
    data = problem()
    noise = np.random.default_rng(0).normal(size=(2, 600, 24)).astype(np.float32)
    features = replace(
        data, train=noise[0], test=noise[1], more={"patch": (data.train, data.test)},
        class_names=list("abcde"),
    )  # fmt: skip
    probe = LinearProbe(kinds=["cls", "patch"], lrs=[0.1, 1.0], weight_decays=[0, 1e-3], epochs=20)
    value = dict(probe(features))["linear"]
    assert probe.chosen["kind"] == "patch"
    probe.head.save(tmp_path / "head.pt")
    head = load_head(tmp_path / "head.pt")
    predicted = np.array(head.ids)[head(torch.from_numpy(data.test)).argmax(dim=1).numpy()]
    assert 100 * (predicted == data.test_labels).mean() == pytest.approx(value)
    assert head.names == list("abcde")
    (tmp_path / "head.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a linear head of ours"):
        load_head(tmp_path / "head.pt")


def test_a_head_takes_images_through_the_backbone():
    torch.manual_seed(0)
    backbone, images = XCiT(32, 2, 2, patch_size=8), torch.randn(3, 3, 32, 32)
    head = LinearHead(torch.randn(4, 64), torch.zeros(4), "cls_patch")
    found = backbone.eval().forward_features(images)
    features = torch.cat((found.cls, found.patches.mean(dim=(2, 3))), dim=1)
    assert torch.allclose(head.of_images(backbone, images), head(features), atol=1e-5)


def test_unknown_test_classes_are_wrong_and_gaps_are_fine():
    data = problem(noise=0.1)
    ids = np.array([2, 40, 41, 77, 1000])
    test_labels = ids[data.test_labels]
    test_labels[:60] = 5  # not in training
    test_labels[60:90] = 2000
    features = FeatureSet(data.train, ids[data.train_labels], data.test, test_labels)
    value = dict(LinearProbe(epochs=5)(features))["linear"]
    assert value == pytest.approx(100 * 510 / 600, abs=0.5)
