"""Regularised linear models against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score
from test_linear import problem

from ssl_xcit.eval.evaluators.linear import LinearProbe
from ssl_xcit.eval.evaluators.logistic import (
    STRENGTHS,
    Logistic,
    MultiLabel,
    Problem,
    Regression,
    fit_classes,
    fit_labels,
    fit_numbers,
    mean_average_precision,
    ranked,
    scaled,
    softmax_loss,
)
from ssl_xcit.eval.features.extract import FeatureSet


@pytest.mark.parametrize("strength", [1e-2, 1e-4])
@pytest.mark.parametrize("dim", [32, 100])  # 64 axes are scaled together
def test_weights_are_scikit_learns(strength, dim):
    data = problem(dim=dim)
    x, _ = scaled(data.train)
    y = torch.from_numpy(data.train_labels)
    weight, bias = fit_classes(x, y, 5)(strength, None)
    reference = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000)
    reference.fit(x.numpy(), data.train_labels)
    assert np.abs(weight.numpy() - reference.coef_).max() < 0.01 * np.abs(reference.coef_).max()
    shift = bias.numpy() - reference.intercept_
    assert np.abs(shift - shift.mean()).max() < 0.02


def test_the_weakest_regularisation_reaches_scikit_learns_minimum():
    data, strength = problem(dim=100, noise=3.0), 1e-6
    x, _ = scaled(data.train)
    y = torch.from_numpy(data.train_labels)
    weight, bias = fit_classes(x, y, 5)(strength, None)
    reference = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000)
    reference.fit(x.numpy(), data.train_labels)

    def minimised(weight, bias):
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
        return float(loss + 0.5 * strength * weight.square().sum())

    found = minimised(weight.double(), bias.double())
    expected = minimised(*map(torch.from_numpy, (reference.coef_, reference.intercept_)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert weight.square().sum() > 100  # the data are separable


def test_a_path_of_strengths_takes_few_steps():
    digits = load_digits()
    x, _ = scaled(digits.data.astype(np.float32))
    steps = []

    def counted(logits, targets):
        steps.append(1)
        return softmax_loss(logits, targets)

    path, model = Problem(x, torch.from_numpy(digits.target), counted, 10), None
    for strength in STRENGTHS:
        model = path.solve(strength, model)
    assert len(steps) < 350  # 1,275 where every axis is scaled alone, once


@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
def test_accuracy_is_scikit_learns_within_a_fifth_of_a_point(noise):
    data = problem(n=2000, noise=noise)
    probe = Logistic()
    value = dict(probe(data))["logistic"]
    x, scale = scaled(data.train)
    strength = probe.chosen["strength"]
    reference = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000)
    reference.fit(x.numpy(), data.train_labels)
    expected = 100 * reference.score(data.test / scale, data.test_labels)
    assert value == pytest.approx(expected, abs=0.2)
    assert dict(Logistic()(data))["logistic"] == value


def labelled_problem(n=800, dim=16, K=6):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2 * n, dim)).astype(np.float32)
    logits = rows @ rng.normal(size=(dim, K)) + rng.normal(size=(2 * n, K)) - 1.0
    return rows, (logits > 0).astype(np.int64)


def test_a_logistic_regression_each_label():
    rows, labels = labelled_problem()
    x = torch.from_numpy(rows).double()
    weight, _ = fit_labels(x, torch.from_numpy(labels), 6)(1e-3, None)
    for k in range(6):
        reference = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8).fit(rows, labels[:, k])
        assert np.allclose(weight[k].numpy(), reference.coef_[0], atol=0.02)
    data = FeatureSet(rows[:800], labels[:800], rows[800:], labels[800:])
    probe = MultiLabel()
    value = dict(probe(data))["label_map"]
    scores = probe.head(torch.from_numpy(rows[800:])).numpy()
    expected = 100 * average_precision_score(labels[800:], scores, average="macro")
    assert value == pytest.approx(expected, abs=1e-6)
    assert value.interval[0] < value < value.interval[1]


def test_labels_that_nobody_has_are_left_out():
    scores = np.random.default_rng(0).random((20, 2))
    truth = np.stack((np.arange(20) % 3 == 0, np.zeros(20, bool)), axis=1)
    found = mean_average_precision(ranked(scores, truth), np.ones(20))
    assert found == pytest.approx(100 * average_precision_score(truth[:, 0], scores[:, 0]))


def test_ridge_is_scikit_learns_and_so_is_what_it_explains():
    rows, _ = labelled_problem()
    rng = np.random.default_rng(1)
    targets = rows @ rng.normal(size=(16, 2)) + rng.normal(size=(len(rows), 2)) + 5.0
    x, y = torch.from_numpy(rows[:800]), torch.from_numpy(targets[:800])
    weight, bias = fit_numbers(x, y, 2)(0.1, None)
    reference = Ridge(alpha=0.05 * 800).fit(rows[:800], targets[:800])
    assert np.allclose(weight.numpy(), reference.coef_, atol=1e-4)
    assert np.allclose(bias.numpy(), reference.intercept_, atol=1e-4)
    probe = Regression()
    values = dict(probe(FeatureSet(rows[:800], targets[:800], rows[800:], targets[800:])))
    found = probe.head(torch.from_numpy(rows[800:])).numpy()
    assert values["r2"] == pytest.approx(100 * r2_score(targets[800:], found), abs=1e-3)
    assert values["mae"] == pytest.approx(np.abs(found - targets[800:]).mean(), abs=1e-4)
    assert values["r2"] > 80


def test_numbers_that_do_not_vary_are_refused_or_left_out():
    rows, _ = labelled_problem()
    flat = FeatureSet(rows[:800], np.ones(800), rows[800:], np.ones(800))
    with pytest.raises(ValueError, match="all the same"):
        dict(Regression()(flat))
    targets = np.stack((rows[:, 0], np.full(len(rows), 3.0)), axis=1).astype(np.float64)
    found = dict(Regression()(FeatureSet(rows[:800], targets[:800], rows[800:], targets[800:])))
    assert found["r2"] > 90  # of the column that varies


@pytest.mark.parametrize("probe", [Logistic(), LinearProbe()])
def test_one_class_and_one_image_a_class_are_errors(probe):
    data = problem(n=5)
    for labels, said in (
        (np.arange(5), "one training image only"),
        (np.zeros(5, int), "one class"),
    ):
        with pytest.raises(ValueError, match=said):
            dict(probe(FeatureSet(data.train, labels, data.test, labels)))
