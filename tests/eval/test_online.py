"""Evaluation while training: its budget, its best checkpoint, both networks, and that it has no
effect on the run.
"""

import json
from pathlib import Path

import pytest
import torch
from commands import NO_ONLINE, last_state, metrics, run, same

from ssl_xcit.models.weights import load_backbone


@pytest.fixture
def pretrain(tmp_path, monkeypatch, on_few_photos):
    """Runs of eight steps that are measured on a few photographs."""
    monkeypatch.chdir(tmp_path)

    def start(name, *words):
        words = ["evaluation.evaluators.linear=null", "evaluation.baselines=null", *words]
        small = [word for word in NO_ONLINE if "linear.epochs" not in word]
        words += ["eval_data=folder", *on_few_photos]
        assert run("pretrain", f"name={name}", *small, *words) == 0
        return Path("runs", name)

    return start


def test_both_networks_a_best_checkpoint_and_no_effect(pretrain):
    online = {"networks": "[teacher,student]", "every_steps": 2, "eval_budget": "null"}
    words = [f"callbacks.online.{key}={value}" for key, value in online.items()]
    with_online = pretrain("with", *words)
    without = pretrain("without", "~callbacks.online")
    assert same(last_state(with_online), last_state(without))
    rows = [r for r in metrics(with_online) if r.get("knn_k20")]
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8]
    assert all(0 <= float(r["student_knn_k20"]) <= 100 for r in rows)
    assert all(float(r["online_seconds"]) > 0 and 0 < float(r["online_share"]) < 1 for r in rows)

    best = json.loads((with_online / "checkpoints/best.json").read_text())
    top = max(rows, key=lambda r: float(r["knn_k20"]))
    assert best["step"] == int(top["step"])
    assert best["value"] == pytest.approx(float(top["knn_k20"]))
    content = torch.load(with_online / "checkpoints/best.ckpt", weights_only=True)
    assert content["global_step"] == best["step"]
    load_backbone(with_online / "checkpoints/best.ckpt")
    assert not (without / "checkpoints/best.ckpt").exists()


def test_a_budget_is_kept_and_an_unknown_best_is_named(pretrain, capsys):
    online = {"eval_budget": 0.0001, "every_steps": 2, "best": "knn_k21"}
    folder = pretrain("tight", *(f"callbacks.online.{key}={v}" for key, v in online.items()))
    assert len([r for r in metrics(folder) if r.get("knn_k20")]) == 1
    error = capsys.readouterr().err
    assert "ran 1 times and was left out 3 times" in error
    assert "eval_budget=null sets no limit" in error
    assert "best=knn_k21 is not measured" in error
    assert not (folder / "checkpoints/best.ckpt").exists()
