"""Landmark retrieval beside the published loop."""

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.errors import MissingPath, RunFailed, UserError
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.tasks.landmark_retrieval import (
    PlainUnpickler,
    Retrieval,
    class_token,
    precision_at,
    read_ground_truth,
)
from ssl_xcit.eval.tasks.ranking import average_precision, positions
from ssl_xcit.models.xcit import XCiT

PHOTOS = ("astronaut", "chelsea", "coffee", "china", "flower", "retina")
SIZE = 64


def published_map(ranks, gnd, kappas):
    """`compute_map` of the benchmark's paper, with its `compute_ap`, loop by loop."""
    aps, precisions = [], []
    for i, truth in enumerate(gnd):
        if not len(truth["ok"]):
            continue
        pos = [p for p, image in enumerate(ranks[:, i]) if image in truth["ok"]]
        junk = [p for p, image in enumerate(ranks[:, i]) if image in truth["junk"]]
        pos = [p - sum(q < p for q in junk) for p in pos]
        ap = 0.0
        for j, rank in enumerate(pos):
            before = 1.0 if rank == 0 else j / rank
            ap += (before + (j + 1) / (rank + 1)) / len(truth["ok"]) / 2
        aps.append(ap)
        ends = [min(max(pos) + 1, k) for k in kappas]
        precisions.append([sum(p + 1 <= end for p in pos) / end for end in ends])
    return 100 * np.mean(aps), 100 * np.mean(precisions, axis=0), aps


def ground_truth():
    """Six landmarks: three views of each to find; the first has no hard ones."""
    gnd = [
        {
            "bbx": [20.4, 10.0, 120.0, 85.0],
            "easy": np.array([3 * n]),
            "hard": [3 * n + 1, np.int64(3 * n + 2)] if n else [],
            "junk": [(3 * n + 5) % 18, (3 * n + 9) % 18],
        }
        for n in range(len(PHOTOS))
    ]
    images = [f"{name}_{view}" for name in PHOTOS for view in range(3)]
    return {"imlist": images, "qimlist": list(PHOTOS), "gnd": gnd}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    home = tmp_path_factory.mktemp("roxford5k")
    (home / "jpg").mkdir()
    files = dict(photographs())
    for name in PHOTOS:
        whole = Image.open(files[name]).convert("RGB").resize((160, 120))
        turned = whole.rotate(90, expand=True)
        views = [whole.crop((0, 0, 140, 105)), whole.crop((40, 30, 160, 120)), turned]
        whole.save(home / "jpg" / f"{name}.jpg", quality=90)
        for v, view in enumerate(views):
            view.save(home / "jpg" / f"{name}_{v}.jpg", quality=90)
    (home / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(ground_truth()))
    return home


def by_pillow(root, name, box=None):
    """As the benchmark's authors read an image, with Pillow only."""
    image = Image.open(root / "jpg" / f"{name}.jpg")
    size = SIZE / max(image.size)
    if box is not None:
        image = image.crop(box)
    image.thumbnail([round(size * max(image.size))] * 2, Image.Resampling.LANCZOS)
    values = (np.asarray(image) / 255.0 - RGB.mean) / RGB.std
    return torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32))


def reference(root, backbone, describe, crop=True):
    content = ground_truth()
    with torch.no_grad():
        backbone.eval()
        bank = torch.cat([describe(by_pillow(root, name)) for name in content["imlist"]])
        queries = torch.cat([
            describe(by_pillow(root, name, truth["bbx"] if crop else None))
            for name, truth in zip(content["qimlist"], content["gnd"], strict=True)
        ])  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(bank[:, None], queries[None], dim=-1)
    ranks = np.argsort(-cosine.numpy(), axis=0)
    easy, hard, junk = ([list(g[k]) for g in content["gnd"]] for k in ("easy", "hard", "junk"))
    each = list(zip(easy, hard, junk, strict=True))
    found = {
        "easy": [{"ok": e, "junk": j + h} for e, h, j in each],
        "medium": [{"ok": e + h, "junk": j} for e, h, j in each],
        "hard": [{"ok": h, "junk": j + e} for e, h, j in each],
    }
    return {setting: published_map(ranks, gnd, (1, 5, 10)) for setting, gnd in found.items()}


@pytest.mark.parametrize("crop", [True, False])
def test_numbers_are_those_of_the_published_loop(root, backbone, extractor, crop):
    backbone.train()
    found = dict(Retrieval(root, size=SIZE, crop_queries=crop)(extractor))
    assert backbone.training
    expected = reference(root, backbone, backbone, crop)
    for setting, (value, _, aps) in expected.items():
        assert found[f"roxford_{setting}"] == pytest.approx(value, abs=1e-6)
        items = found[f"roxford_{setting}"].items  # by landmark
        assert items.sum(axis=0) == pytest.approx([sum(aps), len(aps)])
    for k, precision in zip((1, 5, 10), expected["medium"][1], strict=True):
        assert found[f"roxford_medium_precision_at_{k}"] == pytest.approx(precision)
        assert found[f"roxford_hard_precision_at_{k}"] <= 100
    assert found["roxford_hard"].items[:, 1].sum() == len(PHOTOS) - 1  # one has no hard image
    assert len(found) == 9


def test_several_scales_are_averaged(root, backbone, extractor):
    def multi_scale(image):
        half = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear")
        return (backbone(image) + backbone(half)) / 2

    found = dict(Retrieval(root, "mine", SIZE, [1.0, 0.5])(extractor))
    for setting, (value, _, _) in reference(root, backbone, multi_scale).items():
        assert found[f"mine_{setting}"] == pytest.approx(value, abs=1e-6)
    image = torch.rand(2, 3, 1, 40)
    assert class_token(backbone.eval(), image, [0.1]).shape == (2, 32)


def test_batches_workers_and_order_change_nothing(root, backbone, extractor):
    expected = dict(Retrieval(root, size=SIZE)(extractor))
    for batch_size, workers in ((1, 0), (64, 1)):
        other = FeatureExtractor(backbone, batch_size=batch_size, num_workers=workers)
        assert dict(Retrieval(root, size=SIZE)(other)) == pytest.approx(expected)


def test_rankings_beside_the_published_loop():
    generator = np.random.default_rng(0)
    for _ in range(50):
        similarity = generator.normal(size=30).astype(np.float32)
        images = generator.permutation(30)
        right, junk = np.sort(images[: generator.integers(1, 9)]), np.sort(images[20:25])
        places = positions(similarity, right, junk)
        ranks, truth = np.argsort(-similarity)[:, None], {"ok": right, "junk": junk}
        value, precisions, _ = published_map(ranks, [truth], (1, 5, 10))
        assert 100 * average_precision(places) == pytest.approx(value)
        assert [100 * precision_at(places, k) for k in (1, 5, 10)] == pytest.approx(precisions)
    same = positions(np.ones(10, np.float32), np.array([0, 1]), np.array([2]))
    assert same.tolist() == [7, 8]  # features that are all the same find nothing


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("place", ["imlist", "gnd", "whole"])
def test_a_hostile_pickle_runs_no_code(tmp_path, place):
    (tmp_path / "jpg").mkdir()
    target = tmp_path / "run"
    bomb = Hostile(target)
    raw = pickle.dumps(bomb if place == "whole" else {**ground_truth(), place: [bomb]})
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(raw)
    with pytest.raises(UserError, match=r"gnd_roxford5k.pkl: not a ground truth .*asks for"):
        Retrieval(tmp_path)
    assert not target.exists()
    pickle.loads(raw)  # noqa: S301
    assert target.exists()  # it would have


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_of_every_protocol_is_read(protocol):
    content = {
        "ints": np.arange(5), "big": np.arange(3, dtype=">i4"), "scalar": np.float32(2.5),
        "words": np.array(["a", "bc"]), "objects": np.array(["a", 3], dtype=object), "empty": [],
        "bool": np.array([True, False]), "none": np.arange(0),
    }  # fmt: skip
    found = PlainUnpickler(io.BytesIO(pickle.dumps(content, protocol)), encoding="latin1").load()
    assert found == {
        "ints": [0, 1, 2, 3, 4], "big": [0, 1, 2], "scalar": 2.5, "words": ["a", "bc"],
        "objects": ["a", 3], "empty": [], "bool": [True, False], "none": [],
    }  # fmt: skip


def damaged(root, home, change):
    content = ground_truth()
    change(content)
    (home / "jpg").symlink_to(root / "jpg")
    (home / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    return home


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["gnd"][1].update(hard=[2, 18]), "query chelsea: hard has 18, and imlist has"),
        (lambda c: c["gnd"][1].update(easy=[-1]), "easy has -1"),
        (lambda c: c["gnd"][0].update(bbx=[9, 9, 2, 20]), "query astronaut: bbx"),
        (lambda c: c["gnd"][0].pop("junk"), "no 'junk'"),
        (lambda c: c.update(qimlist=[], gnd=[]), "no query"),
        (lambda c: c.pop("imlist"), "no 'imlist'"),
    ],
)
def test_a_wrong_ground_truth_is_named(root, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Retrieval(damaged(root, tmp_path, change))


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(MissingPath, match="0 files gnd_"):
        Retrieval(tmp_path)
    with pytest.raises(MissingPath, match="No such file"):
        read_ground_truth(tmp_path / "gnd_roxford5k.pkl")
    home = damaged(root, tmp_path, lambda c: c["imlist"].__setitem__(4, "../../moved"))
    with pytest.raises(MissingPath, match=r"moved\.jpg: no such file"):
        Retrieval(home)
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(b"\x80\x04cut")
    with pytest.raises(UserError, match="not a ground truth"):
        Retrieval(home)


def test_unreadable_images_and_boxes_outside_are_named(root, tmp_path, extractor):
    home = damaged(root, tmp_path, lambda c: c["gnd"][2].update(bbx=[900, 0, 950, 30]))
    with pytest.raises(UserError, match=r"coffee\.jpg: the query's box lies outside"):
        list(Retrieval(home, size=SIZE)(extractor))
    (home / "jpg").unlink()
    shutil.copytree(root / "jpg", home / "jpg")
    (home / "jpg" / "china_1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"china_1\.jpg: empty file"):
        list(Retrieval(home, size=SIZE)(extractor))


def test_weights_that_are_not_finite_end_it(root):
    broken = XCiT(32, 1, 2, patch_size=8)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(RunFailed, match=r"astronaut_0\.jpg: features that are not finite"):
        list(Retrieval(root, size=SIZE)(FeatureExtractor(broken, num_workers=0)))
