"""Arrays and their labels, sets of Hugging Face and of torchvision."""

import pickle
import re
import zipfile
from unittest import mock

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import photo
from torchvision.datasets import CIFAR10

from ssl_xcit.data.decode import decode
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sets import (
    arrays,
    huggingface,
    labelled_arrays,
    labelled_huggingface,
    torchvision_set,
)


def test_arrays_are_mapped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.array([0, 2, 1, 0, 2, 1]))
    source = arrays(str(tmp_path / "images.npy"), str(tmp_path / "labels.npy"))
    assert isinstance(source.images, np.memmap)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).read(3), images[3])  # noqa: S301
    assert np.array_equal(decode(source.read(3)), images[3])
    assert source.labels.tolist() == [0, 2, 1, 0, 2, 1]
    assert source.name(3) == "images.npy[3]"
    pair = labelled_arrays(*(str(tmp_path / f"{n}.npy") for n in ("images", "labels")))
    assert len(pair.test) == 3
    assert arrays(None) is None
    five = Preprocess(5, (0.5,) * 5, (0.2,) * 5)
    np.save(tmp_path / "five.npy", images.reshape(-1)[:120].reshape(2, 3, 4, 5))
    assert decode(arrays(str(tmp_path / "five.npy")).read(1), five).shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3), np.uint8), None, "images are (N, H, W)"),
        (np.zeros((2, 3, 200, 200), np.uint8), None, "transpose(0, 2, 3, 1)"),
        (np.array(["a", "b"]), None, "images are (N, H, W)"),
        (np.zeros((2, 4, 4), np.uint8), np.array([1]), "(2,) class ids are needed"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0.5, np.nan]), "not all numbers are finite"),
        (np.zeros((2, 4, 4), np.uint8), np.array([[0, 2], [1, 1]]), "are 0 or 1 each"),
        (np.zeros((2, 4, 4), np.uint8), np.array([-1, 1]), "start at 0"),
        (np.array([{}]), None, "not a .npy file of numbers"),
    ],
)
def test_bad_arrays(tmp_path, images, labels, message):
    np.save(tmp_path / "i.npy", images)
    if labels is not None:
        np.save(tmp_path / "l.npy", labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays(str(tmp_path / "i.npy"), None if labels is None else str(tmp_path / "l.npy"))


def test_a_set_of_hugging_face(tmp_path):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = {"picture": images, "kind": [0, 1, 0, 1, 0, 1]}
    one = datasets.Dataset.from_dict(table, features=features)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "two"))
    source = huggingface(str(tmp_path / "one"), image="picture", label="kind")
    assert [decode(source.read(i))[0, 0, 0] for i in range(6)] == list(range(6))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == table["kind"]
    pair = labelled_huggingface(str(tmp_path / "two"), "train", "test", "picture", "kind")
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
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}
        (root / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (root / "batches.meta").write_bytes(pickle.dumps(names))
    with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True):
        source = torchvision_set("CIFAR10", str(tmp_path), "train", False)
        reference = CIFAR10(str(tmp_path), train=True)
    assert len(source) == 20
    assert source.class_names[9] == "class 9"
    for i in (0, 19):
        assert np.array_equal(decode(source.read(i)), np.asarray(reference[i][0]))
        assert source.labels[i] == reference[i][1]


@pytest.mark.parametrize(
    ("name", "split", "download", "message"),
    [
        ("CIFAR10", "train", False, "data.download=true"),
        ("CIFAR10", "train", True, "no network?"),
        ("STL10", "unlabeled", False, "data.download=true"),
        ("ImageNet", "train", False, "ILSVRC2012_devkit_t12"),
    ],
)
def test_a_set_of_torchvision_that_is_not_there(tmp_path, name, split, download, message):
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        torchvision_set(name, str(tmp_path / "sets"), split, download)
    assert not (tmp_path / "sets").exists()


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
    pair = labelled_arrays(images, labels, label_kind="classes")
    assert pair.train.class_names == ("0", "1", "2")
    assert labelled_arrays(images, labels, label_kind="numbers").train.labels.dtype == np.float64
    whole = save(tmp_path / "ids.npy", LABELS)
    assert labelled_arrays(images, whole, label_kind="numbers").train.labels.dtype == np.float64
    halves = save(tmp_path / "halves.npy", LABELS + 0.5)
    assert labelled_arrays(images, halves).train.labels.dtype == np.float64
    with pytest.raises(ValueError, match="not all are whole numbers"):
        labelled_arrays(images, halves, label_kind="classes")
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, 1], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers or text"):
        labelled_arrays(images, str(objects))


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
