"""Features, baselines and the whole evaluation of a backbone."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import images

from ssl_xcit.data.crop_dataset import check_labelled
from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise, resize_center_crop
from ssl_xcit.data.sources import Files, LabelledPair, Subset
from ssl_xcit.eval.evaluators.baselines import colour_histogram, histogram, random_weights
from ssl_xcit.eval.evaluators.knn import KNN
from ssl_xcit.eval.features.cache import extract_pair
from ssl_xcit.eval.features.extract import extract
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.runner import evaluate
from ssl_xcit.models.xcit import XCiT


@pytest.fixture
def pair(photos_pair):
    parts = (photos_pair.train, photos_pair.test)
    few = [Subset(part, np.arange(0, len(part), 30)) for part in parts]
    return LabelledPair(*few, "a few photos", 64, 48)


@pytest.fixture
def backbone():
    torch.manual_seed(1)
    return XCiT(32, 1, 2, patch_size=8)


def test_features_are_the_backbones_in_eval_mode(pair, backbone):
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    state = torch.get_rng_state()
    extractor = FeatureExtractor(backbone, batch_size=7, num_workers=0)
    found, rows = extract(extractor, pair.test, 64, 48)
    features = found["cls"]
    assert rows.tolist() == list(range(len(pair.test)))
    assert torch.equal(state, torch.get_rng_state())
    assert backbone.training
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    pixels = [resize_center_crop(decode(pair.test.read(i)), 64, 48) for i in range(len(pair.test))]
    images = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), RGB)
    with torch.no_grad():
        expected = backbone.eval()(images)
    assert np.allclose(features, expected.numpy(), atol=1e-4)


def test_random_weights_are_fresh_and_repeatable(pair, backbone):
    extractor = FeatureExtractor(backbone, num_workers=0, pair=pair)
    one, two = (random_weights(extractor) for _ in range(2))
    assert np.array_equal(one.train, two.train)
    own = extract_pair(extractor)
    assert not np.allclose(one.train, own.train)


def test_histogram_counts_colours():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = (255, 255, 255)
    image[0, 1] = (0, 0, 64)
    cells = histogram(image, 8)
    assert cells.sum() == pytest.approx(1.0)
    assert cells[511] == cells[2] == 0.25
    assert cells[0] == 0.5


def test_evaluate_gives_a_row_each(pair, backbone):
    results = evaluate(
        backbone,
        pair,
        {"knn": KNN([5]), "linear": None},
        {"random_weights": random_weights, "colour_histogram": None},
        num_workers=0,
    ).results
    assert list(results) == ["random weights", "pretrained"]
    assert 0 <= results["pretrained"]["knn_k5"] <= 100


def test_labels_are_required_and_unknown_classes_named(pair, caplog):
    train = Subset(pair.train, np.flatnonzero(pair.train.labels != 3))
    with caplog.at_level(logging.WARNING):
        check_labelled(LabelledPair(train, pair.test, "p", 64, 48), RGB)
    assert "1 classes without training images (cell)" in caplog.text
    train.labels = None
    with pytest.raises(ValueError, match="no labels"):
        check_labelled(LabelledPair(train, pair.test, "p", 64, 48), RGB)
    one = Subset(pair.train, np.flatnonzero(pair.train.labels == 3))
    with pytest.raises(ValueError, match="one class only"):
        check_labelled(LabelledPair(one, pair.test, "p", 64, 48), RGB)
    none = Subset(pair.train, np.arange(0))
    with pytest.raises(ValueError, match="no test images are left"):
        check_labelled(LabelledPair(pair.train, none, "p", 64, 48), RGB)


def test_colour_histograms_are_made_once(backbone, tmp_path, monkeypatch):
    images(tmp_path, 6, (16, 16))
    source = Files([str(tmp_path / f"{i}.png") for i in range(6)], "", np.arange(6) % 2, ["a", "b"])
    pair = LabelledPair(source, source, "six", 16, 16)
    extractor = FeatureExtractor(backbone, num_workers=0, pair=pair, cache=tmp_path / "cache")
    first, other = colour_histogram(extractor), colour_histogram(extractor, bins=4)
    assert other.train.shape == (6, 64)
    assert np.array_equal(first.train, colour_histogram(replace(extractor, cache=None)).train)
    monkeypatch.setattr("ssl_xcit.eval.evaluators.baselines.decode", None)
    assert np.array_equal(first.train, colour_histogram(extractor).train)
    rooted = colour_histogram(extractor, square_root=True).train
    assert np.allclose(rooted**2, first.train)


def test_a_bad_image_is_left_out_with_its_label(backbone, tmp_path):
    images(tmp_path, 6, (16, 16))
    (tmp_path / "2.png").write_bytes(b"<html>")
    files = [str(tmp_path / f"{i}.png") for i in range(6)]
    source = Files(files, "", np.array([0, 0, 1, 1, 2, 2]), ["a", "b", "c"])
    pair = LabelledPair(source, source, "one bad", 16, 16)
    extractor = FeatureExtractor(backbone, num_workers=0, pair=pair)
    for features in (extract_pair(extractor), colour_histogram(extractor)):
        assert features.train_labels.tolist() == [0, 0, 1, 2, 2]
        assert len(features.train) == len(features.test) == 5
