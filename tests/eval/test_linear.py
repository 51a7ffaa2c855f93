"""The linear probe against torch's own SGD, one head at a time, and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from ssl_xcit.eval.features import FeatureSet
from ssl_xcit.eval.linear import LinearProbe, best, scores, train_heads


def problem(seed=0, n=600, classes=5, dim=24, noise=2.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    ids = rng.integers(classes, size=2 * n)
    rows = (centres[ids] + noise * rng.normal(size=(2 * n, dim))).astype(np.float32)
    return FeatureSet(rows[:n], ids[:n].astype(np.int64), rows[n:], ids[n:].astype(np.int64))


def one_head_with_torch(x, y, num_classes, lr, epochs, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], num_classes)
    head.weight.data.copy_(0.01 * torch.randn(num_classes, x.shape[1], generator=generator))
    head.bias.data.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr * batch_size / 256, momentum=0.9)
    per_epoch = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def test_heads_side_by_side_equal_heads_one_by_one():
    data = problem()
    x, y = torch.from_numpy(data.train), torch.from_numpy(data.train_labels)
    lrs = [0.01, 0.3, 1.0]
    weight, bias = train_heads(x, y, 5, lrs, epochs=4, batch_size=128, seed=7)
    for i, lr in enumerate(lrs):
        reference = one_head_with_torch(x, y, 5, lr, 4, 128, 7)
        assert torch.allclose(weight[i], reference.weight, atol=1e-4)
        assert torch.allclose(bias[i], reference.bias, atol=1e-4)


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
    blind = dict(
        LinearProbe(epochs=5)(FeatureSet(data.train, data.train_labels, data.test, shuffled))
    )
    assert honest["linear_lr"] == blind["linear_lr"]
    assert blind["linear"] < 35 < honest["linear"]


def test_a_diverged_head_counts_nothing_and_harms_no_other():
    data = problem(noise=0.5)
    x, y = torch.from_numpy(100 * data.train), torch.from_numpy(data.train_labels)
    weight, bias = train_heads(x, y, 5, [1e-4, 1e38], epochs=3, batch_size=64, seed=0)
    alone, _ = train_heads(x, y, 5, [1e-4], epochs=3, batch_size=64, seed=0)
    assert torch.allclose(weight[0], alone[0], atol=1e-5)
    accuracy, loss = scores(weight, bias, x, y)
    assert accuracy[0] > 90
    assert accuracy[1] == 0
    assert loss[1] == torch.inf
    expected = torch.nn.functional.cross_entropy(x @ weight[0].T + bias[0], y)
    assert loss[0].item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_choice_is_by_accuracy_unless_chance_decides():
    accuracy, loss = torch.tensor([70.0, 90.0, 92.0, 91.0]), torch.tensor([0.1, 0.4, 0.9, 0.3])
    assert best(accuracy, loss, 300) == 3  # 1.6 points of standard error
    assert best(accuracy, loss, 1_000_000) == 2
    assert best(torch.tensor([0.0, 0.0]), torch.tensor([torch.inf, 2.0]), 10) == 1


def test_unknown_test_classes_are_wrong_and_gaps_are_fine():
    data = problem(noise=0.1)
    ids = np.array([2, 40, 41, 77, 1000])
    test_labels = ids[data.test_labels]
    test_labels[:60] = 5  # not in training
    test_labels[60:90] = 2000
    features = FeatureSet(data.train, ids[data.train_labels], data.test, test_labels)
    value = dict(LinearProbe(epochs=5)(features))["linear"]
    assert value == pytest.approx(100 * 510 / 600, abs=0.5)


def test_one_class_is_an_error():
    data = problem()
    with pytest.raises(ValueError, match="one class only"):
        dict(
            LinearProbe()(
                FeatureSet(data.train, 0 * data.train_labels, data.test, data.test_labels)
            )
        )


@pytest.mark.parametrize(
    "options", [{"lrs": []}, {"lrs": [0.0]}, {"epochs": 0}, {"val_fraction": 1.0}]
)
def test_bad_settings(options):
    with pytest.raises(ValueError, match="rates above 0"):
        LinearProbe(**options)
