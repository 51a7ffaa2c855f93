"""Sources and their parts, and the built-in photographs."""

import os
from pathlib import Path

import numpy as np
import pytest

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import cut_photos, photographs
from ssl_xcit.data.sources import Subset, stratified
from ssl_xcit.data.string_array import StringArray


def test_photographs_are_disjoint_and_cut_the_same_twice(cache, photos_pair, tmp_path):
    names = {name for name, _ in photographs()}
    assert set(photos_pair.train.class_names) == names
    assert len(names) == 17
    assert set(photos_pair.test.labels) == set(range(17))

    def windows(source, photograph):
        for path in map(Path, map(source.name, range(len(source)))):
            if path.parent.name == photograph:
                yield path, *map(int, path.stem.split("_"))

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

    first, again = cache / "photos-64-128-32", cut_photos(tmp_path)
    names, others = (sorted(p.relative_to(f) for p in f.rglob("*.png")) for f in (first, again))
    assert names == others
    assert all((again / p).read_bytes() == (first / p).read_bytes() for p in names[::50])


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
    names = StringArray.of(words)
    assert list(names) == words
    assert len(names) == 4
    assert names[-2] == words[2]
    assert list(names[1:3]) == words[1:3]
    with pytest.raises(IndexError):
        names[4]
    assert names.content.nbytes == sum(len(os.fsencode(w)) for w in words)
