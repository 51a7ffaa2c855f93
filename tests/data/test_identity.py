"""Which images a set holds, wherever it lies, and what has changed in it."""

import shutil

import datasets
import numpy as np
import pytest
from samples import tar

from ssl_xcit.data.folders import class_folders, folder, labelled_folders
from ssl_xcit.data.identity import (
    difference,
    index_of,
    indices_of,
    load_indices,
    save_indices,
    sizes_of,
)
from ssl_xcit.data.lists import path_list
from ssl_xcit.data.sets import arrays, huggingface
from ssl_xcit.data.shards import tar_shards
from ssl_xcit.data.sources import Subset

NAMES = ("a/1.png", "a/2.png", "b/3.png")


def tree(root, names=NAMES):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(10 + number))
    return root


THREE = [(f"{i}.jpg", bytes([i] * 100)) for i in range(3)]


def as_list(root):
    (root / "list.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return path_list(str(root / "list.txt"))


MAKERS = {
    "folder": lambda root: folder(str(tree(root))),
    "folders": lambda root: folder([str(tree(root / "x")), str(tree(root / "y"))]),
    "classes": lambda root: class_folders(tree(root)),
    "list": lambda root: as_list(tree(root)),
    "shards": lambda root: tar(root / "0.tar", THREE) or tar_shards(str(root)),
    "arrays": lambda root: (
        root.mkdir() or np.save(root / "x.npy", np.zeros((5, 4, 4), np.uint8))
        or arrays(str(root / "x.npy"))
    ),
    "npz": lambda root: (
        root.mkdir() or np.savez(root / "x.npz", x=np.zeros((5, 4, 4), np.uint8))
        or arrays(str(root / "x.npz"))
    ),
    "hugging face": lambda root: (
        datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}]})
        .cast_column("image", datasets.Image()).save_to_disk(root)
        or huggingface(str(root))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_images_elsewhere_are_the_same(kind, tmp_path, monkeypatch):
    there = MAKERS[kind](tmp_path / "there")
    before = index_of(there)
    (tmp_path / "parent").mkdir()
    shutil.copytree(tmp_path / "there", tmp_path / "parent/here", copy_function=shutil.copy)
    places = {
        "folder": lambda p: folder(str(p)),
        "folders": lambda p: folder([str(p / "x"), str(p / "y")]),
        "classes": class_folders,
        "list": lambda p: path_list(str(p / "list.txt")),
        "shards": lambda p: tar_shards(str(p)),
        "arrays": lambda p: arrays(str(p / "x.npy")),
        "npz": lambda p: arrays(str(p / "x.npz")),
        "hugging face": lambda p: huggingface(str(p)),
    }
    here = index_of(places[kind](tmp_path / "parent/here"))
    assert here.digest() == before.digest()
    assert difference(before, here) == ""
    monkeypatch.chdir(tmp_path / "parent")
    if kind in ("folder", "shards"):
        assert index_of(places[kind]("here")).digest() == before.digest()


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
    images = np.zeros((5, 4, 4), np.uint8)
    np.save(tmp_path / "x.npy", images)
    before = index_of(arrays(str(tmp_path / "x.npy")))
    assert index_of(arrays(str(tmp_path / "x.npy"))).digest() == before.digest()  # from the cache
    images[3, 2, 1] = 1
    np.save(tmp_path / "y.npy", images)
    now = index_of(arrays(str(tmp_path / "y.npy")))
    assert "another order, content or labels" in difference(before, now)
    tree(tmp_path)
    for name, lines in (("a", NAMES), ("b", NAMES[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    one, two = (index_of(path_list(str(tmp_path / f"{name}.txt"))) for name in "ab")
    assert "another order" in difference(one, two)
    tar(tmp_path / "t/0.tar", THREE)
    one = index_of(tar_shards(str(tmp_path / "t")))
    content = bytearray((tmp_path / "t/0.tar").read_bytes())
    content[512 + 50] ^= 1
    (tmp_path / "t/0.tar").write_bytes(content)
    assert difference(one, index_of(tar_shards(str(tmp_path / "t"))))


def test_labels_count_where_they_are_asked_for(tmp_path):
    tree(tmp_path)
    for name, labels in (("a", "xxy"), ("b", "xyy")):
        lines = [f"{path}\t{label}" for path, label in zip(NAMES, labels, strict=True)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    one, two = (path_list(str(tmp_path / f"{name}.txt")) for name in "ab")
    assert index_of(one).digest() == index_of(two).digest()
    assert index_of(one, labelled=True).digest() != index_of(two, labelled=True).digest()
    part = Subset(one, np.array([1]))
    assert index_of(part).digest() == index_of(one).digest()


def test_indices_are_kept(tmp_path):
    tree(tmp_path / "train", [*NAMES, "a/4.png", "b/5.png"])
    tree(tmp_path / "test")
    pair = labelled_folders(str(tmp_path / "train"), str(tmp_path / "test"))
    indices = indices_of(pair.train, pair)
    assert list(indices) == ["data", "eval_data", "eval_data.test"]
    save_indices(indices, tmp_path / "images.npz")
    again = load_indices(tmp_path / "images.npz")
    assert {k: v.digest() for k, v in again.items()} == {k: v.digest() for k, v in indices.items()}
    (tmp_path / "images.npz").write_bytes(b"damaged")
    assert load_indices(tmp_path / "images.npz") == {}


def test_a_file_that_is_gone_has_no_size(tmp_path):
    source = folder(str(tree(tmp_path)))
    (tmp_path / "a/1.png").unlink()
    assert index_of(source).sizes.tolist() == [-1, 11, 12]


def test_a_file_system_that_is_far_away_is_asked_by_many_at_once(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in NAMES]
    tree(tmp_path)
    near = sizes_of(paths)
    monkeypatch.setattr("ssl_xcit.data.identity.PROBED", 1)
    monkeypatch.setattr("ssl_xcit.data.identity.SLOW", 0.0)
    assert sizes_of(paths).tolist() == near.tolist() == [10, 11, 12]


def test_two_cameras_with_the_same_names_and_sizes_are_two_sets(tmp_path):
    for number, name in enumerate(("one", "two")):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.bmp").write_bytes(bytes([number]) * 99)
    one, two = (index_of(folder(str(tmp_path / name))) for name in ("one", "two"))
    assert one.digest() != two.digest()
    assert "another order, content or labels" in difference(one, two)


def test_a_list_of_whole_paths_that_moved_with_its_images(tmp_path):
    for place in ("here", "there"):
        root = tree(tmp_path / place)
        (root / "list.txt").write_text("".join(f"{root / name}\n" for name in NAMES))
    one, two = (index_of(path_list(str(tmp_path / p / "list.txt"))) for p in ("here", "there"))
    assert one.digest() == two.digest()
