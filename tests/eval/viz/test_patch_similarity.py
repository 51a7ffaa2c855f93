"""Features for the page: their products are cosines, and the file is a script that says so."""

import base64
import json

import numpy as np
import pytest
import torch

from ssl_xcit.eval.viz.patch_similarity import packed_features, write_features


def features(h, w, dim, rank, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    left, right, other = (
        torch.randn(shape, generator=generator)
        for shape in ((h * w, rank), (rank, dim), (h * w, dim))
    )
    return (left @ right + noise * other).mT.unflatten(1, (h, w))


@pytest.mark.parametrize(
    ("patches", "most", "error"),
    [
        (features(6, 9, 64, 12), 12, 0.02),
        (features(20, 30, 384, 200), 96, 0.15),
        (features(5, 5, 16, 16, noise=1.0), 16, 0.03),
        (features(1, 1, 8, 2), 1, 0.02),
    ],
    ids=["few directions", "many", "full rank", "one patch"],
)
def test_products_are_cosines(patches, most, error, tmp_path):
    write_features(patches, tmp_path / "f.js")
    text = (tmp_path / "f.js").read_text()
    content = json.loads(text.strip().removeprefix("comparePatches(").removesuffix(")"))
    rows = np.frombuffer(base64.b64decode(content["rows"]), np.int8).reshape(content["sides"])
    assert rows.shape[:2] == patches.shape[1:]
    assert rows.shape[2] <= most
    flat = rows.reshape(-1, rows.shape[2]).astype(np.float64) / 127
    wanted = patches.flatten(1).mT.double().numpy()
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.abs(flat @ flat.T - wanted @ wanted.T).max() < error


def test_a_patch_without_a_feature_is_like_none():
    patches = features(4, 4, 8, 8)
    patches[:, 1, 2] = 0.0
    rows = packed_features(patches)
    assert not rows[1, 2].any()
    assert rows.any(axis=-1).sum() == 15
