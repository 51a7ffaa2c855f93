"""Files, lists and arrays as people have them: each gives the right images and labels, or a line
that says what is wrong; nothing is dropped without a word.
"""

import io
import re
import tarfile
import unicodedata
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl_xcit.data import folders, formats
from ssl_xcit.data.decode import BadImage, Deep, dark_images, decode, open_picture
from ssl_xcit.data.folders import class_folders, folder, image_files, labelled_folders
from ssl_xcit.data.formats import image_format
from ssl_xcit.data.lists import labelled_lists, path_list
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sets import arrays, labelled_arrays, labelled_huggingface
from ssl_xcit.data.shards import labelled_shards, list_tar, tar_shards

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(folders, "said", set())


def photo(seed, size=12, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def put(path, content=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(seed) if content is None else content)


def classes(root, names, count, seed=0):
    for c, name in enumerate(names):
        for i in range(count):
            put(root / name / f"{i}.png", seed=seed + 100 * c + i)


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# Files without a known ending


def test_images_are_told_by_their_first_bytes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(formats, "readable_formats", lambda: formats.FORMATS)
    put(tmp_path / "x/a.PNG")
    for i in range(3):
        put(tmp_path / f"x/web{i}.jfif", photo(i, kind="JPEG"))
        put(tmp_path / f"x/plain{i}", photo(i, kind="JPEG"))
        put(tmp_path / f"x/IMG_{i}.HEIC", HEIC)
    for name, kind in (("b.jpe", "JPEG"), ("c.tif8", "TIFF"), ("d.jpg_large", "JPEG"),
                       ("e.download", "WEBP"), ("f.2023-07-01", "GIF"), ("g.x", "BMP"),
                       ("h", "JPEG2000"), ("i.gtiff", "TIFF"), ("j.dib", "BMP")):  # fmt: skip
        put(tmp_path / "x" / name, photo(9, kind=kind))
    put(tmp_path / "x/notes.txt", b"BM is not a picture")
    put(tmp_path / "x/README", b"BMW and other cars, in a text that has no ending")
    put(tmp_path / "x/raw.CR2", photo(1, kind="TIFF"))  # its first bytes are those of a TIFF
    put(tmp_path / "x/empty", b"")
    source = folder(str(tmp_path))
    assert len(source) == 7 + 9
    for i in range(len(source)):
        assert decode(source.read(i)).shape == (12, 12, 3)
    assert said(caplog) == [
        f"{tmp_path}: left out: 3 .HEIC files (they need pillow-heif: pip install "
        "'ssl-xcit[heic]'), 2 files without a known ending, 1 .CR2 file (camera raw, to be "
        "developed to TIFF or JPEG first), 1 .txt file"
    ]
    caplog.clear()
    folder(str(tmp_path))  # is said once
    assert not said(caplog)


def test_what_was_left_out_is_known_of_a_kept_listing_too(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 1)
    monkeypatch.setattr("ssl_xcit.data.folders.SETTLED", 0)
    put(tmp_path / "a.png"), put(tmp_path / "b.mp4", b"film")
    image_files(tmp_path)
    folders.said.clear()
    monkeypatch.setattr("ssl_xcit.data.folders.scan", None)
    assert list(image_files(tmp_path)) == ["a.png"]
    assert said(caplog) == [f"{tmp_path}: left out: 1 .mp4 file"] * 2


@pytest.mark.parametrize(
    ("head", "known"),
    [
        (photo(0, kind="AVIF")[:32], "AVIF"),
        (HEIC[:32], "HEIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", None),  # a film
        (b"BM", None),
        (b"", None),
    ],
)
def test_first_bytes(head, known):
    assert image_format(head) == known


def test_heic_named_jpg_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.decode.readable_formats", lambda: formats.FORMATS)
    with pytest.raises(BadImage, match=r"HEIC, which needs pillow-heif: pip install"):
        decode(HEIC)


# Folders


@pytest.mark.parametrize(
    ("train", "test"), [("train", "val"), ("Training", "Validation"), ("train", "test")]
)
def test_a_training_and_a_test_folder_are_no_classes(tmp_path, caplog, train, test):
    classes(tmp_path / train, ["ant", "bee", "cat"], 4)
    classes(tmp_path / test, ["ant", "bee", "cat"], 2, seed=50)
    pair = labelled_folders(str(tmp_path))
    assert pair.train.class_names == pair.test.class_names == ("ant", "bee", "cat")
    assert (len(pair.train), len(pair.test)) == (12, 6)
    assert f"{test} the test images" in said(caplog)[0]
    for make in (lambda: class_folders(tmp_path), lambda: labelled_folders(str(tmp_path), "x"),
                 lambda: folder(str(tmp_path), labels=True)):  # fmt: skip
        with pytest.raises(ValueError, match="which are no classes: name one of them"):
            make()
    caplog.clear()
    assert len(folder(str(tmp_path))) == 18
    assert f"root={tmp_path / train} takes the training images alone" in said(caplog)[0]


def test_of_two_test_folders_one_is_used_and_classes_that_are_called_so_stay(tmp_path, caplog):
    for part in ("train", "val", "test"):
        classes(tmp_path / "a" / part, ["x", "y"], 2)
    assert labelled_folders(str(tmp_path / "a")).test.root.endswith("test")
    assert "val is not used" in said(caplog)[0]
    classes(tmp_path / "b", ["train", "bus", "test"], 2)  # a vehicle, and an exam
    assert class_folders(tmp_path / "b").class_names == ("bus", "test", "train")


def test_class_names_that_look_alike_are_one_class(tmp_path, caplog):
    names = ["caf\u00e9", "na\u00efve", "plain"]
    classes(tmp_path / "nfc", [unicodedata.normalize("NFC", n) for n in names], 2)
    classes(tmp_path / "nfd", [unicodedata.normalize("NFD", n) for n in names], 2, seed=50)
    pair = labelled_folders(str(tmp_path / "nfc"), str(tmp_path / "nfd"))
    assert pair.train.class_names == pair.test.class_names == tuple(names)
    assert sorted(pair.test.labels) == [0, 0, 1, 1, 2, 2]
    assert not said(caplog)
    classes(tmp_path / "spaces", ["ant", "ant ", "Bee", "bee"], 1)
    found = class_folders(tmp_path / "spaces")
    assert found.class_names == ("Bee", "ant", "bee")
    assert [decode(found.read(i)).shape for i in range(4)] == [(12, 12, 3)] * 4
    assert said(caplog) == [
        "the labels 'ant' and 'ant ' are one class",
        "the labels 'Bee' and 'bee' are two classes: only capitals differ",
    ]


def test_own_folders_are_not_looked_into(tmp_path, caplog, monkeypatch):
    put(tmp_path / "a.png"), put(tmp_path / "cats/run.json", b"{}"), put(tmp_path / "cats/b.png")
    put(tmp_path / "cats/config.yaml", b"")  # of a data set, and no run's
    for name in ("config.yaml", "run.json", "images.npz"):
        put(tmp_path / "runs/x" / name, b"{}")
    put(tmp_path / "venv/pyvenv.cfg", b"")
    for name in ("runs/x/pictures/1.png", "venv/lib/1.png", "out/1.png", "cache/ssl_xcit/1.png"):
        put(tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert list(image_files(".", out="out")) == ["a.png", "cats/b.png"]
    assert "4 folders of runs, results or caches, such as " in said(caplog)[0]
    for name in ("config.yaml", "run.json", "images.npz"):
        put(tmp_path / name, b"{}")
    assert "a.png" in list(image_files("."))  # what is asked for by name is looked into
    assert list(image_files("cats", out=".")) == ["b.png"]  # the results lie above


# Tar shards


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


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
    words = " ".join(said(caplog))
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
    assert "1 images have no .cls, so none has a label" in said(caplog)[0]


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


# Lists


@pytest.fixture
def listed(tmp_path):
    classes(tmp_path, ["ant", "bee"], 4)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    return tmp_path, [(name, name.split("/")[0]) for name in names]


LISTS = {
    "spaces.txt": lambda rows: "".join(f"{p}\t{c}{' ' * ('1' in p)}\n" for p, c in rows),
    "table.csv": lambda rows: "path,label\n" + "".join(f"{p},{c}\n" for p, c in rows),
    "quoted.csv": lambda rows: "label,path\n" + "".join(f'{c},"{p}"\n' for p, c in rows),
    "more.csv": lambda rows: "id,Class Name,file_name\n" + "".join(f"1,{c},{p}\n" for p, c in rows),
    "bom.csv": lambda rows: "\ufeffpath,label\r\n" + "".join(f"{p},{c}\r\n" for p, c in rows),
    "semicolon.csv": lambda rows: "path;label\n" + "".join(f"{p};{c}\n" for p, c in rows),
    "bare.csv": lambda rows: "".join(f"{p},{c}\n" for p, c in rows),
    "table.tsv": lambda rows: "target\timage\n" + "".join(f"{c}\t{p}\n" for p, c in rows),
    "imagenet.txt": lambda rows: "".join(f"{p} {c}\n" for p, c in rows),
    "header.txt": lambda rows: "path\tlabel\n" + "".join(f"{p}\t{c}\n" for p, c in rows),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_they_are_published(listed, name):
    root, rows = listed
    (root / name).write_text(LISTS[name](rows), newline="")
    source = path_list(str(root / name))
    assert source.class_names == ("ant", "bee")
    assert np.bincount(source.labels).tolist() == [4, 4]
    assert all(decode(source.read(i)).size for i in range(8))


def test_columns_by_name_backslashes_and_utf_16(listed):
    root, rows = listed
    text = "wo,was\n" + "".join("{},{}\n".format(p.replace("/", "\\"), c) for p, c in rows)
    (root / "a.csv").write_text(text)
    with pytest.raises(ValueError, match="separate folders by backslashes"):
        path_list(str(root / "a.csv"))
    named = {"image_column": "wo", "label_column": "was"}
    with pytest.raises(ValueError, match=r"set data\.backslashes=true"):
        path_list(str(root / "a.csv"), **named)
    assert path_list(str(root / "a.csv"), backslashes=True, **named).class_names == ("ant", "bee")
    with pytest.raises(ValueError, match="no column art; there are wo, was"):
        path_list(str(root / "a.csv"), image_column="wo", label_column="art")
    (root / "b.txt").write_text("\n".join(p for p, _ in rows), encoding="utf-16")
    assert len(path_list(str(root / "b.txt"))) == 8
    pq.write_table(pa.table({"wo": [p for p, _ in rows]}), root / "c.parquet")
    assert len(path_list(str(root / "c.parquet"), image_column="wo")) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\n1,a\n", "columns id, label; `path` is needed, or name it with data.image"),
        ('path,label\n"x,a\n', "not a table"),
        ("path,label\nx\n", "lines of [1, 2] columns"),
        ("path,label\nnone.png,a\n", "none of the paths tried exists"),
        ("path\n", "it lists no paths"),
    ],
)  # fmt: skip
def test_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        path_list(str(tmp_path / "a.csv"))


# Labels


def save(path, array):
    np.save(path, array)
    return str(path)


LABELS = np.arange(30) % 3


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[:, None],
        np.array([f"class {i}" for i in LABELS]),
        np.array([f"class {i} " if k % 2 else f"class {i}" for k, i in enumerate(LABELS)])[:, None],
        LABELS.astype("S"),
        LABELS.astype(">u2"),
    ],
    ids=["a column", "text", "text with spaces", "bytes", "big-endian"],
)
def test_labels_of_three_classes(tmp_path, labels):
    images = save(tmp_path / "images.npy", np.zeros((30, 8, 8), np.uint8))
    pair = labelled_arrays(images, save(tmp_path / "labels.npy", labels))
    assert len(pair.train.class_names) == 3
    assert np.bincount(pair.train.labels).tolist() == [8, 8, 8]


def test_whole_numbers_stored_as_floats_are_asked_about(tmp_path):
    images = save(tmp_path / "images.npy", np.zeros((30, 8, 8), np.uint8))
    labels = save(tmp_path / "labels.npy", LABELS.astype(np.float64)[:, None])
    with pytest.raises(ValueError, match=r"eval_data\.label_kind=classes or eval_data\.label_kind"):
        labelled_arrays(images, labels)
    assert labelled_arrays(images, labels, label_kind="classes").train.class_names == (
        "0",
        "1",
        "2",
    )
    assert labelled_arrays(images, labels, label_kind="numbers").train.labels.dtype == np.float64
    whole = save(tmp_path / "ids.npy", LABELS)
    assert labelled_arrays(images, whole, label_kind="numbers").train.labels.dtype == np.float64
    halves = save(tmp_path / "halves.npy", LABELS + 0.5)
    assert labelled_arrays(images, halves).train.labels.dtype == np.float64
    for kind, file, message in (("classes", halves, "not all are whole numbers"),
                                ("words", whole, "classes or numbers")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            labelled_arrays(images, file, label_kind=kind)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, 1], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers or text"):
        labelled_arrays(images, str(objects))


def test_numbers_in_lists_and_tables(listed):
    root, rows = listed
    names = [name for name, _ in rows]
    (root / "a.csv").write_text(
        "path,y\n" + "".join(f"{p},{i / 7}\n" for i, (p, _) in enumerate(rows))
    )
    assert labelled_lists(str(root / "a.csv")).train.labels.dtype == np.float64
    (root / "b.csv").write_text(
        "path,y\n" + "".join(f"{p},{i % 2}.0\n" for i, (p, _) in enumerate(rows))
    )
    with pytest.raises(ValueError, match="are they classes or quantities"):
        labelled_lists(str(root / "b.csv"))
    assert path_list(str(root / "b.csv"), label_kind="classes").class_names == ("0", "1")
    pq.write_table(pa.table({"path": names, "label": [0.5] * 8}), root / "c.parquet")
    assert path_list(str(root / "c.parquet")).labels.dtype == np.float64


def test_words_as_labels_of_hugging_face(tmp_path):
    def part(words):
        return datasets.Dataset.from_dict(
            {
                "image": [{"bytes": photo(i), "path": None} for i in range(len(words))],
                "label": words,
            }
        ).cast_column("image", datasets.Image())

    whole = datasets.DatasetDict({"train": part(["b", "a ", "b", "a"]), "test": part(["c", "a"])})
    whole.save_to_disk(tmp_path / "set")
    pair = labelled_huggingface(str(tmp_path / "set"), "train", "test")
    assert pair.train.class_names == ("a", "b")
    assert pair.train.labels.tolist() == [1, 0, 1, 0]
    assert pair.test.labels.tolist() == [2, 0]


# Arrays


def test_members_of_an_npz_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 9, 3), np.uint8)
    file = str(tmp_path / "medical.npz")
    np.savez(file, train_images=images[:20], train_labels=LABELS[:20, None],
             test_images=images[20:], test_labels=LABELS[20:, None])  # fmt: skip
    with pytest.raises(ValueError, match=r"train_images \(20, 9, 9, 3\) uint8.*data\.member=tra"):
        arrays(file)
    pair = labelled_arrays(file, "train_labels", member="train_images", test_member="test_images",
                           test_labels="test_labels")  # fmt: skip
    assert (len(pair.train), len(pair.test)) == (20, 10)
    assert pair.test.class_names == ("0", "1", "2")
    assert np.array_equal(decode(pair.test.read(3)), images[23])
    with pytest.raises(ValueError, match="has no member images; there are train_images"):
        arrays(file, member="images")
    np.savez_compressed(tmp_path / "one.npz", x=images, y=LABELS)
    assert len(arrays(str(tmp_path / "one.npz"), "y").class_names) == 3
    with pytest.raises(ValueError, match=r"is no \.npz file, so it has no members"):
        arrays(save(tmp_path / "a.npy", images), member="x")


def test_npz_files_that_are_damaged_or_none(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((99, 9, 9), np.uint8))
    content = (tmp_path / "a.npz").read_bytes()
    for name, broken, message in (
        ("cut.npz", content[:3000], "not an .npz file, or cut short"),
        ("flip.npz", content[:4000] + b"zz" + content[4002:], "Bad CRC-32"),
        ("empty.npz", b"", "not an .npz file, or cut short"),
    ):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            arrays(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", photo(0))
    with pytest.raises(ValueError, match="an archive without arrays: unpack it"):
        arrays(str(tmp_path / "photos.zip"))
    np.savez(tmp_path / "pickled.npz", x=np.array([[[1, "a"]]], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        arrays(str(tmp_path / "pickled.npz"))


# Dark images of more than 8 bits


def test_twelve_bits_in_sixteen_are_noticed():
    dark = [Deep(3789, 65535), Deep(120, 65535)]
    assert "above 4095 of 65535" in dark_images(dark, Preprocess())
    assert "preprocess.value_range=[0,4095]" in dark_images(dark, Preprocess())
    assert dark_images(dark, Preprocess(value_range=(0, 4095))) is None
    assert dark_images([*dark, Deep(60_000, 65535)], Preprocess()) is None
    assert dark_images([], Preprocess()) is None
    assert "value_range=[0,255]" in dark_images([Deep(3, 65535)], Preprocess())


def test_arrays_of_sixteen_bits_are_deep_too():
    assert open_picture(np.full((4, 4), 900, np.uint16)).deep == (900, 65535)


# What a second look found


def test_a_split_beside_other_folders(tmp_path, caplog):
    for part in ("train", "val"):
        classes(tmp_path / part, ["a", "b"], 3)
    put(tmp_path / "annotations/train.json", b"{}"), put(tmp_path / "masks/1.png")
    for name in ("run.json", "config.yaml", "images.npz"):
        put(tmp_path / "runs/x" / name, b"{}")
    put(tmp_path / "runs/x/1.png")
    pair = labelled_folders(str(tmp_path))
    assert pair.train.class_names == ("a", "b")
    assert (len(pair.train), len(pair.test)) == (6, 6)
    for i in range(3):
        put(tmp_path / f"test/{i}.png")  # without labels, as of a competition
    assert labelled_folders(str(tmp_path)).test.root.endswith("val")


def test_one_sample_without_its_image_leaves_the_others_as_they_are(tmp_path, caplog):
    members = [
        (f"{i}.{part}", photo(i) if part != "cls" else b"1")
        for i in range(5) for part in ("jpg", "depth.png", "seg.png", "cls")
        if (i, part) != (3, "jpg")
    ]  # fmt: skip
    tar(tmp_path / "0.tar", members)
    assert len(tar_shards(str(tmp_path))) == 5
    assert "9 images lie beside another" in " ".join(said(caplog))
    tar(tmp_path / "b/0.tar", [(f"x.{i}.png", photo(i)) for i in range(3)])
    assert len(tar_shards(str(tmp_path / "b"))) == 3
    assert "keys end at the last dot, such as x.0" in said(caplog)[-1]


def test_labels_that_mean_nothing_do_not_keep_from_pretraining(listed, caplog):
    root, rows = listed
    (root / "a.txt").write_text("".join(f"{p}\t{i % 2}.0\n" for i, (p, _) in enumerate(rows)))
    assert path_list(str(root / "a.txt")).labels is None
    assert "labels are left out: " in said(caplog)[0]
    with pytest.raises(ValueError, match="are they classes or quantities"):
        labelled_lists(str(root / "a.txt"))
    cells = "".join(f"{p},{c * (i > 2)}\n" for i, (p, c) in enumerate(rows))
    (root / "b.csv").write_text("path,label\n" + cells)
    with pytest.raises(ValueError, match="3 rows have no label"):
        labelled_lists(str(root / "b.csv"))


def test_a_listing_is_made_again_when_more_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.WORTH_KEEPING", 1)
    monkeypatch.setattr("ssl_xcit.data.folders.SETTLED", 0)
    put(tmp_path / "a.png"), put(tmp_path / "b.heic", HEIC)
    for readable, count in ((formats.FORMATS, 1), ((*formats.FORMATS, "HEIF"), 2)):
        for module in ("formats", "folders"):
            monkeypatch.setattr(f"ssl_xcit.data.{module}.readable_formats", lambda r=readable: r)
        assert len(image_files(tmp_path)) == count
    put(tmp_path / "c", b"")  # being copied
    assert len(image_files(tmp_path)) == 2
    (tmp_path / "c").write_bytes(photo(1))
    assert len(image_files(tmp_path)) == 3


def test_npz_files_of_every_kind_of_damage(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).random((50, 9, 9)))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        arrays(str(tmp_path / "a.npz"))
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6, 10)}
    huge = b"\x93NUMPY\x01\0v\0" + str(header).ljust(117).encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", huge)
    with pytest.raises(ValueError, match="cannot be read"):
        arrays(str(tmp_path / "b.npz"))
