"""Folders: any tree, or a folder a class; which files are images; listings that are cached."""

import re
import shutil
import unicodedata

import numpy as np
import pytest
from samples import HEIC, classes, logged, photo, put, put_all

from ssl_xcit.data import folders, formats
from ssl_xcit.data.decode import decode
from ssl_xcit.data.folders import class_folders, folder, image_files, labelled_folders
from ssl_xcit.data.formats import image_format
from ssl_xcit.utils.files import default_cache


@pytest.fixture
def listings_are_kept(monkeypatch):
    """However small a folder is, and however lately it was changed."""
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 1)
    monkeypatch.setattr("ssl_xcit.data.folders.SETTLED", 0)


def put_run(root):
    for name in ("config.yaml", "run.json", "images.npz"):
        put(root / name, b"{}")


def test_any_tree_of_several_roots(tmp_path):
    put_all(tmp_path, ("a/1.png", "a/deep/er/2.JPG", "b/3.webp", "b/.hidden.png", "b/.cache/4.png"))
    put(tmp_path / "a/notes.txt", b"no image")
    roots = [str(tmp_path / "b"), str(tmp_path / "a")]
    source = folder(roots)
    names = [f"{roots[0]}/3.webp", f"{roots[1]}/1.png", f"{roots[1]}/deep/er/2.JPG"]
    assert [source.name(i) for i in range(len(source))] == names
    assert source.labels is None


def test_classes_are_first_level_folders_and_shared_between_sets(tmp_path):
    put_all(tmp_path, ("train/cat/1.png", "train/dog/x/2.png", "test/dog/3.png", "test/newt/4.png"))
    pair = labelled_folders(str(tmp_path / "train"), str(tmp_path / "test"))
    assert pair.train.labels.tolist() == [0, 1]
    assert pair.test.labels.tolist() == [1, 2]
    assert pair.test.class_names == ("cat", "dog", "newt")


def test_a_share_of_each_class_is_held_out(tmp_path):
    put_all(tmp_path, [f"{name}/{i}.png" for name in "ab" for i in range(10)] + ["single/0.png"])
    pair = labelled_folders(str(tmp_path), test_fraction=0.3)
    assert np.bincount(pair.test.labels, minlength=3).tolist() == [3, 3, 0]
    names = [[s.name(i) for i in range(len(s))] for s in (pair.train, pair.test)]
    assert not set(names[0]) & set(names[1])
    assert len(names[0]) + len(names[1]) == 21
    again = labelled_folders(str(tmp_path), test_fraction=0.3)
    assert again.test.indices.tolist() == pair.test.indices.tolist()
    assert labelled_folders(None) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: folder(str(p / "empty")), "no images in it or below (no files)"),
        (lambda p: folder(str(p / "text")), "no images in it or below (left out: 1 .txt file)"),
        (lambda p: class_folders(p / "flat"), "2 images lie in it, outside class folders"),
        (lambda p: class_folders(p / "one"), "one class only (a)"),
        (lambda p: labelled_folders(None, str(p)), "without eval_data.root"),
    ],
)
def test_bad_input_names_the_fix(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "text/a.txt", b"")
    put_all(tmp_path, ("flat/1.png", "flat/2.png", "one/a/1.png"))
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
        make(tmp_path)


def test_a_large_listing_is_kept_until_a_folder_changes(tmp_path, monkeypatch, listings_are_kept):
    put_all(tmp_path, ("a/1.png", "a/2.png", "b/c/3.png"))
    first = list(image_files(tmp_path))
    assert first == ["a/1.png", "a/2.png", "b/c/3.png"]
    counted = []
    whole = folders.scan
    monkeypatch.setattr("ssl_xcit.data.folders.scan", lambda *r: counted.append(r) or whole(*r))
    assert list(image_files(tmp_path)) == first
    assert not counted
    for change in (
        lambda: put(tmp_path / "b/c/4.png"),
        lambda: (tmp_path / "a/1.png").unlink(),
        lambda: put(tmp_path / "d/5.png"),
        lambda: shutil.rmtree(tmp_path / "b"),
    ):
        change()
        counted.clear()
        now = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
        assert list(image_files(tmp_path)) == now
        assert counted
    kept = next((default_cache() / "folders").iterdir())
    for damaged in (kept.read_bytes()[:200], b"", b"no zip"):
        kept.write_bytes(damaged)
        assert len(image_files(tmp_path)) == 2


def test_a_listing_is_not_trusted_within_the_clocks_grain(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 1)
    put(tmp_path / "1.png")
    for i in range(2, 6):
        image_files(tmp_path)
        put(tmp_path / f"{i}.png")  # perhaps in the same tick
        assert len(image_files(tmp_path)) == i


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "a/1.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "2.png").symlink_to(tmp_path / "a/1.png")
    assert list(image_files(tmp_path)) == ["2.png", "a/1.png"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert set(image_files(tmp_path)) >= {"2.png", "a/1.png"}


def test_images_are_told_by_their_first_bytes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(formats, "readable_formats", lambda: formats.FORMATS)
    for kind, names in {
        "PNG": "a.PNG", "TIFF": "c.tif8 i.gtiff raw.CR2", "BMP": "g.x j.dib", "JPEG2000": "h",
        "JPEG": "web0.jfif web1.jfif web2.jfif plain0 plain1 plain2 b.jpe d.jpg_large",
        "WEBP": "e.download", "GIF": "f.2023-07-01",
    }.items():  # fmt: skip
        for name in names.split():
            put(tmp_path / "x" / name, photo(9, kind=kind))
    for name in ("IMG_0.HEIC", "IMG_1.HEIC", "IMG_2.HEIC"):
        put(tmp_path / "x" / name, HEIC)
    put(tmp_path / "x/notes.txt", b"BM is not a picture"), put(tmp_path / "x/empty", b"")
    put(tmp_path / "x/README", b"BMW and other cars, in a text that has no ending")
    source = folder(str(tmp_path))
    assert len(source) == 7 + 9
    for i in range(len(source)):
        assert decode(source.read(i)).shape == (12, 12, 3)
    assert logged(caplog) == [
        f"{tmp_path}: left out: 3 .HEIC files (they need pillow-heif: pip install "
        "'ssl-xcit[heic]'), 2 files without a known ending, 1 .CR2 file (camera raw, to be "
        "developed to TIFF or JPEG first), 1 .txt file"
    ]
    caplog.clear()
    folder(str(tmp_path))  # is said once
    assert not logged(caplog)


def test_a_kept_listing_says_what_is_left_out(tmp_path, caplog, monkeypatch, listings_are_kept):
    put(tmp_path / "a.png"), put(tmp_path / "b.mp4", b"film")
    image_files(tmp_path)
    folders.warned.clear()
    monkeypatch.setattr("ssl_xcit.data.folders.scan", None)
    assert list(image_files(tmp_path)) == ["a.png"]
    assert logged(caplog) == [f"{tmp_path}: left out: 1 .mp4 file"] * 2


def test_first_bytes():
    film = b"\0\0\0\x18ftypisom\0\0\0\0isommp42"
    for head, known in (
        (photo(0, kind="AVIF")[:32], "AVIF"), (HEIC[:32], "HEIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"), (film, None), (b"BM", None), (b"", None),
    ):  # fmt: skip
        assert image_format(head) == known


@pytest.mark.parametrize(
    ("train", "test"), [("train", "val"), ("Training", "Validation"), ("train", "test")]
)
def test_a_training_and_a_test_folder_are_no_classes(tmp_path, caplog, train, test):
    classes(tmp_path / train, ["ant", "bee", "cat"], 4)
    classes(tmp_path / test, ["ant", "bee", "cat"], 2, seed=50)
    pair = labelled_folders(str(tmp_path))
    assert pair.train.class_names == pair.test.class_names == ("ant", "bee", "cat")
    assert (len(pair.train), len(pair.test)) == (12, 6)
    assert f"{test} the test images" in logged(caplog)[0]
    for make in (lambda: class_folders(tmp_path), lambda: labelled_folders(str(tmp_path), "x"),
                 lambda: folder(str(tmp_path), labels=True)):  # fmt: skip
        with pytest.raises(ValueError, match="which are no classes: name one of them"):
            make()
    caplog.clear()
    assert len(folder(str(tmp_path))) == 18
    assert f"root={tmp_path / train} takes the training images alone" in logged(caplog)[0]


def test_of_two_test_folders_one_is_used_and_classes_that_are_called_so_stay(tmp_path, caplog):
    for part in ("train", "val", "test"):
        classes(tmp_path / "a" / part, ["x", "y"], 2)
    assert labelled_folders(str(tmp_path / "a")).test.root.endswith("test")
    assert "val is not used" in logged(caplog)[0]
    classes(tmp_path / "b", ["train", "bus", "test"], 2)  # a vehicle, and an exam
    assert class_folders(tmp_path / "b").class_names == ("bus", "test", "train")


def test_class_names_that_look_alike_are_one_class(tmp_path, caplog):
    names = ["caf\u00e9", "na\u00efve", "plain"]
    classes(tmp_path / "nfc", [unicodedata.normalize("NFC", n) for n in names], 2)
    classes(tmp_path / "nfd", [unicodedata.normalize("NFD", n) for n in names], 2, seed=50)
    pair = labelled_folders(str(tmp_path / "nfc"), str(tmp_path / "nfd"))
    assert pair.train.class_names == pair.test.class_names == tuple(names)
    assert sorted(pair.test.labels) == [0, 0, 1, 1, 2, 2]
    assert not logged(caplog)
    classes(tmp_path / "spaces", ["ant", "ant ", "Bee", "bee"], 1)
    source = class_folders(tmp_path / "spaces")
    assert source.class_names == ("Bee", "ant", "bee")
    assert [decode(source.read(i)).shape for i in range(4)] == [(12, 12, 3)] * 4
    assert logged(caplog) == [
        "the labels 'ant' and 'ant ' are one class",
        "the labels 'Bee' and 'bee' are two classes: only capitals differ",
    ]


def test_own_folders_are_not_looked_into(tmp_path, caplog, monkeypatch):
    put(tmp_path / "a.png"), put(tmp_path / "cats/run.json", b"{}"), put(tmp_path / "cats/b.png")
    put(tmp_path / "cats/config.yaml", b"")  # of a data set, and no run's
    put_run(tmp_path / "runs/x"), put(tmp_path / "venv/pyvenv.cfg", b"")
    own = ("runs/x/pictures/1.png", "venv/lib/1.png", "out/1.png", "cache/ssl_xcit/1.png")
    put_all(tmp_path, own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert list(image_files(".", out="out")) == ["a.png", "cats/b.png"]
    assert "4 folders of runs, results or caches, such as " in logged(caplog)[0]
    put_run(tmp_path)
    assert "a.png" in list(image_files("."))  # what is asked for by name is looked into
    assert list(image_files("cats", out=".")) == ["b.png"]  # the results lie above


def test_a_split_beside_other_folders(tmp_path, caplog):
    for part in ("train", "val"):
        classes(tmp_path / part, ["a", "b"], 3)
    put(tmp_path / "annotations/train.json", b"{}"), put(tmp_path / "masks/1.png")
    put_run(tmp_path / "runs/x"), put(tmp_path / "runs/x/1.png")
    pair = labelled_folders(str(tmp_path))
    assert pair.train.class_names == ("a", "b")
    assert (len(pair.train), len(pair.test)) == (6, 6)
    put_all(tmp_path, (f"test/{i}.png" for i in range(3)))  # no labels, as of a competition
    assert labelled_folders(str(tmp_path)).test.root.endswith("val")


def test_a_listing_is_made_again_when_more_can_be_read(tmp_path, monkeypatch, listings_are_kept):
    put(tmp_path / "a.png"), put(tmp_path / "b.heic", HEIC)
    for readable, count in ((formats.FORMATS, 1), ((*formats.FORMATS, "HEIF"), 2)):
        for module in ("formats", "folders"):
            monkeypatch.setattr(f"ssl_xcit.data.{module}.readable_formats", lambda r=readable: r)
        assert len(image_files(tmp_path)) == count
    put(tmp_path / "c", b"")  # being copied
    assert len(image_files(tmp_path)) == 2
    put(tmp_path / "c")
    assert len(image_files(tmp_path)) == 3
