"""Folders, labels only when asked for, the built-in photographs, torchvision's sets."""

import os
import pickle
import re
import shutil
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from ssl_xcit.data import folders
from ssl_xcit.data.decode import decode, read_image
from ssl_xcit.data.folders import class_folders, folder, image_files, labelled_folders
from ssl_xcit.data.lists import labelled_lists, path_list
from ssl_xcit.data.names import Names
from ssl_xcit.data.photos import cut_photos, photographs
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sets import (
    arrays,
    huggingface,
    labelled_arrays,
    labelled_huggingface,
    torchvision_set,
)
from ssl_xcit.data.sources import Subset, stratified
from ssl_xcit.files import default_cache


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def test_any_tree_of_several_roots(tmp_path):
    for name in ("a/1.png", "a/deep/er/2.JPG", "b/3.webp", "b/.hidden.png", "b/.cache/4.png"):
        write(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    source = folder([str(tmp_path / "b"), str(tmp_path / "a")])
    assert [source.name(i)[len(str(tmp_path)) :] for i in range(len(source))] == [
        "/b/3.webp",
        "/a/1.png",
        "/a/deep/er/2.JPG",
    ]
    assert source.labels is None


def test_classes_are_first_level_folders_and_shared_between_sets(tmp_path):
    for name in ("train/cat/1.png", "train/dog/x/2.png", "test/dog/3.png", "test/newt/4.png"):
        write(tmp_path / name)
    pair = labelled_folders(str(tmp_path / "train"), str(tmp_path / "test"))
    assert pair.train.labels.tolist() == [0, 1]
    assert pair.test.labels.tolist() == [1, 2]
    assert pair.test.class_names == ("cat", "dog", "newt")


def test_a_share_of_each_class_is_held_out(tmp_path):
    for i in range(10):
        write(tmp_path / f"a/{i}.png"), write(tmp_path / f"b/{i}.png")
    write(tmp_path / "single/0.png")
    pair = labelled_folders(str(tmp_path), test_fraction=0.3)
    assert np.bincount(pair.test.labels, minlength=3).tolist() == [3, 3, 0]
    names = [[s.name(i) for i in range(len(s))] for s in (pair.train, pair.test)]
    assert not set(names[0]) & set(names[1])
    assert len(names[0]) + len(names[1]) == 21
    again = labelled_folders(str(tmp_path), test_fraction=0.3)
    assert again.test.indices.tolist() == pair.test.indices.tolist()


def test_without_root_there_are_no_labels():
    assert labelled_folders(None) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: folder(str(p / "none")), "no such folder"),
        (lambda p: folder(str(p / "empty")), "no images in it or below (no files)"),
        (lambda p: folder(str(p / "text")), "no images in it or below (left out: 1 .txt file)"),
        (lambda p: folder([]), "at least one folder"),
        (lambda p: class_folders(p / "flat"), "2 images lie in it, outside class folders"),
        (lambda p: class_folders(p / "one"), "one class only (a)"),
        (lambda p: labelled_folders(None, str(p)), "without eval_data.root"),
        (lambda p: torchvision_set("CIFAR10", str(p), "train", False), "data.download=true"),
        (lambda p: torchvision_set("CIFAR10", str(p / "c"), "train", True), "no network?"),
        (lambda p: torchvision_set("STL10", str(p), "unlabeled", False), "data.download=true"),
        (lambda p: torchvision_set("ImageNet", str(p), "train", False), "ILSVRC2012_devkit_t12"),
        (lambda p: torchvision_set("MNIST", str(p), "train", False), "one of CIFAR10"),
    ],
)
def test_bad_input_names_the_fix(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("")
    write(tmp_path / "flat/1.png"), write(tmp_path / "flat/2.png")
    write(tmp_path / "one/a/1.png")
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
        make(tmp_path)


def test_photographs_are_disjoint_and_cut_the_same_twice(cache, photos_pair, tmp_path):
    names = {name for name, _ in photographs()}
    assert set(photos_pair.train.class_names) == names
    assert len(names) == 17
    assert set(photos_pair.test.labels) == set(range(17))

    def windows(source, photograph):
        for i in range(len(source)):
            if f"/{photograph}/" in source.name(i):
                top, left = map(
                    int, source.name(i).rsplit("/", 1)[1].removesuffix(".png").split("_")
                )
                yield source.name(i), top, left

    for photograph, file in photographs():
        image = read_image(file)
        covered = np.zeros(image.shape[:2], np.int8)
        for source, bit in ((photos_pair.train, 1), (photos_pair.test, 2)):
            for path, top, left in windows(source, photograph):
                covered[top : top + 64, left : left + 64] |= bit
                assert np.array_equal(read_image(path), image[top : top + 64, left : left + 64])
        assert set(np.unique(covered)) <= {0, 1, 2}  # never 3: no pixel is in both
        assert (covered == 1).any()
        assert (covered == 2).any()

    again = cut_photos(tmp_path)
    first = sorted(
        p.relative_to(cache / "photos-64-128-32")
        for p in (cache / "photos-64-128-32").rglob("*.png")
    )
    assert first == sorted(p.relative_to(again) for p in again.rglob("*.png"))
    assert all(
        (again / p).read_bytes() == (cache / "photos-64-128-32" / p).read_bytes()
        for p in first[::50]
    )


def test_stratified_never_takes_all():
    labels = np.array([5, 5, 9, 9, 9, 7])
    for seed in range(5):
        chosen = stratified(labels, 0.9, seed)
        assert not chosen[5]
        assert chosen[:2].sum() == 1
        assert chosen[2:5].sum() == 2


def test_subset_maps_names_labels_and_pixels(photos_pair):
    subset = Subset(photos_pair.test, np.array([5, 2]))
    assert len(subset) == 2
    assert subset.name(1) == photos_pair.test.name(2)
    assert subset.labels.tolist() == photos_pair.test.labels[[5, 2]].tolist()
    assert subset.read(0) == photos_pair.test.read(5)


def test_names_are_a_sequence():
    words = ["a/b.png", "", "Übung.jpg", "bad\udcff.png"]
    names = Names.of(words)
    assert list(names) == words
    assert len(names) == 4
    assert names[-2] == words[2]
    assert list(names[1:3]) == words[1:3]
    with pytest.raises(IndexError):
        names[4]
    assert names.content.nbytes == sum(len(os.fsencode(w)) for w in words)


def test_a_large_listing_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 3)
    monkeypatch.setattr("ssl_xcit.data.folders.SETTLED", 0)
    for name in ("a/1.png", "a/2.png", "b/c/3.png"):
        write(tmp_path / name)
    first = list(image_files(tmp_path))
    assert first == ["a/1.png", "a/2.png", "b/c/3.png"]
    counted = []
    whole = folders.scan
    monkeypatch.setattr("ssl_xcit.data.folders.scan", lambda *r: counted.append(r) or whole(*r))
    assert list(image_files(tmp_path)) == first
    assert not counted
    for change in (
        lambda: write(tmp_path / "b/c/4.png"),
        lambda: (tmp_path / "a/1.png").unlink(),
        lambda: write(tmp_path / "d/5.png"),
        lambda: shutil.rmtree(tmp_path / "b"),
    ):
        change()
        counted.clear()
        assert list(image_files(tmp_path)) == sorted(
            str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")
        )
        assert counted
    kept = next((default_cache() / "folders").iterdir())
    for damaged in (kept.read_bytes()[:200], b"", b"no zip"):
        kept.write_bytes(damaged)
        assert len(image_files(tmp_path)) == 2


def test_a_listing_is_not_trusted_within_the_clocks_grain(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 1)
    write(tmp_path / "1.png")
    for i in range(2, 6):
        image_files(tmp_path)
        write(tmp_path / f"{i}.png")  # perhaps in the same tick
        assert len(image_files(tmp_path)) == i


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "a/1.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "2.png").symlink_to(tmp_path / "a/1.png")
    assert list(image_files(tmp_path)) == ["2.png", "a/1.png"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert set(image_files(tmp_path)) >= {"2.png", "a/1.png"}


def test_lists_of_paths(tmp_path):
    for name in ("x/1.png", "x/2.png", "y z/3.png"):
        write(tmp_path / name)
    (tmp_path / "plain.txt").write_text("x/1.png\n\ny z/3.png\r\n")
    source = path_list(str(tmp_path / "plain.txt"))
    assert [decode(source.read(i)).shape for i in range(2)] == [(8, 8, 3)] * 2
    assert source.labels is None
    assert source.name(1) == f"{tmp_path}/y z/3.png"
    (tmp_path / "labels.txt").write_text("1.png\t10\n2.png\t9\n")
    source = path_list(str(tmp_path / "labels.txt"), str(tmp_path / "x"))
    assert source.class_names == ("9", "10")
    assert source.labels.tolist() == [1, 0]
    table = pa.table({"path": ["x/1.png", "x/2.png", "y z/3.png"], "label": ["b", "a", "b"]})
    pq.write_table(table, tmp_path / "list.parquet")
    source = path_list(str(tmp_path / "list.parquet"))
    assert source.labels.tolist() == [1, 0, 1]
    pq.write_table(table.select(["path"]), tmp_path / "bare.parquet")
    assert path_list(str(tmp_path / "bare.parquet")).labels is None
    odd = "x/\udce9\u2028\x0c.png"  # Latin-1 and other ends of lines, legal in names
    write(tmp_path / odd)
    content = b"\xef\xbb\xbfx/1.png\n" + os.fsencode(odd) + b"\n"
    (tmp_path / "odd.txt").write_bytes(content)
    source = path_list(str(tmp_path / "odd.txt"))
    assert [decode(source.read(i)).shape for i in range(2)] == [(8, 8, 3)] * 2
    with pytest.raises(ValueError, match="without images to learn from"):
        labelled_lists(None, str(tmp_path / "list.parquet"))
    pair = labelled_lists(str(tmp_path / "list.parquet"), test_fraction=0.5)
    assert pair.test.labels.tolist() == [1]
    assert labelled_lists(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"\n", "lists no paths"),
        ("mixed.txt", b"a.png\t1\nb.png\n", "lines of [1, 2] columns"),
        ("binary.txt", b"\xff\xfe\x00", "not a text file"),
        ("gone.txt", b"nowhere/a.png\n", "set data.root=DIR"),
        ("bad.parquet", b"PAR1 not really", "bad.parquet"),
    ],
)
def test_bad_lists(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        path_list(str(tmp_path / name))


def test_bad_parquet_columns(tmp_path):
    pq.write_table(pa.table({"where": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="columns where; `path` is needed"):
        path_list(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"path": ["a"], "label": [None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="1 rows have no label"):
        path_list(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"path": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="not text"):
        path_list(str(tmp_path / "c.parquet"))


def test_arrays_are_mapped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.array([0, 2, 1, 0, 2, 1]))
    source = arrays(str(tmp_path / "images.npy"), str(tmp_path / "labels.npy"))
    assert isinstance(source.images, np.memmap)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).read(3), images[3])  # noqa: S301
    assert np.array_equal(decode(source.read(3)), images[3])
    assert source.labels.tolist() == [0, 2, 1, 0, 2, 1]
    assert source.name(3) == "images.npy[3]"
    pair = labelled_arrays(*(str(tmp_path / f"{n}.npy") for n in ("images", "labels")))
    assert len(pair.test) == 3
    assert arrays(None) is None
    five = Preprocess(5, (0.5,) * 5, (0.2,) * 5)
    np.save(tmp_path / "five.npy", images.reshape(-1)[:120].reshape(2, 3, 4, 5))
    assert decode(arrays(str(tmp_path / "five.npy")).read(1), five).shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3), np.uint8), None, "images are (N, H, W)"),
        (np.zeros((2, 3, 200, 200), np.uint8), None, "transpose(0, 2, 3, 1)"),
        (np.array(["a", "b"]), None, "images are (N, H, W)"),
        (np.zeros((2, 4, 4), np.uint8), np.array([1]), "(2,) class ids are needed"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0.5, np.nan]), "not all numbers are finite"),
        (np.zeros((2, 4, 4), np.uint8), np.array([[0, 2], [1, 1]]), "are 0 or 1 each"),
        (np.zeros((2, 4, 4), np.uint8), np.array([-1, 1]), "start at 0"),
        (np.array([{}]), None, "not a .npy file of numbers"),
    ],
)
def test_bad_arrays(tmp_path, images, labels, message):
    np.save(tmp_path / "i.npy", images)
    if labels is not None:
        np.save(tmp_path / "l.npy", labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays(str(tmp_path / "i.npy"), None if labels is None else str(tmp_path / "l.npy"))


def test_a_set_of_hugging_face(tmp_path):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = {"picture": images, "kind": [0, 1, 0, 1, 0, 1]}
    one = datasets.Dataset.from_dict(table, features=features)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    source = huggingface(str(tmp_path / "one"), image="picture", label="kind")
    assert [decode(source.read(i))[0, 0, 0] for i in range(6)] == list(range(6))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == table["kind"]
    pair = labelled_huggingface(str(tmp_path / "two"), "train", "test", "picture", "kind")
    assert len(pair.train) == len(pair.test) == 6
    assert huggingface(None) is None
    for options, message in (
        ({"root": "two", "image": "picture"}, "has train, test"),
        ({"root": "one"}, "columns picture, kind"),
        ({"root": "one", "image": "picture", "label": "class"}, "data.label=class"),
        ({"root": "one", "image": "kind"}, "not of images"),
        ({"root": "one", "image": "picture", "label": "picture"}, "class ids"),
        ({"root": "none"}, "no such folder"),
        ({"root": "."}, "not a set of"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface(**{**options, "root": str(tmp_path / options["root"])})


def test_cifar_as_torchvision_lays_it_out(tmp_path):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}
        (root / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (root / "batches.meta").write_bytes(pickle.dumps(names))
    with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True):
        source = torchvision_set("CIFAR10", str(tmp_path), "train", False)
        reference = CIFAR10(str(tmp_path), train=True)
    assert len(source) == 20
    assert source.class_names[9] == "class 9"
    for i in (0, 19):
        assert np.array_equal(decode(source.read(i)), np.asarray(reference[i][0]))
        assert source.labels[i] == reference[i][1]
