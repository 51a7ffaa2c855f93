"""metrics.csv: columns that come later, and a resumed run that repeats no step."""

import torch
from commands import metrics

from ssl_xcit.training.health import teacher_entropy
from ssl_xcit.training.metrics import CSVMetrics


def test_columns_appear_as_they_come(tmp_path):
    log = CSVMetrics(tmp_path)
    log.log_metrics({"loss": 1.5}, 10)
    log.log_metrics({"knn_k20": 80.0}, 10)
    log.log_metrics({"loss": 0.1 + 0.2, "lr": 1e-3}, 20)
    assert [(r["step"], r["loss"], r["knn_k20"], r["lr"]) for r in metrics(tmp_path)] == [
        ("10", "1.5", "", ""), ("10", "", "80.0", ""), ("20", repr(0.1 + 0.2), "", "0.001"),
    ]  # fmt: skip


def test_a_resumed_run_goes_on_without_a_step_twice(tmp_path):
    log = CSVMetrics(tmp_path)
    for step in (10, 20, 30):
        log.log_metrics({"loss": float(step)}, step)
    resumed = CSVMetrics(tmp_path)  # from a checkpoint at step 15
    resumed.log_metrics({"loss": 21.0}, 20)
    resumed.log_metrics({"loss": 31.0, "new": 1.0}, 30)
    assert [(r["step"], r["loss"]) for r in metrics(tmp_path)] == [
        ("10", "10.0"), ("20", "21.0"), ("30", "31.0"),
    ]  # fmt: skip


def test_entropy_share():
    assert teacher_entropy(torch.full((2, 3, 8), 1 / 8))["teacher_entropy_share"] > 0.999999
    one_hot = torch.nn.functional.one_hot(torch.tensor([[1, 2]]), 8).float()
    assert abs(teacher_entropy(one_hot)["teacher_entropy"]) < 1e-6
