"""Learning rates that are found by a range test."""

import csv
import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from commands import NO_ONLINE, metrics, run

from ssl_xcit.errors import RunFailed
from ssl_xcit.training.lr_range import HIGHEST, LOWEST, Rising, proposed


def test_the_proposed_rate_by_trying_all_subsequences():
    rng = np.random.default_rng(0)
    rates = [Rising(9)(step) for step in range(9)]
    assert rates[0] == LOWEST
    assert rates[-1] == pytest.approx(HIGHEST)
    for _ in range(20):
        losses = rng.normal(size=9).tolist()
        means = []
        for n in range(1, 10):
            weights = np.array([0.9 ** (n - 1 - i) for i in range(n)])
            means.append((weights * losses[:n]).sum() / weights.sum())
        falling = [
            chosen
            for count in range(2, 10)
            for chosen in combinations(range(9), count)
            if all(means[a] > means[b] for a, b in pairwise(chosen))
        ]
        longest = max(map(len, falling), default=1)
        middles = [(rates[c[0]] * rates[c[-1]]) ** 0.5 for c in falling if len(c) == longest]
        if middles:
            assert any(proposed(rates, losses) == pytest.approx(m) for m in middles)
        else:
            with pytest.raises(RunFailed, match=r"optim\.lr=auto: the loss falls at none"):
                proposed(rates, losses)


def test_the_proposed_rate_of_a_valley():
    """Flat until 1e-5, falling until 1e-3, rising; with noise."""
    rates = [Rising(101)(step) for step in range(101)]
    shape = [min(0.0, max(-2.0, -np.log10(r / 1e-5))) for r in rates]
    shape = [v + 3 * max(0.0, np.log10(r / 1e-3)) for v, r in zip(shape, rates, strict=True)]
    noise = 0.05 * np.random.default_rng(0).normal(size=101)
    found = proposed(rates, (5.0 + np.array(shape) + noise).tolist())
    assert 3e-5 < found < 4e-4
    blown_up = [*(5.0 + np.array(shape[:70])).tolist(), float("inf")]
    assert 3e-5 < proposed(rates[:71], blown_up) < 4e-4


def test_lr_auto_is_found_once(tmp_path, photos_pair, capsys):
    """The first step's peak is the found one; a run that goes on keeps it."""
    rate = ["optim.lr=auto", "optim.min_lr=0"]
    words = [*NO_ONLINE, *rate, f"out={tmp_path}", "name=a", "eval_data=none"]
    assert run("pretrain", *words) == 0
    rows = list(csv.DictReader((tmp_path / "a/lr_range.csv").open()))
    assert 10 <= len(rows) <= 100
    rates, losses = ([float(row[key]) for row in rows] for key in ("lr", "loss"))
    found = json.loads((tmp_path / "a/run.json").read_text())["plan"]["lr"]
    assert found == pytest.approx(proposed(rates, losses))
    assert "lr=auto: 10 steps with rates from 1e-06 to 0.1" in (said := capsys.readouterr().out)
    assert f"lr {found:.2e} after" in said
    learnt = metrics(tmp_path / "a")
    assert max(float(row["lr"]) for row in learnt) <= found
    for file in (tmp_path / "a/summary.json", tmp_path / "a/lr_range.csv"):
        file.unlink()
    max((tmp_path / "a/checkpoints").glob("step-*.ckpt")).unlink()
    assert run("pretrain", *words) == 0
    assert not (tmp_path / "a/lr_range.csv").exists()
    assert [row["lr"] for row in metrics(tmp_path / "a")] == [row["lr"] for row in learnt]
    assert run("pretrain", *words, "name=b", "trainer.devices=2", "trainer.accelerator=cpu") == 2
    assert "optim.lr=auto tries steps on one device" in capsys.readouterr().err
    assert not (tmp_path / "b/checkpoints").exists()
    assert run("pretrain", *words, "optim.lr=fast") == 2
    assert "optim.lr=fast must be" in capsys.readouterr().err
