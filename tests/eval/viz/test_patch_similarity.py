"""Features for the page: their products are cosines, and the file is a script that says so."""

import base64
import json

import numpy as np
import pytest
import torch

from ssl_xcit.eval.viz.patch_similarity import packed_features, similarity_script, write_features


def features(h, w, dim, rank, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(h * w, rank, generator=generator) @ torch.randn(
        rank, dim, generator=generator
    )
    low += noise * torch.randn(h * w, dim, generator=generator)
    return low.mT.unflatten(1, (h, w))


def cosines(patches):
    rows = patches.flatten(1).mT.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


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
def test_products_are_cosines(patches, most, error):
    rows = packed_features(patches)
    assert rows.dtype == np.int8
    assert rows.shape[:2] == patches.shape[1:]
    assert rows.shape[2] <= most
    flat = rows.reshape(-1, rows.shape[2]).astype(np.float64) / 127
    assert np.abs(flat @ flat.T - cosines(patches)).max() < error


def test_a_patch_without_a_feature_is_like_none():
    patches = features(4, 4, 8, 8)
    patches[:, 1, 2] = 0.0
    rows = packed_features(patches)
    assert not rows[1, 2].any()
    assert rows.any(axis=-1).sum() == 15


def test_the_file_is_a_script(tmp_path):
    patches = features(3, 4, 16, 5)
    write_features(patches, tmp_path / "f.js")
    text = (tmp_path / "f.js").read_text()
    assert text.startswith("comparePatches(")
    content = json.loads(text.strip().removeprefix("comparePatches(").removesuffix(")"))
    found = np.frombuffer(base64.b64decode(content["rows"]), np.int8).reshape(content["sides"])
    assert np.array_equal(found, packed_features(patches))


def test_the_page_s_script_has_the_colours():
    text = similarity_script(0.65)
    settings = json.loads(text.partition("const SIMILAR = ")[2].partition("\n")[0])
    assert len(settings["colours"]) == 768
    assert settings["strength"] == 0.65
