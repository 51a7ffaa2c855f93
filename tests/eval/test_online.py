"""Evaluation while training: its budget, its best checkpoint, both networks, and that it leaves no
trace.
"""

import json
from pathlib import Path

import pytest
import torch
from commands import SMALL, metrics, run, same
from ssl_xcit.eval.knn import KNN
from ssl_xcit.eval.online import OnlineEvaluation

from ssl_xcit.models.weights import load_backbone

WORDS = ["evaluation.baselines=null", *SMALL]


def weights(folder):
    newest = max(Path(folder, "checkpoints").glob("step-*.ckpt"))
    content = torch.load(newest, weights_only=True)
    return content["state_dict"], content["optimizer_states"]


def test_both_networks_a_best_checkpoint_and_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = ["callbacks.online.networks=[teacher,student]", "callbacks.online.every_steps=2"]
    assert run("pretrain", "name=with", *WORDS, *both) == 0
    without = [w for w in WORDS if not w.startswith("callbacks.online")]
    assert run("pretrain", "name=without", "~callbacks.online", *without) == 0
    assert same(weights("runs/with"), weights("runs/without"))
    rows = [r for r in metrics("runs/with") if r.get("knn_k20")]
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8]
    assert all(0 <= float(r["student_knn_k20"]) <= 100 for r in rows)
    assert all(float(r["online_seconds"]) > 0 and 0 < float(r["online_share"]) < 1 for r in rows)

    best = json.loads(Path("runs/with/checkpoints/best.json").read_text())
    top = max(rows, key=lambda r: float(r["knn_k20"]))
    assert best["step"] == int(top["step"])
    assert best["value"] == pytest.approx(float(top["knn_k20"]))
    content = torch.load("runs/with/checkpoints/best.ckpt", weights_only=True)
    assert content["global_step"] == best["step"]
    load_backbone("runs/with/checkpoints/best.ckpt")
    assert not Path("runs/without/checkpoints/best.ckpt").exists()


def test_a_budget_is_kept_and_what_was_left_out_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [w for w in WORDS if "eval_budget" not in w]
    small = ["callbacks.online.eval_budget=0.0001", "callbacks.online.every_steps=2"]
    assert run("pretrain", "name=tight", *words, *small) == 0
    assert len([r for r in metrics("runs/tight") if r.get("knn_k20")]) == 1
    said = capsys.readouterr().err
    assert "ran 1 times and was left out 3 times" in said
    assert "eval_budget=null sets no limit" in said


def test_a_best_that_is_not_measured_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", "name=typo", *WORDS, "callbacks.online.best=knn_k21") == 0
    assert "best=knn_k21 is not measured" in capsys.readouterr().err
    assert not Path("runs/typo/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize(
    "options",
    [{"every_steps": 0}, {"networks": []}, {"networks": ["techer"]}, {"eval_budget": 0.0},
     {"evaluators": {"knn": None}}],
)  # fmt: skip
def test_bad_settings(options):
    with pytest.raises(
        ValueError, match=r"at least 1 and 2|both|null for no limit|evaluators: none"
    ):
        OnlineEvaluation(**{"evaluators": {"knn": KNN()}, **options})
