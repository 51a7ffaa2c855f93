"""The published linear protocol against its loop written out with torch's own SGD."""

import numpy as np
import pytest
import torch

from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise, resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Subset, stratified
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.tasks.linear_augmented import AugmentedProbe, RandomCrops
from ssl_xcit.models.xcit import XCiT


@pytest.fixture
def pair(photos_pair):
    """Windows of five photographs."""
    parts = []
    for part in (photos_pair.train, photos_pair.test):
        rows = np.flatnonzero(np.isin(part.labels, (0, 3, 5, 9, 16)))
        parts.append(Subset(part, rows[::4]))
    return LabelledPair(*parts, "five photos", 64, 48)


@pytest.fixture
def backbone():
    torch.manual_seed(1)
    return XCiT(32, 2, 2, patch_size=8).eval()


def features_of(backbone, train, test):
    pair = LabelledPair(train, test, "five photos", 64, 48)
    return FeatureExtractor(backbone, num_workers=0, pair=pair)


def test_the_loop_written_out(pair, backbone):
    epochs, batch, lr, seed = 3, 16, 5.0, 0
    probe = AugmentedProbe("dino", [lr], epochs=epochs, batch_size=batch, val_fraction=0.2)
    values = dict(probe(features_of(backbone, pair.train, pair.test)))

    names, ids = np.unique(pair.train.labels, return_inverse=True)
    rows = np.flatnonzero(~stratified(ids, 0.2, seed))
    crops = RandomCrops(Subset(pair.train, rows), 48, (0.08, 1.0), seed, RGB)
    head = torch.nn.Linear(32, 5)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data.copy_(0.01 * torch.randn(5, 32, generator=generator))
    head.bias.data.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr * batch / 256, momentum=0.9, weight_decay=0)
    steps = round(epochs * len(rows) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for step in range(steps):
        drawn = [crops[i] for i in range(step * batch, (step + 1) * batch)]
        with torch.no_grad():
            features = backbone(normalise(torch.stack([crop for crop, _ in drawn]), RGB))
        classes = torch.from_numpy(ids[rows[[row for _, row in drawn]]])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), classes).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(probe.head.weight, head.weight, atol=1e-4)
    test = [resize_center_crop(decode(pair.test.read(i)), 64, 48) for i in range(len(pair.test))]
    with torch.no_grad():
        x = normalise(torch.from_numpy(np.stack(test)).permute(0, 3, 1, 2), RGB)
        logits = head(backbone(x))
    expected = 100 * (names[logits.argmax(dim=1).numpy()] == pair.test.labels).mean()
    assert values == {"dino": pytest.approx(expected), "dino_lr": lr}


def test_the_grid_of_kinds_and_rates_is_chosen_without_the_test_images(pair, backbone):
    probe = AugmentedProbe(
        "grid", [1e-3, 3.0, 30.0], kinds=["cls", "cls_patch", "last4", "last4_patch"],
        epochs=None, steps=40, batch_size=16,
    )  # fmt: skip
    values = dict(probe(features_of(backbone, pair.train, pair.test)))
    assert values["grid"] > 40
    assert values["grid_lr"] > 1e-3
    chosen = dict(probe.chosen)
    blind = Subset(pair.test, np.arange(len(pair.test)))
    blind.labels = np.random.default_rng(0).permutation(pair.test.labels)
    again = dict(probe(features_of(backbone, pair.train, blind)))
    assert probe.chosen == chosen
    assert again["grid"] < values["grid"]
    assert not backbone.training


def test_crops_are_a_function_of_seed_and_position(pair):
    one, two = (RandomCrops(pair.train, 32, (0.08, 1.0), 5, RGB) for _ in range(2))
    other = RandomCrops(pair.train, 32, (0.08, 1.0), 6, RGB)
    assert torch.equal(one[17][0], two[17][0])
    assert one[17][0].shape == (3, 32, 32)
    assert not torch.equal(one[17][0], other[17][0])
    rows = {one[i][1] for i in range(len(pair.train))}
    assert rows == set(range(len(pair.train)))


def test_without_labels_or_test_images(pair, backbone):
    probe = AugmentedProbe("dino", [0.1])
    with pytest.raises(ValueError, match="needs labelled images"):
        list(probe(FeatureExtractor(backbone)))
    with pytest.raises(ValueError, match="needs test images"):
        list(probe(features_of(backbone, pair.train, pair.train)))
