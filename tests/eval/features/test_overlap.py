"""Test images that are training images as well are counted, and said."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import EVALUATION, images, run
from tiny_run import published

from ssl_xcit.data.folders import labelled_folders
from ssl_xcit.data.sets import Arrays
from ssl_xcit.data.sources import Files, LabelledPair
from ssl_xcit.eval.features.extract import FeatureSet
from ssl_xcit.eval.features.overlap import count_copies, count_near_duplicates, warn_if_perfect


@pytest.fixture
def classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for name, count in (("a", 4), ("b", 5)):
            images(tmp_path / part / name, count, (40 + len(part), 40))
    return tmp_path


def said(caplog):
    return [r.getMessage() for r in caplog.records]


def test_copies_are_counted_by_content_and_not_by_name(classes, caplog):
    pair = labelled_folders("train", "test")
    assert count_copies(pair, None) == 0
    assert not said(caplog)
    for copy in ("test/a/x.png", "test/b/y.png"):
        Path(copy).write_bytes(Path("train/a/2.png").read_bytes())
    assert count_copies(labelled_folders("train", "test"), classes / "cache") == 2
    assert count_copies(labelled_folders("train", "test"), classes / "cache") == 2  # kept or not
    assert "2 of 11 test images are also training images, by content" in said(caplog)[0]
    assert "(such as test/a/x.png)" in said(caplog)[0]
    assert "may be 18 points of their accuracy" in said(caplog)[0]


def test_copies_within_one_set(classes, caplog):
    pair = labelled_folders("train", test_fraction=0)
    assert count_copies(pair, None) == 0
    Path("train/b/z.png").write_bytes(Path("train/a/2.png").read_bytes())
    assert count_copies(labelled_folders("train", test_fraction=0), None) == 2
    assert "2 of 10 images are there more than once" in said(caplog)[0]


def test_a_few_copies_are_mentioned_and_no_warning(photos_pair, caplog, capsys):
    """Windows of one photograph's black corners."""
    assert count_copies(photos_pair, None) == 3
    assert not said(caplog)
    assert "3 of 702 test images are also training images" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_no_copies():
    labels = np.array([0, 1])
    broken = [Files([f"{name}1.png", f"{name}2.png"], "", labels) for name in "ab"]
    assert count_copies(LabelledPair(*broken, "x", 8, 8), None) == 0


def test_arrays_are_compared_too():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
    labels = np.arange(6) % 2
    train, test = Arrays(pixels[:4], "train", labels[:4]), Arrays(pixels[3:], "test", labels[3:])
    assert count_copies(LabelledPair(train, test, "x", 8, 8), None) == 1


def test_near_copies_by_a_loop_over_cosines():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(50, 8)).astype(np.float32)
    test = np.concatenate((train[:5] * 3 + 0.01, rng.normal(size=(20, 8)))).astype(np.float32)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (train, test)]
    for threshold in (0.5, 0.8, 0.98):
        expected = sum(max(float(t @ other) for other in unit[0]) > threshold for t in unit[1])
        features = FeatureSet(train, np.zeros(50, int), test, np.zeros(25, int))
        assert count_near_duplicates(features, threshold) == expected
    assert expected == 5
    twice = np.concatenate((train, train[:3]))
    one = FeatureSet(twice, np.zeros(53, int), twice, np.zeros(53, int))
    assert count_near_duplicates(one, 0.99) == 6  # and not each with itself


def test_a_perfect_k_nn_gets_a_remark(caplog):
    warn_if_perfect(99.9, "pretrained")
    assert not said(caplog)
    warn_if_perfect(100.0, "pretrained")
    assert "pretrained: k-NN of 100 %: are test images near copies" in said(caplog)[0]


def test_the_command_says_it_and_writes_it_down(classes, capsys):
    published(Path("x.pth"))
    words = ["eval_data.root=train", "eval_data.test_root=train", "num_workers=0"]
    words += ["eval_data.resize=32", "eval_data.size=32", "evaluation.near_duplicates=0.98"]
    assert run("eval", "ckpt=x.pth", *words, *EVALUATION, "evaluation.baselines=null") == 0
    out, err = capsys.readouterr()
    assert "9 of 9 test images are also training images, by content" in err
    assert "9 of 9 test images have a cosine above 0.98" in out
    content = json.loads(Path("results-folder.json").read_text())
    assert content["test_images_in_train"] == 9
    assert content["near_duplicates_pretrained"] == 9
