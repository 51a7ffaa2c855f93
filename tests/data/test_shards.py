"""Tar shards: the layout, the order, hostile and damaged tars."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

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
def folder(tmp_path):
    write(tmp_path / "s-0.tar", 0, 5)
    write(tmp_path / "s-1.tar", 5, 7)
    write(tmp_path / "s-2.tar", 12, 1)
    return tmp_path


def test_images_labels_and_names(folder):
    source = tar_shards(str(folder), window=4)
    assert len(source) == 13
    assert source.labels.tolist() == [i % 3 for i in range(13)]
    assert source.class_names == ("0", "1", "2")
    for i in (12, 0, 7, 4, 5):
        assert decode(source.read(i))[0, 0, 0] == i
    assert source.name(6) == f"{folder}/s-1.tar/00006"
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - as a spawned worker gets it
    assert again.read(6) == source.read(6)
    named = tar_shards([str(folder / "s-2.tar"), str(folder / "s-[01].tar")])
    assert decode(named.read(0))[0, 0, 0] == 12
    assert len(named) == 13


def test_the_listing_is_kept_until_a_tar_changes(folder, monkeypatch, cache):
    tar_shards(str(folder))
    monkeypatch.setattr("ssl_xcit.data.shards.list_tar", lambda path: 1 / 0)
    source = tar_shards(str(folder))
    assert decode(source.read(9))[0, 0, 0] == 9
    write(folder / "s-2.tar", 12, 2)
    with pytest.raises(ZeroDivisionError):
        tar_shards(str(folder))


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
    found = list_tar(str(tmp_path / "x.tar"))
    assert found.keys == ["a/1", "b/1", "d" * 150]
    assert found.labels == ["7", "", ""]
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


@pytest.mark.parametrize("how", ["overwritten", "zeroed", "cut at", "cut in"])
def test_a_damaged_header_is_said_each_time(tmp_path, caplog, how):
    write(tmp_path / "x.tar", 0, 30, labels=False)
    content = bytearray((tmp_path / "x.tar").read_bytes())
    start = 10 * 1024  # a header and an image take 512 bytes each
    if how == "overwritten":
        content[start : start + 512] = b"\xa5" * 512
    elif how == "zeroed":
        content[start : start + 512] = bytes(512)
    else:
        del content[start + (100 if how == "cut in" else 0) :]
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


def test_truncated_tars_keep_their_whole_images(folder, caplog):
    path = folder / "s-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: 2048 * 4 + 600])
    source = tar_shards(str(folder))
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


def test_bad_settings(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no tar shards"):
        tar_shards(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="window=0"):
        tar_shards(str(folder), window=0)
    assert tar_shards(None) is None
    assert labelled_shards(None) is None
    pair = labelled_shards(str(folder), test_fraction=0.3)
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
