"""Copies of the photographs find their originals, beside a reference written out."""

import logging
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.decomposition import PCA

from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.eval.tasks.copy_detection import (
    CopyDetection,
    as_square,
    generalised_mean,
    token_and_patches,
    whitening,
)
from ssl_xcit.eval.tasks.ranking import image_vectors

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    home = tmp_path_factory.mktemp("copydays")
    for folder in ("original", "strong", "crops/50", "jpegqual/5", "others"):
        (home / folder).mkdir(parents=True)
    for n, (_, file) in enumerate(photographs()):
        image = Image.open(file).convert("RGB").resize((80, 60))
        number = 200_000 + 100 * n
        if n >= 10:
            for part in range(7):
                tile = image.crop((8 * part, 4 * part, 8 * part + 24, 4 * part + 24))
                tile.save(home / "others" / f"tile_{n}_{part}.png")
            continue
        image.save(home / "original" / f"{number}.jpg", quality=95)
        image.crop((10, 10, 70, 50)).save(home / "crops/50" / f"{number}.jpg", quality=95)
        image.save(home / "jpegqual/5" / f"{number}.jpg", quality=5)
        turned = ImageEnhance.Contrast(image.rotate(25)).enhance(0.4)
        for c, (copied, quality) in enumerate(((image.crop((20, 15, 80, 60)), 20), (turned, 8))):
            copied.save(home / "strong" / f"{number + c + 1}.jpg", quality=quality)
    return home


def by_pillow(backbone, files, pooled=True):
    """Vectors as DINO's script makes them, one image at a time."""
    rows = []
    for file in files:
        image = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        values = (np.asarray(image) / 255.0 - RGB.mean) / RGB.std
        pixels = torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32))
        with torch.no_grad():
            cls, patches = backbone.eval().forward_features(pixels)
        gem = np.mean(np.maximum(patches.numpy(), 1e-6) ** 4, axis=(2, 3)) ** 0.25
        rows.append(np.concatenate((cls.numpy(), gem), axis=1)[0] if pooled else cls.numpy()[0])
    return np.stack(rows)


def holidays_map(queries, bank, right):
    """One original a copy: the trapezoid of its place."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, bank)]
    values = []
    for row, target in zip(unit[0] @ unit[1].T, right, strict=True):
        rank = list(np.argsort(-row)).index(target)
        values.append(1.0 if rank == 0 else (0 + 1 / (rank + 1)) / 2)
    return 100 * np.mean(values), values


@pytest.mark.parametrize(
    ("subset", "options"),
    [("strong", {}), ("strong", {"gem": None}), ("crops", {}), ("jpegqual/5", {})],
)
def test_numbers_are_the_references(root, backbone, extractor, subset, options):
    originals = sorted((root / "original").iterdir())
    copies = sorted((root / subset).rglob("*.jpg"))
    numbers = [file.stem[:4] for file in originals]
    right = [numbers.index(file.stem[:4]) for file in copies]
    others = sorted((root / "others").iterdir())
    bank = [*originals, *others]
    vectors = [by_pillow(backbone, files, not options) for files in (copies, bank)]
    expected, each = holidays_map(*vectors, right)
    task = CopyDetection(root, subset, SIZE, distractors=root / "others", **options)
    ((name, found),) = task(extractor)
    assert name == "copy_map"
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.items.sum(axis=0) == pytest.approx([sum(each), len(each)])  # by original
    assert len(found.items) == len(set(right))
    low, high = found.interval
    assert low <= found <= high


def test_whitened_numbers_are_the_references(root, extractor, monkeypatch):
    # three queries at once
    monkeypatch.setattr("ssl_xcit.eval.tasks.copy_detection.SIMILARITIES", 33)
    originals, copies = (sorted((root / f).iterdir()) for f in ("original", "strong"))
    right = [i // 2 for i in range(len(copies))]
    look = partial(as_square, size=SIZE), partial(token_and_patches, gem=None)
    rows, queries, bank = (  # the very same vectors: whitening makes their last bits matter
        image_vectors(extractor, files, *look, "").astype(np.float64)
        for files in (sorted((root / "others").iterdir()), copies, originals)
    )
    pca = PCA(whiten=True, svd_solver="full").fit(rows)
    kept = pca.explained_variance_ > 1e-5 * pca.explained_variance_[0]
    expected, _ = holidays_map(pca.transform(queries)[:, kept], pca.transform(bank)[:, kept], right)
    task = CopyDetection(root, size=SIZE, gem=None, whiten_root=root / "others")
    found = dict(task(extractor))["copy_map"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != dict(CopyDetection(root, size=SIZE, gem=None)(extractor))["copy_map"]


def test_whitening_leaves_out_what_does_not_vary():
    generator = np.random.default_rng(0)
    rows = np.repeat(generator.normal(size=(5, 3)), 4, axis=1).astype(np.float32)  # rank 3 of 12
    whiten = whitening(rows)
    assert whiten.axes.shape == (12, 3)
    assert np.cov(whiten(rows).T) == pytest.approx(np.eye(3), abs=1e-4)
    assert np.abs(whiten(rows + np.tile([1e-3, -1e-3, 0, 0], 3).astype(np.float32))).max() < 10
    for same in (rows[:1], np.repeat(rows[:1], 5, axis=0)):
        with pytest.raises(UserError, match="all the same"):
            whitening(same)


def test_the_generalised_mean_lies_between_mean_and_maximum():
    patches = torch.rand(2, 3, 4, 5)
    assert torch.allclose(generalised_mean(patches, 1.0), patches.mean((2, 3)), atol=1e-5)
    assert torch.allclose(generalised_mean(patches, 200.0), patches.amax((2, 3)), rtol=0.05)
    assert (generalised_mean(-patches, 4.0) <= 2e-6).all()


def test_other_channels_are_squared_plane_by_plane():
    grey = np.asarray(Image.open(dict(photographs())["camera"]).convert("L"))[:60, :80]
    expected = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC))
    found = as_square(np.stack([grey, 255 - grey], axis=-1), 0, 16)
    assert np.array_equal(found[..., 0], expected)
    assert found.shape == (16, 16, 2)


def copied(root, home):
    for folder in ("original", "strong"):
        shutil.copytree(root / folder, home / folder)
    return home


def test_bad_distractors_are_left_out_and_other_bad_images_named(root, tmp_path, extractor, caplog):
    home = copied(root, tmp_path)
    (home / "more").mkdir()
    (home / "more" / "cut.jpg").write_bytes((home / "original" / "200000.jpg").read_bytes()[:400])
    (home / "more" / "good.png").write_bytes((root / "others" / "tile_10_0.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        with_bad = dict(CopyDetection(home, size=SIZE, distractors=home / "more")(extractor))
    assert "cut.jpg" in caplog.text
    (home / "more" / "cut.jpg").unlink()
    assert with_bad == dict(CopyDetection(home, size=SIZE, distractors=home / "more")(extractor))
    (home / "more" / "good.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 images can be read, such as .*good\.png"):
        list(CopyDetection(home, size=SIZE, distractors=home / "more")(extractor))
    (home / "strong" / "200101.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"200101\.jpg: empty file"):
        list(CopyDetection(home, size=SIZE)(extractor))


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(MissingPath, match="original"):
        CopyDetection(tmp_path)
    home = copied(root, tmp_path)
    with pytest.raises(MissingPath, match="jpegqual"):
        CopyDetection(home, "jpegqual")
    with pytest.raises(MissingPath, match="nowhere"):
        CopyDetection(home, distractors=home / "nowhere")
    (home / "original" / "200100.jpg").unlink()
    with pytest.raises(UserError, match=r"200101\.jpg: none of 9 files .* original, 200100"):
        CopyDetection(home)
    (home / "strong" / "cat.jpg").write_bytes(b"")
    (home / "original" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat\.jpg: the name must be a number"):
        CopyDetection(home)
