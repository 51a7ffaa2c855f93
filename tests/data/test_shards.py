"""Tar shards: the layout, the order, hostile and damaged tars."""

import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from samples import HEIC, encoded, logged, photo, tar

from ssl_xcit.data import formats
from ssl_xcit.data.decode import decode
from ssl_xcit.data.order import Shards, image_at
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.shards import labelled_shards, tar_shards
from ssl_xcit.data.tar_listing import MAX_HEADER, list_tar
from ssl_xcit.errors import UserError


def png(value):
    return encoded(np.full((4, 4, 3), (value, 0, 0), np.uint8))


def reds(source):
    """What tells the images of `png` apart."""
    return [decode(source.read(i))[0, 0, 0] for i in range(len(source))]


def members(keys, **parts):
    ends = [(end.replace("_", "."), content) for end, content in parts.items()]
    return [(f"{key}.{end}", content) for key in keys for end, content in ends]


def write(path, start, count, labels=True):
    ends = [("png", png), ("cls", lambda i: str(i % 3).encode())][: 1 + labels]
    numbers = range(start, start + count)
    tar(path, [(f"{i:05d}.{end}", make(i)) for i in numbers for end, make in ends])
    return bytearray(path.read_bytes())


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
    assert reds(source) == list(range(13))
    assert decode(source.read(4))[0, 0, 0] == 4
    assert source.name(6) == f"{three_tars}/s-1.tar/00006"
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - as a spawned worker gets it
    assert again.read(6) == source.read(6)
    named = tar_shards([str(three_tars / "s-2.tar"), str(three_tars / "s-[01].tar")])
    assert decode(named.read(0))[0, 0, 0] == 12
    assert len(named) == 13


def test_the_listing_is_kept_until_a_tar_changes(three_tars, monkeypatch, cache):
    tar_shards(str(three_tars))
    monkeypatch.setattr("ssl_xcit.data.tar_listing.list_tar", lambda path: 1 / 0)
    source = tar_shards(str(three_tars))
    assert decode(source.read(9))[0, 0, 0] == 9
    write(three_tars / "s-2.tar", 12, 2)
    with pytest.raises(ZeroDivisionError):
        tar_shards(str(three_tars))


def test_the_webdataset_layout_in_its_corners(tmp_path):
    content = [
        ("a/", b"", {"type": tarfile.DIRTYPE}), ("a/1.cls", b"7\n"),
        ("a/1.depth.JPG", png(8)), ("a/1.jpg", png(1)),  # one image a key, and not the depth
        ("a/1.right.jpg", png(2)), ("a/1.json", b"{}"),
        ("b/1.png", png(3)),  # the same key in another folder
        ("c.txt", b"no image"), ("d" * 150 + ".png", png(4)),  # a long name
    ]  # fmt: skip
    tar(tmp_path / "x.tar", content, format=tarfile.PAX_FORMAT)
    listing = list_tar(str(tmp_path / "x.tar"))
    assert listing.keys == ["a/1", "b/1", "d" * 150]
    assert listing.labels == ["7", "", ""]
    source = tar_shards(str(tmp_path))
    assert source.labels is None  # not every image has one
    assert reds(source) == [1, 3, 4]


def test_a_hostile_tar_does_nothing(tmp_path, caplog):
    (tmp_path / "secret.png").write_bytes(png(99))
    link = {"linkname": str(tmp_path / "secret.png")}
    tar(tmp_path / "x.tar", [
        ("../../escape.png", png(1)),
        ("link.png", b"", {"type": tarfile.SYMTYPE, **link}),
        ("hard.png", b"", {"type": tarfile.LNKTYPE, **link}),
        ("device.png", b"", {"type": tarfile.CHRTYPE}),
        ("fifo.png", b"", {"type": tarfile.FIFOTYPE}),
        ("evil.pkl", pickle.dumps(os.system)),
        ("good.png", png(2)),
    ])  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert reds(tar_shards(str(tmp_path))) == [1, 2]
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent.parent / "escape.png").exists()
    assert "4 members are links, devices or too large" in caplog.text


def raw_header(name, size, kind=tarfile.REGTYPE):
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)


def test_a_header_that_claims_gigabytes(tmp_path, caplog):
    content = write(tmp_path / "x.tar", 0, 2)[: 2048 * 2]
    content += raw_header("x", 50 * MAX_HEADER, tarfile.XHDTYPE)
    (tmp_path / "x.tar").write_bytes(content)
    os.truncate(tmp_path / "x.tar", 60 * MAX_HEADER)
    assert len(tar_shards(str(tmp_path))) == 2
    assert "damaged after 2 images" in caplog.text


def test_sizes_below_zero_and_endless_headers(tmp_path, caplog):
    content = write(tmp_path / "x.tar", 0, 2, labels=False)
    for size in (-512, -1024, -(10**9)):
        content[2048:2560] = raw_header("evil.png", size)
        (tmp_path / "x.tar").write_bytes(content)
        caplog.clear()
        assert len(tar_shards(str(tmp_path))) == 2
        assert "damaged after 2 images" in caplog.text
    chain = (raw_header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"a" * 512) * 3000
    (tmp_path / "x.tar").write_bytes(content[:2048] + chain)
    assert len(tar_shards(str(tmp_path))) == 2


@pytest.mark.parametrize("damage", ["overwritten", "zeroed", "cut at", "cut in"])
def test_a_damaged_header_is_said_each_time(tmp_path, caplog, damage):
    content = write(tmp_path / "x.tar", 0, 30, labels=False)
    start = 10 * 1024  # a header and an image take 512 bytes each
    if damage.startswith("cut"):
        del content[start + (100 if damage == "cut in" else 0) :]
    else:
        content[start : start + 512] = (b"\xa5" if damage == "overwritten" else b"\0") * 512
    (tmp_path / "x.tar").write_bytes(content)
    for _ in range(2):  # the second time from the kept listing
        caplog.clear()
        assert len(tar_shards(str(tmp_path))) == 10
        assert "damaged after 10 images" in caplog.text


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


def test_settings(three_tars):
    assert tar_shards(None) is None
    assert labelled_shards(None) is None
    pair = labelled_shards(str(three_tars), test_fraction=0.3)
    assert len(pair.train) + len(pair.test) == 13


def test_many_tars_few_open_files(tmp_path):
    for i in range(80):
        write(tmp_path / f"{i:03d}.tar", i, 1)
    source = tar_shards(str(tmp_path))
    assert reds(source) == list(range(80))
    assert decode(source.read(0))[0, 0, 0] == 0
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
    parts = [("jpg", lambda i: photo(i, kind="JPEG")), ("cls", lambda i: str(i % 3).encode())]
    scans = [(f"scan.2023.{i:02d}.{end}", make(i)) for i in range(30) for end, make in parts]
    tar(tmp_path / "0.tar", scans)
    source = tar_shards(str(tmp_path))
    assert len(source) == 30
    assert source.labels.tolist() == [i % 3 for i in range(30)]
    assert source.name(7).endswith("0.tar/scan.2023.07")
    assert source.read(7) == photo(7, kind="JPEG")


def test_what_belongs_to_a_sample_is_said_to_be_left_out(tmp_path, caplog):
    tar(tmp_path / "0.tar", [
        ("a.jpg", photo(1)), ("a.depth.png", photo(2)), ("a.cls", b"cat"),
        ("b.jpg", photo(3)), ("b.png", photo(4)), ("b.cls", b"dog "),
        ("sub.v1/a.jpg", photo(5)), ("sub.v1/a.cls", b"cat"),
        ("./A.jpg", photo(6)), ("A.cls", b"dog"),
        ("c.jpg", photo(7)), ("c.jpg", photo(8)), ("c.cls", b"cat"), ("c.json", b"{}"),
        ("._a.jpg", b"of a Mac"), ("d", photo(9)), ("d.cls", b"cat"),
    ])  # fmt: skip
    source = tar_shards(str(tmp_path))
    names = [source.name(i).partition(".tar/")[2] for i in range(len(source))]
    assert names == ["a", "b", "sub.v1/a", "A", "c", "d"]
    assert source.read(4) == photo(8)  # the last of one name, as when a tar is unpacked
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 0]
    words = " ".join(logged(caplog))
    for part in (
        "2 images lie beside another of the same key and are left out", "1 .jpg file (hidden)",
        "a.depth.png beside a.jpg", "1 images are there twice under one name", "1 .json file",
    ):  # fmt: skip
        assert part in words


def test_two_views_a_sample_are_two_images_with_its_label(tmp_path):
    tar(tmp_path / "0.tar", members("ab", left_jpg=photo(1), right_jpg=photo(2), cls=b"4"))
    source = tar_shards(str(tmp_path))
    assert len(source) == 4
    assert source.labels.tolist() == [4] * 4


def test_labels_that_some_images_of_shards_lack_are_said(tmp_path, caplog):
    tar(tmp_path / "0.tar", [("a.jpg", photo(1)), ("a.cls", b"1"), ("b.jpg", photo(2))])
    assert tar_shards(str(tmp_path)).labels is None
    assert "1 images have no .cls, so none has a label" in logged(caplog)[0]


def test_class_names_of_shards_are_shared_with_the_test_set(tmp_path):
    for name, (one, two) in (("train", "ab"), ("test", "cb")):
        first = members("01", jpg=photo(0), cls=one.encode())
        tar(tmp_path / name / "0.tar", first + members("2", jpg=photo(1), cls=two.encode()))
    pair = labelled_shards(str(tmp_path / "train"), str(tmp_path / "test"))
    assert pair.test.class_names == ("a", "b", "c")
    assert pair.test.labels.tolist() == [2, 2, 1]


def by_id(folder, ids, names=None):
    """A tar of class ids, and the index with their names as versions before wrote both."""
    tar(folder / "0.tar", [m for i in ids for m in members([str(i)], jpg=photo(i), cls=b"%d" % i)])
    if names is not None:
        index = {"class_names": names, "shards": [{"file": "0.tar"}]}
        (folder / "shards.json").write_text(json.dumps(index))
    return str(folder)


def test_class_ids_mean_the_names_in_the_index_beside_them(tmp_path):
    train = by_id(tmp_path / "train", [0, 1, 2], ["a", "b", "c"])
    pair = labelled_shards(train, by_id(tmp_path / "test", [0, 1], ["a", "c"]))
    assert pair.train.labels.tolist() == [0, 1, 2]
    assert pair.test.labels.tolist() == [0, 2]
    assert pair.test.class_names == ("a", "b", "c")
    both = tar_shards([str(tmp_path / "test"), train])
    assert both.labels.tolist() == [0, 1, 0, 2, 1]
    assert both.class_names == ("a", "c", "b")
    numbers = by_id(tmp_path / "numbers", [0, 1, 2], ["3", "7", "9"])
    fewer = by_id(tmp_path / "fewer", [0, 1], ["3", "9"])
    assert labelled_shards(numbers, fewer).test.labels.tolist() == [0, 2]
    same = by_id(tmp_path / "same", [1, 0, 2], ["crane", "owl", "crane"])  # as ImageNet has it
    assert labelled_shards(same, same).test.labels.tolist() == [1, 0, 2]
    for other in ({"shards": [{"file": "0.tar"}]}, {"class_names": ["a"], "shards": []}, []):
        (tmp_path / "same/shards.json").write_text(json.dumps(other))
        assert tar_shards(same).labels.tolist() == [1, 0, 2]


def test_ids_that_cannot_be_compared_with_names_are_an_error(tmp_path):
    named = by_id(tmp_path / "named", [0, 1, 2], ["a", "b", "c"])
    ids, fewer = by_id(tmp_path / "ids", [0, 1, 2]), by_id(tmp_path / "fewer", [0, 2])
    assert labelled_shards(ids, fewer).test.labels.tolist() == [0, 2]
    for train, test, kinds in (
        (named, fewer, r"\(0, 2\) is one of the training images' \(a, b, c\)"),
        (fewer, named, r"\(a, b, c\) is one of the training images' \(0, 1, 2\)"),
    ):
        with pytest.raises(UserError, match=f"none of its classes {kinds}.* shards.json"):
            labelled_shards(train, test)


def test_numbers_as_names_are_not_compared_with_ids_that_have_none(tmp_path):
    """Folders 1 to 12, whose index was copied with one of the two sets only."""
    numbers = [str(i + 1) for i in range(12)]
    named = by_id(tmp_path / "named", range(12), numbers)
    fewer = by_id(tmp_path / "fewer", [0, 1], ["2", "12"])
    bare = by_id(tmp_path / "bare", range(12))
    for pair, key in (((named, bare), "test_root"), ((bare, named), "root")):
        with pytest.raises(UserError, match=rf"eval_data\.{key}=\S+bare: .*copy the one that"):
            labelled_shards(*pair)
    assert labelled_shards(named, fewer).test.labels.tolist() == [1, 11]
    plain = by_id(tmp_path / "plain", range(12), [str(i) for i in range(12)])
    gaps = by_id(tmp_path / "gaps", [0, 1], ["3", "7"])
    assert labelled_shards(plain, gaps).test.labels.tolist() == [3, 7]
    for train, test in ((plain, bare), (bare, plain), (bare, bare)):
        assert labelled_shards(train, test).test.labels.tolist() == list(range(12))


def test_ids_and_names_of_several_folders_are_one_class(tmp_path, caplog):
    ids = by_id(tmp_path / "ids", [0, 1, 2], ["a", "b", "c"])
    bare = by_id(tmp_path / "bare", [0, 1])
    words = [
        m for i, name in enumerate("bd") for m in members(str(i), jpg=photo(i), cls=name.encode())
    ]
    tar(tmp_path / "words/0.tar", words)
    source = tar_shards([ids, str(tmp_path / "words")])
    assert source.class_names == ("a", "b", "c", "d")
    assert source.labels.tolist() == [0, 1, 2, 1, 3]
    for other in (ids, str(tmp_path / "words")):
        message = f"the classes of {bare} are ids without names, those of {other}.* copy the shards"
        with pytest.raises(UserError, match=message):
            labelled_shards([other, bare])
        assert tar_shards([other, bare]).labels is None  # which pretraining does not need
        assert "labels are left out: data.root=" in logged(caplog)[-1]
    tar(tmp_path / "letters/0.tar", members("12", jpg=photo(0), cls=b"7"))
    tar(tmp_path / "letters/1.tar", members("12", jpg=photo(0), cls=b"x"))
    assert tar_shards(str(tmp_path / "letters")).class_names == ("7", "x")  # of one folder


def test_a_tar_whose_images_have_no_ending_or_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "readable_formats", lambda: formats.FORMATS)
    tar(tmp_path / "0.tar", [("x/1", photo(1)), ("x/2.jfif", photo(2)), ("x/3.HEIC", HEIC)])
    assert list_tar(str(tmp_path / "0.tar")).keys == ["x/1", "x/2"]
    tar(tmp_path / "b/0.tar", [("1.HEIC", HEIC), ("2.mp4", b"film")])
    with pytest.raises(FileNotFoundError, match=r"left out: 1 \.HEIC file"):
        tar_shards(str(tmp_path / "b"))


def test_one_sample_without_its_image_leaves_the_others_as_they_are(tmp_path, caplog):
    image = photo(0)
    five = members("01234", jpg=image, depth_png=image, seg_png=image, cls=b"1")
    tar(tmp_path / "0.tar", [member for member in five if member[0] != "3.jpg"])
    assert len(tar_shards(str(tmp_path))) == 5
    assert "9 images lie beside another" in " ".join(logged(caplog))
    tar(tmp_path / "b/0.tar", [(f"x.{i}.png", photo(i)) for i in range(3)])
    assert len(tar_shards(str(tmp_path / "b"))) == 3
    assert "keys end at the last dot, such as x.0" in logged(caplog)[-1]
