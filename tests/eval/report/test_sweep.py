"""`ssl-xcit sweep DIR`: the leaderboard against the files, importance against a known function."""

import json
import re

import numpy as np
import pytest
from commands import run
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import partial_dependence

from ssl_xcit.eval.report.importance import importance
from ssl_xcit.eval.report.sweep import read_sweep


def trial(folder, lr, temp, knn=None, state="finished", steps=8, error=""):
    folder.mkdir()

    def write(name, content):
        (folder / name).write_text(json.dumps(content))

    overrides = [f"optim.lr={lr}", f"objective.teacher_temp={temp}"]
    starts = [{"at": 1.0, "seconds": 61.0}]
    write("trial.json", {"overrides": overrides, "state": state, "starts": starts, "error": error})
    write("run.json", {"plan": {"total_steps": 8}})
    rows = [f"{s},1.0,{'' if knn is None else knn - 8 + s}\n" for s in range(2, steps + 1, 2)]
    (folder / "metrics.csv").write_text("".join(["step,loss,knn_k20\n", *rows]))
    if state == "finished":
        results = {"random": {"knn_k20": 1.0}, "pretrained": {"knn_k20": knn, "linear": 9.0}}
        bounds = {"pretrained": {"knn_k20": [knn - 2, knn + 2]}}
        write("summary.json", {"results": results, "intervals": bounds})


@pytest.fixture
def swept(tmp_path):
    folder = tmp_path / "swept"
    folder.mkdir()
    for number, (lr, knn) in enumerate((("0.001", 60.0), ("0.003", 70.0), ("0.1", 50.0))):
        trial(folder / f"t{number}", lr, "0.04", knn + 1)
        trial(folder / f"u{number}", lr, "0.07", knn)
    trial(folder / "t6", "1", "0.04", state="failed", error="loss is <not> finite")
    trial(folder / "t7", "2", "0.04", 40.0, "pruned", 4)
    trial(folder / "t8", "3", "0.04", 45.0, "running", 2)
    about = {
        "command": "ssl-xcit pretrain -m optim.lr=...", "of": "pretrain", "fixed": ["epochs=2"],
        "all_fixed": ["epochs=2", "name=swept", "data.root='a b'"], "metric": "knn_k20",
        "maximize": True,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def test_leaderboard(swept, capsys):
    assert run("sweep", str(swept)) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in out.splitlines() if "│" in line]
    assert rows[0] == ["1", "0.003", "0.04", "71.0", "69.0–73.0", "8", "1 min 1 s", ""]
    values = ["71.0", "70.0", "61.0", "60.0", "51.0", "50.0", "39.0", "36.0", ""]
    assert [row[3] for row in rows] == values
    assert [row[-1] for row in rows[6:]] == ["stopped", "ended early", "failed"]
    assert rows[7][5] == "4 of 8"
    for words in (
        "6 finished, 1 ended early, 1 failed, 1 stopped",
        "failed: optim.lr=1 objective.teacher_temp=0.04: loss is <not> finite",
        "ssl-xcit pretrain epochs=2 'data.root='\"'\"'a b'\"'\"'' optim.lr=0.003",
        "hyper-parameter importance: optim.lr 9",
    ):
        assert words in out
    assert "loss is &lt;not&gt; finite" in (swept / "sweep.html").read_text()


def test_another_metric_and_the_lowest_first(swept, capsys):
    assert run("sweep", f"dir={swept}", "metric=linear", f"out={swept}/other.html", "top=2") == 0
    out = capsys.readouterr().out
    assert "the best 2 of 9" in out
    assert "9.0" in out
    assert (swept / "other.html").is_file()
    about = json.loads((swept / "sweep.json").read_text())
    (swept / "sweep.json").write_text(json.dumps(about | {"maximize": False}))
    assert read_sweep(swept).finished[0].value == 50.0


def test_a_known_function_is_told_apart():
    """Against scikit-learn's partial dependence of the same forest."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, 60), rng.uniform(1, 2, 60)
    kind = rng.choice(["x", "y"], 60)
    result = 10 * a + 2 * b + 4 * (kind == "y")
    settings = {"a": a.astype(str), "b": b.astype(str), "kind": kind, "same": ["1"] * 60}
    found = importance({key: list(map(str, v)) for key, v in settings.items()}, result.tolist())
    assert list(found) == ["a", "kind", "b"]
    assert sum(found.values()) == pytest.approx(1)
    features = np.stack([a, b, kind == "x", kind == "y"], axis=1).astype(float)
    forest = RandomForestRegressor(128, random_state=0).fit(features, result)
    options = {"grid_resolution": 100, "method": "brute"}
    spread = [np.std(partial_dependence(forest, features, [i], **options).average) for i in (0, 1)]
    assert found["a"] / found["b"] == pytest.approx(spread[0] / spread[1], rel=1e-6)
    assert importance({"a": ["1", "2", "3"]}, [1.0, 2.0, 3.0]) == {}
    assert importance({"a": ["1", "2", "3", "4"]}, [1.0] * 4) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no folder of a sweep"),
        ([], "dir is needed: add dir=..."),
        (["{}", "metric=map"], "metric=map: no finished trial has it"),
        (["{}", "out=page.txt"], "a file ending in .html"),
        (["{}", "top=0"], "top=0"),
    ],
)
def test_bad_input(words, message, swept, capsys):
    assert run("sweep", *(word.format(swept) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
