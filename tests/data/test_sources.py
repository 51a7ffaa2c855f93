"""Folders, labels only when asked for, the built-in photographs, torchvision's sets."""

import re

import numpy as np
import pytest
from PIL import Image

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import cut_photos, photographs
from ssl_xcit.data.sources import (
    Subset,
    class_folders,
    folder,
    labelled_folders,
    stratified,
    torchvision_set,
)


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
        (lambda p: folder(str(p / "empty")), "no images in it or below (0 other files)"),
        (lambda p: folder(str(p / "text")), "(1 other files)"),
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
    assert np.array_equal(subset.read(0), photos_pair.test.read(5))
