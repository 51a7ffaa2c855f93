"""Which images a set holds, wherever it lies, and what has changed in it."""

import shutil

import datasets
import numpy as np
import pytest
from samples import put, tar

from ssl_xcit.data import identity
from ssl_xcit.data.folders import class_folders, folder, labelled_folders
from ssl_xcit.data.identity import difference, index_of
from ssl_xcit.data.lists import path_list
from ssl_xcit.data.sets import arrays, huggingface
from ssl_xcit.data.shards import tar_shards
from ssl_xcit.data.sources import Subset

NAMES = ("a/1.png", "a/2.png", "b/3.png")
ZEROS = np.zeros((5, 4, 4), np.uint8)
THREE = [(f"{i}.jpg", bytes([i] * 100)) for i in range(3)]


def tree(root, names=NAMES):
    for number, name in enumerate(names):
        put(root / name, bytes(10 + number))
    return root


def path_lists(root, *lines):
    """A list a file, of whole lines."""
    for number, content in enumerate(lines):
        put(root / f"{number}.txt", "\n".join(content).encode())
    return [path_list(str(root / f"{number}.txt")) for number in range(len(lines))]


def as_hugging_face(root):
    rows = {"image": [{"bytes": b"x", "path": None}]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(root)


KINDS = {  # how its files are made, and how they are read
    "folder": (tree, lambda p: folder(str(p))),
    "folders": (
        lambda p: (tree(p / "x"), tree(p / "y")), lambda p: folder([str(p / "x"), str(p / "y")]),
    ),
    "classes": (tree, class_folders),
    "list": (lambda p: path_lists(tree(p), NAMES), lambda p: path_list(str(p / "0.txt"))),
    "shards": (lambda p: tar(p / "0.tar", THREE), lambda p: tar_shards(str(p))),
    "arrays": (lambda p: np.save(p / "x.npy", ZEROS), lambda p: arrays(str(p / "x.npy"))),
    "npz": (lambda p: np.savez(p / "x.npz", x=ZEROS), lambda p: arrays(str(p / "x.npz"))),
    "hugging face": (as_hugging_face, lambda p: huggingface(str(p))),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_elsewhere_are_the_same(kind, tmp_path, monkeypatch):
    make, read = KINDS[kind]
    (tmp_path / "there").mkdir()
    make(tmp_path / "there")
    before = index_of(read(tmp_path / "there"))
    (tmp_path / "parent").mkdir()
    shutil.copytree(tmp_path / "there", tmp_path / "parent/here", copy_function=shutil.copy)
    here = index_of(read(tmp_path / "parent/here"))
    assert here.digest() == before.digest()
    assert difference(before, here) == ""
    monkeypatch.chdir(tmp_path / "parent")
    if kind in ("folder", "shards"):
        assert index_of(read("here")).digest() == before.digest()


def test_what_has_changed_is_said_with_examples(tmp_path):
    before = index_of(folder(str(tree(tmp_path))))
    tree(tmp_path, [*NAMES, "c/4.png", "c/5.png"])
    (tmp_path / "a/1.png").unlink()
    (tmp_path / "b/3.png").write_bytes(bytes(99))
    now = index_of(folder(str(tmp_path)))
    assert now.digest() != before.digest()
    assert difference(before, now) == (
        "3 images then, 4 now: 2 new (such as c/4.png, c/5.png), 1 gone (such as a/1.png), "
        "1 of another size (such as b/3.png)"
    )


def test_content_of_arrays_and_order_of_lists_count(tmp_path):
    images = ZEROS.copy()
    np.save(tmp_path / "x.npy", images)
    before = index_of(arrays(str(tmp_path / "x.npy")))
    assert index_of(arrays(str(tmp_path / "x.npy"))).digest() == before.digest()  # from the cache
    images[3, 2, 1] = 1
    np.save(tmp_path / "y.npy", images)
    now = index_of(arrays(str(tmp_path / "y.npy")))
    assert "another order, content or labels" in difference(before, now)
    one, two = map(index_of, path_lists(tree(tmp_path), NAMES, NAMES[::-1]))
    assert "another order" in difference(one, two)
    tar(tmp_path / "t/0.tar", THREE)
    one = index_of(tar_shards(str(tmp_path / "t")))
    content = bytearray((tmp_path / "t/0.tar").read_bytes())
    content[512 + 50] ^= 1
    (tmp_path / "t/0.tar").write_bytes(content)
    assert difference(one, index_of(tar_shards(str(tmp_path / "t"))))


def test_labels_count_where_they_are_asked_for(tmp_path):
    tree(tmp_path)
    lines = ([f"{p}\t{c}" for p, c in zip(NAMES, labels, strict=True)] for labels in ("xxy", "xyy"))
    one, two = path_lists(tmp_path, *lines)
    assert index_of(one).digest() == index_of(two).digest()
    assert index_of(one, labelled=True).digest() != index_of(two, labelled=True).digest()
    part = Subset(one, np.array([1]))
    assert index_of(part).digest() == index_of(one).digest()


def test_indices_are_kept(tmp_path):
    tree(tmp_path / "train", [*NAMES, "a/4.png", "b/5.png"])
    tree(tmp_path / "test")
    pair = labelled_folders(str(tmp_path / "train"), str(tmp_path / "test"))
    indices = identity.indices_of(pair.train, pair)
    assert list(indices) == ["data", "eval_data", "eval_data.test"]
    identity.save_indices(indices, tmp_path / "images.npz")
    again = identity.load_indices(tmp_path / "images.npz")
    assert {k: v.digest() for k, v in again.items()} == {k: v.digest() for k, v in indices.items()}
    (tmp_path / "images.npz").write_bytes(b"damaged")
    assert identity.load_indices(tmp_path / "images.npz") == {}


def test_a_file_that_is_gone_has_no_size(tmp_path):
    source = folder(str(tree(tmp_path)))
    (tmp_path / "a/1.png").unlink()
    assert index_of(source).sizes.tolist() == [-1, 11, 12]


def test_a_file_system_that_is_far_away_is_asked_by_many_at_once(tmp_path, monkeypatch):
    paths = [str(tree(tmp_path) / name) for name in NAMES]
    near = identity.sizes_of(paths)
    monkeypatch.setattr("ssl_xcit.data.identity.PROBED", 1)
    monkeypatch.setattr("ssl_xcit.data.identity.SLOW", 0.0)
    assert identity.sizes_of(paths).tolist() == near.tolist() == [10, 11, 12]


def test_two_cameras_with_the_same_names_and_sizes_are_two_sets(tmp_path):
    for i in range(5):
        put(tmp_path / f"one/{i}.bmp", b"1" * 99), put(tmp_path / f"two/{i}.bmp", b"2" * 99)
    one, two = (index_of(folder(str(tmp_path / name))) for name in ("one", "two"))
    assert one.digest() != two.digest()
    assert "another order, content or labels" in difference(one, two)


def test_a_list_of_whole_paths_that_moved_with_its_images(tmp_path):
    roots = tree(tmp_path / "here"), tree(tmp_path / "there")
    one, two = (index_of(*path_lists(root, [str(root / name) for name in NAMES])) for root in roots)
    assert one.digest() == two.digest()
