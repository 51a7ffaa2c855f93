"""Features on the disk: the same numbers, made once, after every interruption."""

import itertools
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import held_by_another

from ssl_xcit.data.crop_dataset import plain_loader
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import Files, LabelledPair, Subset
from ssl_xcit.errors import RunFailed
from ssl_xcit.eval.features import cache as feature_cache
from ssl_xcit.eval.features import extract as features
from ssl_xcit.eval.features.cache import cached, data_digest, extract_pair
from ssl_xcit.eval.features.extract import KINDS, extract
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.locks import try_lock


@pytest.fixture
def source(photos_pair, tmp_path):
    """Copies of a few photographs, an hour old."""
    files = []
    for i in range(0, len(photos_pair.test), 25):
        files.append(str(tmp_path / f"{i}.png"))
        shutil.copy(photos_pair.test.name(i), files[-1])
        os.utime(files[-1], (1e9, 1e9))
    return Files(files, "", np.arange(len(files)) % 3, ["a", "b", "c"])


@pytest.fixture
def extractor(tmp_path):
    torch.manual_seed(1)
    backbone = XCiT(32, 2, 2, patch_size=8)
    return FeatureExtractor(backbone, batch_size=7, num_workers=0, cache=tmp_path / "c")


def count_images(monkeypatch):
    seen = []

    def forward_parts(backbone, images, parts, _real=features.forward_parts):
        seen.append(len(images))
        return _real(backbone, images, parts)

    monkeypatch.setattr(features, "forward_parts", forward_parts)
    return seen


ALL = KINDS["last4_patch"]


def test_the_parts_are_what_hooks_see(source, extractor):
    found, _ = extract(extractor, source, 64, 48, ALL)
    backbone, seen = extractor.backbone.eval(), {}
    for name, block in [("block_2", backbone.blocks[0]), ("block_1", backbone.blocks[1])]:
        block.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    backbone.cls_attn_blocks[0].register_forward_hook(
        lambda m, i, out: seen.__setitem__("cls_1", out[0])
    )
    (pixels, _), *_ = plain_loader(source, 64, 48, 99, 0, extractor.preprocess)
    images = normalise(pixels, extractor.preprocess)
    with torch.no_grad():
        whole = backbone.forward_features(images)
        cls = backbone(images)
        expected = {name: backbone.norm(x).mean(dim=1) for name, x in seen.items()}
    expected |= {"cls": cls, "patch": whole.patches.mean(dim=(2, 3))}
    for name in ALL:
        assert np.allclose(found[name], expected[name], atol=1e-4), name


def test_a_second_time_nothing_is_extracted(source, extractor, monkeypatch):
    seen = count_images(monkeypatch)
    first, rows = cached(extractor, source, 64, 48, ["cls"])
    assert sum(seen) == len(source)
    again, same = cached(extractor, source, 64, 48, ["cls"])
    assert sum(seen) == len(source)
    assert isinstance(again["cls"], np.memmap)
    assert np.array_equal(first["cls"], again["cls"])
    assert np.array_equal(rows, same)
    plain, _ = extract(extractor, source, 64, 48)
    assert np.array_equal(plain["cls"], again["cls"])
    more, _ = cached(extractor, source, 64, 48, ALL)  # what is there stays
    assert np.array_equal(more["cls"], first["cls"])


@pytest.mark.parametrize("change", ["weights", "image", "size", "dtype"])
def test_whatever_changes_makes_other_features(source, extractor, monkeypatch, change):
    cached(extractor, source, 64, 48)
    seen = count_images(monkeypatch)
    size, dtype = 48, "float32"
    if change == "weights":
        with torch.no_grad():
            extractor.backbone.norm.bias[3] += 1.0
    elif change == "image":
        shutil.copy(source.name(1), source.name(0))
    elif change == "size":
        size = 40
    else:
        dtype = "float16"
    found, _ = cached(extractor, source, 64, size, dtype=dtype)
    assert sum(seen) == len(source)
    expected, _ = extract(extractor, source, 64, size)
    assert found["cls"].dtype == dtype
    assert np.allclose(found["cls"], expected["cls"], atol=0 if dtype == "float32" else 2e-3)


@contextmanager
def stopped(monkeypatch, stop):
    """Extraction ends with this exception at its fourth batch."""
    real, calls = features.forward_parts, itertools.count()

    def forward_parts(*args):
        if next(calls) == 3:
            raise stop
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "forward_parts", forward_parts)
        with pytest.raises(stop):
            yield


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_extraction_goes_on(source, extractor, monkeypatch, signal, capsys):
    """Ctrl-C notes how far it is; after a kill the last note counts (here after each batch)."""
    monkeypatch.setattr(feature_cache, "NOTED", 1e9 if signal is KeyboardInterrupt else -1.0)
    seen = count_images(monkeypatch)
    with stopped(monkeypatch, signal):
        cached(extractor, source, 64, 48)
    assert not list(extractor.cache.glob("*/about.json"))
    found, rows = cached(extractor, source, 64, 48)
    assert sum(seen) == len(source)  # none twice
    assert "going on from image 21" in capsys.readouterr().out
    expected, all_rows = extract(extractor, source, 64, 48)
    assert np.allclose(found["cls"], expected["cls"], atol=1e-5)
    assert np.array_equal(rows, all_rows)
    folder = next(extractor.cache.glob("*/about.json")).parent
    assert sorted(f.name for f in folder.iterdir()) == [
        ".lock", "about.json", "cls.npy", "cls.rows.npy",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "flip", "about", "note"])
def test_a_damaged_cache_is_made_again(source, extractor, damage):
    before, _ = cached(extractor, source, 64, 48)
    expected = np.array(before["cls"])
    folder = next(extractor.cache.glob("*/about.json")).parent
    file = folder / "cls.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "about":
        (folder / "about.json").write_text("{")
    else:
        (folder / "about.json").unlink()
        (folder / "progress.json").write_text(json.dumps({"parts": ["cls"], "done": 5}))
        (folder / ".cls.part").write_bytes(b"too short")
    found, _ = cached(extractor, source, 64, 48)
    assert np.array_equal(found["cls"], expected)


def test_bad_images_keep_their_labels_away(source, extractor):
    with open(source.name(2), "wb") as file:
        file.write(b"<html>")
    found, rows = cached(extractor, source, 64, 48)
    assert len(found["cls"]) == len(source) - 1
    assert 2 not in rows
    again, same = cached(extractor, source, 64, 48)
    assert np.array_equal(rows, same)
    assert len(again["cls"]) == len(rows)


def test_features_that_are_not_finite_are_named_and_not_kept(source, extractor):
    with torch.no_grad():
        extractor.backbone.norm.weight[0] = torch.nan
    with pytest.raises(RunFailed, match=r"such as .*png: features that are not finite"):
        cached(extractor, source, 64, 48)
    assert not list(extractor.cache.glob("*/about.json"))


def test_another_process_at_the_same_features_is_not_waited_for(source, extractor):
    expected, _ = cached(extractor, source, 64, 48)
    folder = next(extractor.cache.glob("*/about.json")).parent
    (folder / "about.json").unlink()
    with held_by_another(folder / ".lock"):
        found, _ = cached(extractor, source, 64, 48)
    assert np.array_equal(found["cls"], expected["cls"])
    assert not (folder / "about.json").exists()


def test_a_disk_that_cannot_be_written_is_done_without(source, extractor, monkeypatch, caplog):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(feature_cache.os, "posix_fallocate", full)
    found, _ = cached(extractor, source, 64, 48)
    assert "features are not kept" in caplog.text
    assert len(found["cls"]) == len(source)


def test_a_note_of_other_parts_is_not_believed(source, extractor, monkeypatch):
    """Interrupted; other parts begun and killed before their first note; the first ones again."""
    for parts, stop in ((["cls"], KeyboardInterrupt), (["cls", "patch"], SystemExit)):
        with stopped(monkeypatch, stop):
            cached(extractor, source, 64, 48, parts)
    found, _ = cached(extractor, source, 64, 48, ["cls"])
    expected, _ = extract(extractor, source, 64, 48)
    assert np.allclose(found["cls"], expected["cls"], atol=1e-5)


def test_an_image_that_can_be_read_only_sometimes_does_not_shift_the_rows(
    source, extractor, monkeypatch
):
    cached(extractor, source, 64, 48, ["cls"])
    read = Files.read
    digest = feature_cache.data_digest(source, extractor.cache)
    monkeypatch.setattr(feature_cache, "data_digest", lambda *args: digest)

    def failing(self, index):
        if index == 4:
            raise feature_cache.BadImage("the network file system is away")
        return read(self, index)

    monkeypatch.setattr(Files, "read", failing)
    found, rows = cached(extractor, source, 64, 48, ["cls", "patch"])
    assert len(rows) == len(found["cls"]) == len(found["patch"]) == len(source) - 1


def test_the_oldest_go_when_there_are_too_many(source, extractor, monkeypatch):
    """Of what this cache made: another folder in it is nobody's."""
    foreign = extractor.cache / "my own"
    foreign.mkdir(parents=True)
    (foreign / "about.json").write_text("{}")
    cached(extractor, source, 64, 48)
    old = {file.parent for file in extractor.cache.glob("*/about.json")} - {foreign}
    for folder in (foreign, *old):
        os.utime(folder, (1, 1))
    monkeypatch.setattr(feature_cache, "LIMIT", 10)
    cached(extractor, source, 64, 40)
    left = {file.parent for file in extractor.cache.glob("*/about.json")}
    assert len(left) == 2
    assert foreign in left
    assert not old & left


def test_a_folder_of_somebody_else_is_left(source, extractor, monkeypatch, caplog):
    """What is extracted is kept, though the cache stays too large."""
    cached(extractor, source, 64, 48)
    (old,) = (file.parent for file in extractor.cache.glob("*/about.json"))
    os.utime(old, (1, 1))

    def lock_of(path):
        if path.parent == old:
            raise PermissionError(13, "Permission denied", str(path))
        return try_lock(path)

    monkeypatch.setattr(feature_cache, "LIMIT", 10)
    monkeypatch.setattr(feature_cache, "try_lock", lock_of)
    monkeypatch.setattr(feature_cache, "extract", None)
    cached(extractor, source, 64, 40)
    assert len(list(extractor.cache.glob("*/about.json"))) == 2
    assert not caplog.records


def test_images_are_hashed_again_only_when_a_file_changes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SETTLED", -1)
    first = data_digest(source, tmp_path / "c")
    reads = []
    read = Files.read
    monkeypatch.setattr(Files, "read", lambda self, i: reads.append(i) or read(self, i))
    assert data_digest(source, tmp_path / "c") == first
    assert not reads
    assert data_digest(source, None) == first
    part = Subset(source, np.arange(3))
    assert data_digest(part, tmp_path / "c") != first
    os.utime(source.name(0), (1e9 + 1, 1e9 + 1))
    reads.clear()
    assert data_digest(source, tmp_path / "c") == first
    assert len(reads) == len(source)


def test_several_devices_give_the_same_features(source, extractor):
    three = replace(extractor, batch_size=1, cache=None, more_devices=("cpu", "cpu"))
    one, _ = extract(extractor, source, 64, 48, ALL)
    for _ in range(3):
        several, _ = extract(three, source, 64, 48, ALL)
        for name in ALL:
            assert np.allclose(one[name], several[name], atol=1e-5)


def test_one_set_is_extracted_once(source, extractor, monkeypatch):
    seen = count_images(monkeypatch)
    pair = LabelledPair(source, source, "one", 64, 48)
    found = extract_pair(replace(extractor, cache=None, pair=pair), ["cls_patch"])
    assert found.one_set
    assert sum(seen) == len(source)
    joined = found.of("cls_patch")
    assert joined.one_set
    assert joined.train.shape == (len(source), 64)
