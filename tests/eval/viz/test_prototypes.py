"""Shares of prototypes against the formula in float64, and as `visualize` shows them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import images, run
from omegaconf import OmegaConf
from scipy.special import erf, log_softmax
from scipy.stats import entropy
from tiny_run import PLAN, K

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import UserError
from ssl_xcit.eval.viz import prototypes
from ssl_xcit.models.weights import load_backbone

QUICK = ["num_workers=0", "cache=false"]
OWN = ["eval_data=folder", "eval_data.root=own", "eval_data.resize=48", "eval_data.size=48"]


def textbook(file, features, temperature):
    """softmax((logits - center) / temperature) from the tensors of a checkpoint, in float64."""
    state = torch.load(file, weights_only=True)["state_dict"]
    state = {k: v.double().numpy() for k, v in state.items()}
    x = features.astype(np.float64)
    for layer in (0, 2, 4):
        name = f"teacher.head.mlp.{layer}"
        x = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        if layer < 4:
            x = x * (1 + erf(x / math.sqrt(2))) / 2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    directions = state["teacher.head.last_layer.weight_v"]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    logits = x @ (directions * state["teacher.head.last_layer.weight_g"]).T
    return np.exp(log_softmax((logits - state["objective.center.center"]) / temperature, axis=1))


@pytest.mark.parametrize("chunk", [1 << 24, 7 * K])
def test_shares_are_those_of_the_formula(tiny, monkeypatch, chunk):
    monkeypatch.setattr(prototypes, "CHUNK", chunk)
    file = tiny / "run" / "checkpoints" / "step-000006.ckpt"
    features = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    teacher = prototypes.load_teacher(file, "teacher", 0.05)
    found = prototypes.prototype_shares(teacher, features, 5)
    expected = textbook(file, features, 0.05)
    mass = expected.mean(axis=0)
    assert np.allclose(found.mass, mass, atol=1e-5)
    assert found.mass.sum().item() == pytest.approx(1.0)
    assert found.firsts.tolist() == np.bincount(expected.argmax(1), minlength=K).tolist()
    assert found.used() == len(np.unique(expected.argmax(1)))
    assert found.effective() == pytest.approx(math.exp(entropy(mass)), rel=1e-3)
    assert 1.5 < found.effective() < K - 1
    assert np.allclose(found.top, np.sort(expected, axis=0)[::-1][:5].T, atol=1e-5)
    rows = np.take_along_axis(expected, found.images.numpy().T, axis=0).T
    assert np.allclose(found.top, rows, atol=1e-5)
    assert prototypes.prototype_shares(teacher, features[:2], 5).images.shape == (K, 2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.02), (1, 0.02), (2, 0.02), (3, 0.04), (4, 0.04), (5, 0.06), (9, 0.06)],
)
def test_the_temperature_is_that_of_the_last_step(tmp_path, step, expected):
    """Two steps an epoch, three epochs of 0.02, 0.04, 0.06."""
    (tmp_path / "run.json").write_text(json.dumps({"plan": PLAN}))
    assert prototypes.temperature_of(tmp_path / "last.ckpt", step) == pytest.approx(expected)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": {"teacher_temp": "hot"}}'])
def test_without_a_temperature_it_is_asked_for(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"teacher_temp=0\.04"):
        prototypes.temperature_of(tmp_path / "last.ckpt", 1)


@pytest.fixture
def own(here):
    images(Path("own/a"), 5)
    images(Path("own/b"), 4)


def results(folder="run/visualize"):
    return json.loads(Path(folder, "visualize.json").read_text())["results"]


def test_each_is_shown_by_its_images(own, capsys):
    words = ["kinds=prototypes", *OWN, "eval_data.test_fraction=0", "columns=3"]
    assert run("visualize", "ckpt=run", *words, "num_prototypes=4", *QUICK) == 0
    found = results()["run"]["prototypes"]
    files = sorted(str(f) for f in Path("own").rglob("*.png"))
    pixels = np.stack([read_image(file).transpose(2, 0, 1) for file in files])
    with torch.no_grad():
        features = load_backbone("run")(normalise(torch.from_numpy(pixels), RGB)).numpy()
    expected = textbook("run/checkpoints/step-000006.ckpt", features, 0.06)
    mass = expected.mean(axis=0)
    assert found["temperature"] == 0.06
    assert found["effective"] == pytest.approx(math.exp(entropy(mass)), rel=1e-3)
    assert len(found["largest"]) == 4
    shares = [p["share"] for p in found["largest"]]
    assert shares == pytest.approx(np.sort(mass)[::-1][:4], abs=1e-5)
    for told in found["largest"]:
        column = expected[:, told["prototype"]]
        assert told["first_of"] == (expected.argmax(1) == told["prototype"]).sum()
        probabilities = [i["probability"] for i in told["images"]]
        assert probabilities == pytest.approx(np.sort(column)[::-1][:3], abs=1e-5)
        places = [files.index(i["image"]) for i in told["images"]]
        assert probabilities == pytest.approx(column[places], abs=1e-5)
        for image in told["images"]:
            assert image["class"] == Path(image["image"]).parent.name
    said = f"{found['used']} of 24 prototypes are the first choice of some of 9 images"
    assert said in capsys.readouterr().out
    assert said in Path("run/visualize/index.html").read_text()
    assert Path("run/visualize/prototypes/grid.png").is_file()


def test_a_checkpoint_without_a_head(own, capsys, refused):
    words = ["visualize", "ckpt=net.pth", *OWN, *QUICK]
    said = "net.pth has no head with prototypes; attention, pca, channels and neighbours"
    refused(said, *words, "kinds=[prototypes]")
    assert not Path("visualize").exists()
    assert run(*words, "kinds=[neighbours,prototypes]") == 0
    assert "has no head with prototypes" in capsys.readouterr().err
    assert list(results("visualize")["net"]) == ["neighbours"]
    assert run("visualize", "kinds=[prototypes,pca]", "ckpt=net.pth", "images=own") == 0
    assert list(results("visualize")["net"]) == ["pca"]  # and no data set was needed
    assert run(*words, "kinds=[neighbours,prototypes]", "ckpt=[run,net.pth]") == 0
    both = results()
    assert list(both["run"]) == ["neighbours", "prototypes"]
    assert list(both["net"]) == ["neighbours"]


def test_what_else_is_missing(own, refused):
    Path("run/run.json").unlink()
    words = ["visualize", "ckpt=run", "kinds=[prototypes]", *OWN, *QUICK]
    refused("teacher_temp=0.04", *words)
    assert run(*words, "teacher_temp=0.1") == 0
    assert results()["run"]["prototypes"]["temperature"] == 0.1
    refused("which=student has no center", *words, "teacher_temp=0.1", "which=student")


def test_a_term_of_a_sum_has_the_prototypes(tiny, tmp_path):
    """Of the class tokens, with the temperature of that term's plan."""
    file = tiny / "run" / "checkpoints" / "step-000006.ckpt"
    content = torch.load(file, weights_only=True)
    names = {
        "teacher.head.": "teacher.head.dino.",
        "objective.center.": "objective.terms.dino.center.",
    }
    state = {}
    for key, value in content["state_dict"].items():
        start = next((old for old in names if key.startswith(old)), None)
        state[key if start is None else key.replace(start, names[start])] = value
        if key.startswith("teacher.head."):
            masked = "teacher.head.ibot.projection."
            state[key.replace("teacher.head.", masked)] = torch.zeros_like(value)
            state[key.replace("teacher.head.", "teacher.head.of-patches.")] = value
    state = dict(sorted(state.items(), reverse=True))  # that term comes first
    summed = tmp_path / "checkpoints" / file.name
    summed.parent.mkdir()
    torch.save({**content, "state_dict": state}, summed)
    about = json.loads((tiny / "run" / "run.json").read_text())
    plan = about["plan"]
    moved = {k: plan.pop(k) for k in list(plan) if k.startswith("teacher_temp")}
    about["plan"] = {**plan, "dino": moved}
    (tmp_path / "run.json").write_text(json.dumps(about))
    region = {"_target_": "ssl_xcit.objectives.esvit.Region"}
    OmegaConf.save({"objective": {"terms": {"of-patches": region}}}, tmp_path / "config.yaml")
    alone, term = (prototypes.load_teacher(path, "teacher", None) for path in (file, summed))
    assert term.temperature == alone.temperature
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(term.probabilities(features), alone.probabilities(features))
