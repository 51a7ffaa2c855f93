"""Components against scikit-learn's PCA, the threshold against scikit-image's, similarity against
scikit-learn's.
"""

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from ssl_xcit.eval.viz import patches

GRIDS = [(5, 7), (3, 4), (9, 2)]


@pytest.fixture
def images():
    """Correlated features far from zero, of images of different sizes."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12)) * np.geomspace(3, 0.1, 12)[:, None]
    return [
        (rng.normal(size=(h * w, 12)) @ mixing + 20).astype(np.float32).reshape(h, w, 12)
        for h, w in GRIDS
    ]


@pytest.fixture
def store(images, tmp_path):
    with (tmp_path / "features").open("w+b") as file:
        store = patches.PatchStore(file, 12)
        for image in images:
            store.add(torch.from_numpy(image).permute(2, 0, 1))
        yield store


@pytest.fixture
def rows(images):
    return np.concatenate([image.reshape(-1, 12) for image in images]).astype(np.float64)


def test_components_are_those_of_all_images_together(store, rows):
    components = store.moments.components()
    reference = PCA(n_components=3).fit(rows)
    signs = np.sign(reference.components_[np.arange(3), abs(reference.components_).argmax(1)])
    assert np.allclose(components.axes, reference.components_ * signs[:, None], atol=1e-7)
    assert np.allclose(components.explained, reference.explained_variance_ratio_)
    scores = torch.cat(list(store.scores(components))).numpy()
    assert np.allclose(scores, reference.transform(rows) * signs, atol=1e-5)


def test_maps_lie_where_the_patches_were(store, rows):
    maps = store.maps(None)
    assert [tuple(c.shape) for c in maps.colours] == [(*grid, 3) for grid in GRIDS]
    scores = PCA(n_components=3).fit_transform(rows)
    low, high = np.quantile(scores, (0.01, 0.99), axis=0)
    expected = ((scores - low) / (high - low)).clip(0, 1)
    colours = np.concatenate([c.numpy().reshape(-1, 3) for c in maps.colours])
    for one, other in zip(colours.T, expected.T, strict=True):  # a component's sign is free
        assert np.allclose(one, other, atol=1e-5) or np.allclose(one, 1 - other, atol=1e-5)
    kept = np.concatenate([k.numpy().ravel() for k in maps.foreground])
    cut = threshold_otsu(scores[:, 0])
    above = scores[:, 0] > cut
    # a bin is as wide as the range over 256: values in the one that is cut may go either way
    sure = abs(scores[:, 0] - cut) > np.ptp(scores[:, 0]) / 128
    assert np.array_equal(kept[sure], above[sure]) or np.array_equal(kept[sure], ~above[sure])


def test_otsu_parts_two_heaps_and_no_equal_values():
    two = torch.tensor([0.0] * 5 + [1.0] * 3, dtype=torch.float64)
    assert 0.0 < patches.otsu(two) < 1.0
    assert patches.otsu(torch.full((9,), 2.5, dtype=torch.float64)) == 2.5


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_foreground_is_what_keeps_from_the_border(sign, threshold):
    first = torch.full((8, 8), -1.0, dtype=torch.float64)
    first[2:6, 3:6] = 4.0
    first += 0.01 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    border = patches.border_of((8, 8))
    assert border.sum() == 28
    turned, least = patches.oriented(sign * first.flatten(), border.flatten(), threshold)
    found = (turned * sign * first > least).numpy()
    expected = np.zeros((8, 8), bool)
    expected[2:6, 3:6] = True
    assert np.array_equal(found, expected)


def test_similarity(images):
    features = torch.from_numpy(images[0] - 20).permute(2, 0, 1)
    found = patches.similarity(features, (3, 2)).numpy()
    rows = features.flatten(1).T.numpy().astype(np.float64)
    expected = cosine_similarity(rows, rows[3 * 7 + 2 : 3 * 7 + 3]).reshape(5, 7)
    assert np.allclose(found, expected, atol=1e-6)
    assert found[3, 2] == pytest.approx(1.0)


def test_the_frame_is_around_the_patch():
    features = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(0))
    picture = np.full((64, 96, 3), 90, np.uint8)
    drawn = patches.similarity_picture(picture, features, (1, 4), 0.0).picture
    changed = np.argwhere((drawn != 90).any(-1))
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert 16 - 8 <= top < 16 < 32 <= bottom < 32 + 8
    assert 64 - 8 <= left < 64 < 80 <= right < 80 + 8
    assert (drawn[17:31, 65:79] == 90).all()  # the patch itself can be seen


@pytest.mark.parametrize(
    ("patch", "place"),
    [
        ([0.0, 0.0], (0, 0)),
        ([1.0, 1.0], (4, 6)),
        ([0.5, 0.5], (2, 3)),
        ([0, 0], (0, 0)),
        ([1, 1], (0, 0)),  # whole numbers are pixels
        ([99, 139], (4, 6)),
        ([20, 19], (1, 0)),
        ([100, 0], None),
        ([0, 140], None),
    ],
)
def test_places(patch, place):
    assert patches.place_of(patch, (100, 140), (5, 7)) == place
