"""Tar shards: the layout, the order, hostile and damaged tars."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from samples import HEIC, logged, photo, tar

from ssl_xcit.data import formats
from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.order import Shards, image_at
from ssl_xcit.data.shards import MAX_HEADER, labelled_shards, list_tar, tar_shards


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def write(path, start, count, labels=True, suffix="png"):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + count):
            add(tar, f"{i:05d}.{suffix}", png(i))
            if labels:
                add(tar, f"{i:05d}.cls", str(i % 3).encode())


@pytest.fixture
def three_tars(tmp_path):
    write(tmp_path / "s-0.tar", 0, 5)
    write(tmp_path / "s-1.tar", 5, 7)
    write(tmp_path / "s-2.tar", 12, 1)
    return tmp_path


def test_images_labels_and_names(three_tars):
    source = tar_shards(str(three_tars), window=4)
    assert len(source) == 13
    assert source.labels.tolist() == [i % 3 for i in range(13)]
    assert source.class_names == ("0", "1", "2")
    for i in (12, 0, 7, 4, 5):
        assert decode(source.read(i))[0, 0, 0] == i
    assert source.name(6) == f"{three_tars}/s-1.tar/00006"
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - as a spawned worker gets it
    assert again.read(6) == source.read(6)
    named = tar_shards([str(three_tars / "s-2.tar"), str(three_tars / "s-[01].tar")])
    assert decode(named.read(0))[0, 0, 0] == 12
    assert len(named) == 13


def test_the_listing_is_kept_until_a_tar_changes(three_tars, monkeypatch, cache):
    tar_shards(str(three_tars))
    monkeypatch.setattr("ssl_xcit.data.shards.list_tar", lambda path: 1 / 0)
    source = tar_shards(str(three_tars))
    assert decode(source.read(9))[0, 0, 0] == 9
    write(three_tars / "s-2.tar", 12, 2)
    with pytest.raises(ZeroDivisionError):
        tar_shards(str(three_tars))


def test_the_webdataset_layout_in_its_corners(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a/", type=tarfile.DIRTYPE)
        add(tar, "a/1.cls", b"7\n")
        add(tar, "a/1.depth.JPG", png(8))
        add(tar, "a/1.jpg", png(1))  # one image a key, and not the depth
        add(tar, "a/1.right.jpg", png(2))
        add(tar, "a/1.json", b"{}")
        add(tar, "b/1.png", png(3))  # the same key in another folder
        add(tar, "c.txt", b"no image")
        add(tar, "d" * 150 + ".png", png(4))  # a long name
    listing = list_tar(str(tmp_path / "x.tar"))
    assert listing.keys == ["a/1", "b/1", "d" * 150]
    assert listing.labels == ["7", "", ""]
    source = tar_shards(str(tmp_path))
    assert source.labels is None  # not every image has one
    assert [decode(source.read(i))[0, 0, 0] for i in range(3)] == [1, 3, 4]


def test_a_hostile_tar_does_nothing(tmp_path, caplog):
    (tmp_path / "secret.png").write_bytes(png(99))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "../../escape.png", png(1))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png"))
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname=str(tmp_path / "secret.png"))
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "fifo.png", type=tarfile.FIFOTYPE)
        add(tar, "evil.pkl", pickle.dumps(os.system))
        add(tar, "good.png", png(2))
    before = sorted(tmp_path.rglob("*"))
    source = tar_shards(str(tmp_path))
    assert [decode(source.read(i))[0, 0, 0] for i in range(len(source))] == [1, 2]
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent.parent / "escape.png").exists()
    assert "4 members are links, devices or too large" in caplog.text


def test_a_header_that_claims_gigabytes(tmp_path, caplog):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 50 * MAX_HEADER
    with open(tmp_path / "x.tar", "wb") as file:
        write(tmp_path / "y.tar", 0, 2)
        file.write((tmp_path / "y.tar").read_bytes()[: 2048 * 2])
        file.write(header.tobuf())
        file.truncate(60 * MAX_HEADER)
    (tmp_path / "y.tar").unlink()
    source = tar_shards(str(tmp_path))
    assert len(source) == 2
    assert "damaged after 2 images" in caplog.text


@pytest.mark.parametrize("damage", ["overwritten", "zeroed", "cut at", "cut in"])
def test_a_damaged_header_is_said_each_time(tmp_path, caplog, damage):
    write(tmp_path / "x.tar", 0, 30, labels=False)
    content = bytearray((tmp_path / "x.tar").read_bytes())
    start = 10 * 1024  # a header and an image take 512 bytes each
    if damage == "overwritten":
        content[start : start + 512] = b"\xa5" * 512
    elif damage == "zeroed":
        content[start : start + 512] = bytes(512)
    else:
        del content[start + (100 if damage == "cut in" else 0) :]
    (tmp_path / "x.tar").write_bytes(content)
    for _ in range(2):  # the second time from the kept listing
        caplog.clear()
        assert len(tar_shards(str(tmp_path))) == 10
        assert "damaged after 10 images" in caplog.text


def test_sizes_below_zero_and_endless_headers(tmp_path, caplog):
    write(tmp_path / "x.tar", 0, 2, labels=False)
    content = bytearray((tmp_path / "x.tar").read_bytes())
    header = tarfile.TarInfo("evil.png")
    for size in (-512, -1024, -(10**9)):
        header.size = size
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        content[2048:2560] = block
        (tmp_path / "x.tar").write_bytes(content)
        assert len(tar_shards(str(tmp_path))) == 2
        assert "damaged after 2 images" in caplog.text
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 512
    chain = (long.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 3000
    (tmp_path / "x.tar").write_bytes(bytes(content[:2048]) + chain)
    assert len(tar_shards(str(tmp_path))) == 2


def test_truncated_tars_keep_their_whole_images(three_tars, caplog):
    path = three_tars / "s-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: 2048 * 4 + 600])
    source = tar_shards(str(three_tars))
    assert 5 + 3 <= len(source) < 13
    assert "s-1.tar: damaged after" in caplog.text
    assert decode(source.read(len(source) - 1))[0, 0, 0] == 12
    with path.open("r+b") as file:  # and one that loses bytes after it was listed
        file.truncate(2048)
    with pytest.raises(BadImage, match="the tar ends within it: 0 of"):
        source.read(7)
    path.unlink()
    with pytest.raises(BadImage, match="FileNotFoundError"):
        pickle.loads(pickle.dumps(source)).read(7)  # noqa: S301


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00rest", r"compressed \(gzip\).*unpack it once"),
        (b"<html>" * 200, "not a tar"),
        (b"", "no images in 1 tars"),
        (bytes(10_240), "no images in 1 tars"),
    ],
)
def test_what_is_no_tar_is_said(tmp_path, content, message):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tar_shards(str(tmp_path))


def test_settings(tmp_path, three_tars):
    with pytest.raises(FileNotFoundError, match="no tar shards"):
        tar_shards(str(tmp_path / "none"))
    assert tar_shards(None) is None
    assert labelled_shards(None) is None
    pair = labelled_shards(str(three_tars), test_fraction=0.3)
    assert len(pair.train) + len(pair.test) == 13


def test_many_tars_few_open_files(tmp_path):
    for i in range(80):
        write(tmp_path / f"{i:03d}.tar", i, 1)
    source = tar_shards(str(tmp_path))
    for i in [*range(80), 0, 79]:
        assert decode(source.read(i))[0, 0, 0] == i
    assert len(source.open_files) == 64


@pytest.mark.parametrize("window", [1, 3, 10, 1000])
def test_every_pass_sees_every_image_once_and_few_tars_at_a_time(window):
    sizes = np.array([4, 1, 7, 3, 10])
    shards, count, first = Shards(sizes, window), int(sizes.sum()), np.r_[0, sizes.cumsum()]
    orders = []
    for pass_index in range(3):
        order = [image_at(5, pass_index * count + i, count, shards) for i in range(count)]
        assert sorted(order) == list(range(count))
        orders.append(tuple(order))
        of_shard = np.searchsorted(first, order, side="right")
        for start in range(0, count, window):  # a window touches as few tars as it can hold
            touched = set(of_shard[start : start + window])
            assert len(touched) <= 1 + max(window - 1, 1)
        if window == 1:
            assert len(np.flatnonzero(np.diff(of_shard))) == len(sizes) - 1  # one tar by another
    assert len(set(orders)) == 3
    assert [image_at(5, i, count, shards) for i in range(count)] == list(orders[0])


def test_dots_in_the_names_of_a_tar_are_thirty_images(tmp_path):
    members = []
    for i in range(30):
        members += [(f"scan.2023.{i:02d}.jpg", photo(i, kind="JPEG"))]
        members += [(f"scan.2023.{i:02d}.cls", str(i % 3).encode())]
    tar(tmp_path / "0.tar", members)
    source = tar_shards(str(tmp_path))
    assert len(source) == 30
    assert source.labels.tolist() == [i % 3 for i in range(30)]
    assert source.name(7).endswith("0.tar/scan.2023.07")
    assert source.read(7) == photo(7, kind="JPEG")


def test_what_belongs_to_a_sample_is_said_to_be_left_out(tmp_path, caplog):
    members = [
        ("a.jpg", photo(1)), ("a.depth.png", photo(2)), ("a.cls", b"cat"),
        ("b.jpg", photo(3)), ("b.png", photo(4)), ("b.cls", b"dog "),
        ("sub.v1/a.jpg", photo(5)), ("sub.v1/a.cls", b"cat"),
        ("./A.jpg", photo(6)), ("A.cls", b"dog"),
        ("c.jpg", photo(7)), ("c.jpg", photo(8)), ("c.cls", b"cat"), ("c.json", b"{}"),
        ("._a.jpg", b"of a Mac"), ("d", photo(9)), ("d.cls", b"cat"),
    ]  # fmt: skip
    tar(tmp_path / "0.tar", members)
    source = tar_shards(str(tmp_path))
    names = [source.name(i).partition(".tar/")[2] for i in range(len(source))]
    assert names == ["a", "b", "sub.v1/a", "A", "c", "d"]
    assert source.read(4) == photo(8)  # the last of one name, as when a tar is unpacked
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 0]
    words = " ".join(logged(caplog))
    assert "2 images lie beside another of the same key and are left out" in words
    assert "a.depth.png beside a.jpg" in words
    assert "1 images are there twice under one name" in words
    assert "1 .json file" in words
    assert "1 .jpg file (hidden)" in words


def test_two_views_a_sample_are_two_images_with_its_label(tmp_path):
    tar(tmp_path / "0.tar", [
        (f"{key}.{part}", content)
        for key in "ab"
        for part, content in (("left.jpg", photo(1)), ("right.jpg", photo(2)), ("cls", b"4"))
    ])  # fmt: skip
    source = tar_shards(str(tmp_path))
    assert len(source) == 4
    assert source.labels.tolist() == [4] * 4


def test_labels_that_some_images_of_shards_lack_are_said(tmp_path, caplog):
    tar(tmp_path / "0.tar", [("a.jpg", photo(1)), ("a.cls", b"1"), ("b.jpg", photo(2))])
    assert tar_shards(str(tmp_path)).labels is None
    assert "1 images have no .cls, so none has a label" in logged(caplog)[0]


def test_class_names_of_shards_are_shared_with_the_test_set(tmp_path):
    for name, labels in (("train", "ab"), ("test", "cb")):
        tar(tmp_path / name / "0.tar", [
            (f"{i}{word}.{end}", content)
            for i in range(2) for word in labels
            for end, content in (("jpg", photo(i)), ("cls", word.encode()))
        ])  # fmt: skip
    pair = labelled_shards(str(tmp_path / "train"), str(tmp_path / "test"))
    assert pair.test.class_names == ("a", "b", "c")
    assert pair.test.labels.tolist() == [2, 1, 2, 1]


def test_a_tar_whose_images_have_no_ending_or_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "readable_formats", lambda: formats.FORMATS)
    tar(tmp_path / "0.tar", [("x/1", photo(1)), ("x/2.jfif", photo(2)), ("x/3.HEIC", HEIC)])
    assert list_tar(str(tmp_path / "0.tar")).keys == ["x/1", "x/2"]
    tar(tmp_path / "b/0.tar", [("1.HEIC", HEIC), ("2.mp4", b"film")])
    with pytest.raises(FileNotFoundError, match=r"left out: 1 \.HEIC file"):
        tar_shards(str(tmp_path / "b"))


def test_one_sample_without_its_image_leaves_the_others_as_they_are(tmp_path, caplog):
    members = [
        (f"{i}.{part}", photo(i) if part != "cls" else b"1")
        for i in range(5) for part in ("jpg", "depth.png", "seg.png", "cls")
        if (i, part) != (3, "jpg")
    ]  # fmt: skip
    tar(tmp_path / "0.tar", members)
    assert len(tar_shards(str(tmp_path))) == 5
    assert "9 images lie beside another" in " ".join(logged(caplog))
    tar(tmp_path / "b/0.tar", [(f"x.{i}.png", photo(i)) for i in range(3)])
    assert len(tar_shards(str(tmp_path / "b"))) == 3
    assert "keys end at the last dot, such as x.0" in logged(caplog)[-1]
