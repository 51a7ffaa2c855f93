"""Arrays and their labels, sets of Hugging Face and of torchvision."""

import io
import pickle
import re
import zipfile
from unittest import mock

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import channels, photo, put, saved
from torchvision.datasets import CIFAR10

from ssl_xcit.data import sets
from ssl_xcit.data.decode import decode
from ssl_xcit.data.sets import arrays, huggingface, labelled_arrays

LABELS = np.arange(30) % 3


def save(path, array):
    np.save(path, array)
    return str(path)


@pytest.fixture
def blank(tmp_path):
    """Thirty images."""
    return save(tmp_path / "blank.npy", np.zeros((30, 8, 8), np.uint8))


def test_arrays_are_mapped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    files = save(tmp_path / "x.npy", images), save(tmp_path / "y.npy", [0, 2, 1, 0, 2, 1])
    source = arrays(*files)
    assert isinstance(source.images, np.memmap)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).read(3), images[3])  # noqa: S301
    assert np.array_equal(decode(source.read(3)), images[3])
    assert source.labels.tolist() == [0, 2, 1, 0, 2, 1]
    assert source.name(3) == "x.npy[3]"
    assert len(labelled_arrays(*files).test) == 3
    assert arrays(None) is None
    five = save(tmp_path / "five.npy", images.reshape(-1)[:120].reshape(2, 3, 4, 5))
    assert decode(arrays(five).read(1), channels(5)).shape == (3, 4, 5)


TWO = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3), np.uint8), None, "images are (N, H, W)"),
        (np.zeros((2, 3, 200, 200), np.uint8), None, "transpose(0, 2, 3, 1)"),
        (np.array(["a", "b"]), None, "images are (N, H, W)"),
        (TWO, [1], "(2,) class ids are needed"),
        (TWO, [0.5, np.nan], "not all numbers are finite"),
        (TWO, [[0, 2], [1, 1]], "are 0 or 1 each"),
        (TWO, [-1, 1], "start at 0"),
        (TWO, [{}, 1], "not a .npy file of numbers or text"),
        (np.array([{}]), None, "not a .npy file of numbers"),
    ],
)
def test_bad_arrays(tmp_path, images, labels, message):
    labels = None if labels is None else save(tmp_path / "l.npy", labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays(save(tmp_path / "i.npy", images), labels)


def test_a_set_of_hugging_face(tmp_path):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)]
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    table = {"picture": images, "kind": [0, 1, 0, 1, 0, 1]}
    one = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    source = huggingface(str(tmp_path / "one"), image="picture", label="kind")
    assert [decode(source.read(i))[0, 0, 0] for i in range(6)] == list(range(6))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1]
    pair = sets.labelled_huggingface(str(tmp_path / "two"), "train", "test", "picture", "kind")
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
    root, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}
        put(root / name, pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    put(root / "batches.meta", pickle.dumps(names))
    with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True):
        source = sets.torchvision_set("CIFAR10", str(tmp_path), "train", False)
        reference = CIFAR10(str(tmp_path), train=True)
    assert len(source) == 20
    assert source.class_names[9] == "class 9"
    for i in (0, 19):
        assert np.array_equal(decode(source.read(i)), np.asarray(reference[i][0]))
        assert source.labels[i] == reference[i][1]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("STL10", "unlabeled", "data.download=true"), ("ImageNet", "train", "ILSVRC2012_devkit_t12")],
)
def test_a_set_of_torchvision_that_is_not_there(tmp_path, name, split, message):
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        sets.torchvision_set(name, str(tmp_path / "sets"), split, download=False)
    assert not (tmp_path / "sets").exists()


def test_labels_of_three_classes(tmp_path, blank):
    text = np.array([f"class {i}" for i in LABELS])
    spaces = np.array([f"{word}{' ' * (i % 2)}" for i, word in enumerate(text)])[:, None]
    for labels in (LABELS[:, None], text, spaces, LABELS.astype("S"), LABELS.astype(">u2")):
        pair = labelled_arrays(blank, save(tmp_path / "labels.npy", labels))
        assert len(pair.train.class_names) == 3
        assert np.bincount(pair.train.labels).tolist() == [8, 8, 8]


def test_whole_numbers_stored_as_floats_are_asked_about(tmp_path, blank):
    labels = save(tmp_path / "labels.npy", LABELS.astype(np.float64)[:, None])
    with pytest.raises(ValueError, match=r"eval_data\.label_kind=classes or eval_data\.label_kind"):
        labelled_arrays(blank, labels)
    pair = labelled_arrays(blank, labels, label_kind="classes")
    assert pair.train.class_names == ("0", "1", "2")
    whole = save(tmp_path / "ids.npy", LABELS)
    halves = save(tmp_path / "halves.npy", LABELS + 0.5)
    for file, kind in ((labels, "numbers"), (whole, "numbers"), (halves, None)):
        assert labelled_arrays(blank, file, label_kind=kind).train.labels.dtype == np.float64
    with pytest.raises(ValueError, match="not all are whole numbers"):
        labelled_arrays(blank, halves, label_kind="classes")


def test_words_as_labels_of_hugging_face(tmp_path):
    def part(words):
        images = [{"bytes": photo(i), "path": None} for i in range(len(words))]
        rows = datasets.Dataset.from_dict({"image": images, "label": words})
        return rows.cast_column("image", datasets.Image())

    whole = datasets.DatasetDict({"train": part(["b", "a ", "b", "a"]), "test": part(["c", "a"])})
    whole.save_to_disk(str(tmp_path / "set"))
    pair = sets.labelled_huggingface(str(tmp_path / "set"), "train", "test")
    assert pair.train.class_names == ("a", "b")
    assert pair.train.labels.tolist() == [1, 0, 1, 0]
    assert pair.test.labels.tolist() == [2, 0]


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


def zip_of(name, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content)
    return out.getvalue()


NOISE = np.random.default_rng(0).random((50, 9, 9))
STORED, PACKED = saved(np.savez, x=NOISE), saved(np.savez_compressed, x=NOISE)
HEADER = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6, 10)}
HUGE = b"\x93NUMPY\x01\0v\0" + str(HEADER).ljust(117).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.npz", STORED[:3000], "not an .npz file, or cut short"),
        ("flip.npz", STORED[:4000] + b"zz" + STORED[4002:], "Bad CRC-32"),
        ("empty.npz", b"", "not an .npz file, or cut short"),
        ("pickled.npz", saved(np.savez, x=np.array([[[1, "a"]]], object)), "allow_pickle=False"),
        ("zeroed.npz", PACKED[:2000] + bytes(100) + PACKED[2100:], "cannot be read"),
        ("huge.npz", zip_of("x.npy", HUGE), "cannot be read"),
        ("photos.zip", zip_of("a.jpg", photo(0)), "an archive without arrays: unpack it"),
    ],
)
def test_npz_files_that_are_damaged_or_none(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        arrays(str(put(tmp_path / name, content)))
