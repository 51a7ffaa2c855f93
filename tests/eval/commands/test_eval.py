"""`ssl-xcit eval` as a person types it: one checkpoint, two compared, ranks, and wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import EVALUATION, images, run
from PIL import Image
from tiny_run import make_run

from ssl_xcit.errors import UserError
from ssl_xcit.eval import statistics
from ssl_xcit.eval.checkpoints import checkpoints_in
from ssl_xcit.eval.commands.eval import out_file
from ssl_xcit.eval.evaluators.linear_heads import load_head
from ssl_xcit.models.weights import load_backbone

ALL = ["num_workers=0", "evaluation.evaluators.linear.epochs=2", "evaluation.cache=false"]
ALL += ["evaluation.evaluators.few_shot.draws=2", "evaluation.evaluators.clustering.runs=2"]
ALL += ["evaluation.evaluators.logistic.strengths=[0.1,0.001]"]
QUICK = [*ALL, *EVALUATION, "evaluation.baselines=null"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_photos, on_few_photos):
    """Two runs that were measured on a few photographs."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [f"data.root={few_photos}", *on_few_photos]
    for name, seed in (("a", 0), ("b", 1)):
        make_run(folder / name, seed, overrides, data="folder")
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A copy, in the current folder."""
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_command_gives_the_whole_picture(here, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "HALVES", 40)
    bins = "evaluation.baselines.colour_histogram.bins=4"
    assert run("eval", "ckpt=runs/a", "per_class=true", bins, *ALL) == 0
    shown = capsys.readouterr().out
    for word in ("k-NN 20", "1 image a class", "linear probe", "logistic regression", "NMI",
                 "retrieval, mAP", "95 %", "by class", "astronaut"):  # fmt: skip
        assert word in shown
    content = json.loads(Path("runs/a/results.json").read_text())
    assert list(content["results"]) == ["random weights", "colour histogram", "pretrained"]
    for metric, (low, high) in content["intervals"]["pretrained"].items():
        assert low <= content["results"]["pretrained"][metric] <= high
    assert set(content["intervals"]["pretrained"]) >= {
        "knn_k20", "fewshot_1", "linear", "logistic", "nmi", "ari", "map", "recall_at_1",
    }  # fmt: skip
    for key in ("weights_sha256", "train_sha256", "test_sha256"):
        assert len(content[key]) == 64
    assert content["protocol"]["evaluators"]["knn"]["temperature"] == 0.07
    assert content["versions"]["torch"] == torch.__version__
    assert content["chosen"]["pretrained"]["logistic"]["strength"] in (0.1, 0.001)
    assert content["seconds"]["pretrained"]["linear"] >= 0
    classes = content["by_class"]["pretrained"]["knn_k20"]
    assert len(classes) == 17
    weighted = sum(value * count for value, count in classes.values())
    total = sum(count for _, count in classes.values())
    assert weighted / total == pytest.approx(content["results"]["pretrained"]["knn_k20"])
    page = Path("runs/a/results.md").read_text()
    assert "| k-NN 20 |" in page
    assert content["weights_sha256"] in page
    head = load_head("runs/a/heads/linear.pt")
    logits = head.of_images(load_backbone("runs/a"), torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 17)


def test_two_checkpoints_are_compared(here, capsys):
    assert run("eval", "ckpt=[runs/a,runs/b]", *QUICK) == 0
    assert "b - a (paired)" in " ".join(capsys.readouterr().out.split())
    content = json.loads(Path("runs/a/comparison.json").read_text())
    assert list(content["results"]) == ["a", "b"]
    paired = content["differences"]["b less a"]["knn_k20"]
    rows = content["results"]
    assert paired["value"] == pytest.approx(rows["b"]["knn_k20"] - rows["a"]["knn_k20"])
    assert paired["low"] <= paired["value"] <= paired["high"]
    assert paired["more_than_chance"] in (True, False)
    assert "significant (Holm, 5 %)" in Path("runs/a/comparison.md").read_text()
    assert Path("runs/a/heads/b-linear.pt").is_file()


@pytest.mark.slow
def test_ranks_share_the_images_and_agree_with_one(here):
    assert run("eval", "ckpt=runs/a", "out=one.json", *QUICK) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone",
        "--no-python", str(Path(sys.executable).with_name("ssl-xcit")),
        "eval", "ckpt=runs/a", "out=three.json", *QUICK,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: three.json") == 1
    one, three = (json.loads(Path(f).read_text())["results"] for f in ("one.json", "three.json"))
    assert one == three


def test_one_set_is_tested_on_the_others(here, capsys):
    rng = np.random.default_rng(0)
    for name, shade in (("dark", 60), ("light", 200)):
        Path("own", name).mkdir(parents=True)
        for i in range(8):
            noise = rng.integers(0, 40, (32, 32, 3)) + shade
            Image.fromarray(noise.astype(np.uint8)).save(f"own/{name}/{i}.png")
    words = ["eval_data=folder", "eval_data.root=own", "eval_data.test_fraction=0"]
    words += ["eval_data.resize=32", "eval_data.size=32", "evaluation.baselines=null"]
    assert run("eval", "ckpt=runs/a", *words, *ALL) == 0
    content = json.loads(Path("runs/a/results-folder.json").read_text())
    values = content["results"]["pretrained"]
    assert values["knn_k10"] > 50
    assert "recall_at_1" in values
    assert "linear" not in values
    assert set(content["left_out"]["pretrained"]) == {"few_shot", "linear", "logistic"}
    assert "linear is left out: it needs test images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_other_labels_have_their_own_metrics(here, kind):
    rng = np.random.default_rng(0)
    shades = rng.random((60, 3))
    pixels = (shades[:, None, None] * 200 + rng.integers(0, 40, (60, 32, 32, 3))).astype(np.uint8)
    np.save("images.npy", pixels)
    np.save("labels.npy", (shades > 0.5).astype(np.int64) if kind == "several" else shades[:, 0])
    words = ["eval_data=arrays", "eval_data.file=images.npy", "eval_data.labels=labels.npy"]
    words += ["eval_data.resize=32", "eval_data.size=32", "evaluation.baselines=null"]
    assert run("eval", "ckpt=runs/a", *words, *ALL) == 0
    values = json.loads(Path("runs/a/results-arrays.json").read_text())["results"]["pretrained"]
    assert list(values) == (["label_map"] if kind == "several" else ["r2", "mae"])
    head = "several_labels" if kind == "several" else "regression"
    assert load_head(f"runs/a/heads/{head}.pt").outputs == ("labels" if kind == "several" else kind)


def test_tasks_run_without_labelled_images(here):
    words = ["eval_data=none", "tasks=[linear_dino]"]
    assert run("eval", "ckpt=runs/a", *words, *QUICK) == 2  # it needs labels
    words = ["tasks=[linear_dino]", "evaluation.tasks.linear_dino.epochs=0.2"]
    words += ["evaluation.tasks.linear_dino.lrs=[0.1]"]
    assert run("eval", "ckpt=runs/a", *words, *QUICK) == 0
    content = json.loads(Path("runs/a/results.json").read_text())
    assert "linear_dino" in content["results"]["pretrained"]
    assert "linear_dino" in content["intervals"]["pretrained"]
    assert Path("runs/a/heads/linear_dino.pt").is_file()


def test_wrong_input_is_answered_in_a_line(here, refused):
    images(Path("two/a"), 4), images(Path("two/b"), 4)
    without_test = ["eval_data.test_fraction=0", "eval_data=folder", "eval_data.root=two"]
    for words, message in (
        (["tasks=[segmentaton]"], "segmentation"),
        (["tasks=[segmentation]"], "evaluation.tasks.segmentation.root is needed"),
        (["tasks=[segmentation]", "evaluation.tasks.segmentation.root=nowhere"], "nowhere"),
        (["ckpt=[runs/a,runs/a]"], "named twice"),
        (["evaluation=null"], "evaluation=null"),
        (["~evaluation"], "nothing to measure"),
        (["evaluation.evaluators=null"], "nothing to measure"),
        (["evaluation.evaluators.linear.lrs=-0.1"], "evaluation.evaluators.linear.lrs=-0.1 must"),
        (["tasks=[linear_dino]", *without_test], "needs test images"),
    ):
        quick = [] if words[0].startswith(("evaluation", "~")) else QUICK
        refused(message, "eval", "ckpt=runs/a", *quick, *words)
    with pytest.raises(UserError, match=r"ckpt=\[\]: name a run folder"):
        checkpoints_in([])
    with pytest.raises(UserError, match=r"out=results\.md must be a file ending in \.json"):
        out_file("results.md", [])


def test_features_that_are_not_finite_end_with_exit_code_1(here, on_few_photos, capsys):
    content = torch.load("runs/a/checkpoints/step-000006.ckpt", weights_only=True)
    content["state_dict"]["teacher.backbone.norm.weight"][0] = torch.nan
    torch.save(content, "broken.ckpt")
    assert run("eval", "ckpt=broken.ckpt", *on_few_photos, *QUICK) == 1
    error = capsys.readouterr().err
    assert "features that are not finite" in error
    assert ".png" in error
