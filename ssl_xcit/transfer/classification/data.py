"""Labelled images as data of classification: folders of classes, lists, the built-in photographs;
`of_pair` takes whatever else gives a `LabelledPair`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from ssl_xcit.data.folders import (
    TEST_NAMES,
    class_folders,
    image_files,
    labelled_folders,
    split_of,
    warn_once,
)
from ssl_xcit.data.labels import AnyLabels, labels_from, load_npy
from ssl_xcit.data.labels import label_kind as kind_of
from ssl_xcit.data.lists import labelled_lists, path_list
from ssl_xcit.data.photos import CacheFolder, labelled_photos
from ssl_xcit.data.sources import LabelKind, LabelledPair, Place, Seed, Source, TestFraction
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.annotated import check_known_classes, existing_folder
from ssl_xcit.transfer.task import AnnotatedSource, Task, TransferData

WORDS = {  # of messages about the images that features are measured on, by those about these
    ", or evaluate without: eval_data=none": "",
    "set data.backslashes=true (eval_data.backslashes=true)": "write them with /",
    "k-NN and linear probe need": "classification needs",
    "eval_data": "data",
}


@dataclass(eq=False)
class LabelledImages:
    """Images with a class id each, or with a row of 0 and 1."""

    images: Source
    labels: AnyLabels  # (N,) class ids or (N, K) of 0 and 1
    class_names: Sequence[str]
    left_out: Sequence[str] = ()
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash labels and class names."""
        names = "\0".join(self.class_names).encode("utf-8", "surrogateescape")
        labels = np.ascontiguousarray(self.labels).tobytes()
        self.digest = hashlib.sha256(labels + names).hexdigest()

    def read_target(self, index: int, height: int, width: int) -> np.ndarray:
        """Return the class id, (), or the row of 0 and 1, (K,)."""
        return np.asarray(self.labels[index])


def classification_data(
    root: Place = None,
    test_root: Place = None,
    file: Place = None,
    test_file: Place = None,
    labels: Place = None,
    test_labels: Place = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_kind: LabelKind = None,
    test_fraction: TestFraction = 0.2,
    seed: Seed = 0,
    cache: CacheFolder = None,
) -> TransferData:
    """Return images to train and to test on.

    Args:
        root: one folder a class, or a training and a test folder that hold these; with `file`, the
            folder that its paths are relative to. Without both: the built-in photographs.
        test_root: class folders to test on; None: the test folder of `root`, or a share of it.
        file: a list of paths and labels, see `lists.labelled_lists`.
        test_file: likewise, to test on.
        labels: a `.npy` file of the listed images' labels; None: the list's own.
        test_labels: likewise of `test_file`.
        image_column: of a list with a heading, the column of paths.
        label_column: likewise of labels.
        label_kind: `classes` where whole numbers are stored as floating point.
        test_fraction: share of each class to test on where nothing else is named.
        seed: of the choice of these.
        cache: where the built-in photographs are cut to.

    Raises:
        UserError: see `of_pair`.
    """
    with own_words():
        if file is not None:
            pair = labelled_lists(
                file, test_file, root, labels, test_labels, test_fraction, seed=seed,
                image_column=image_column, label_column=label_column, label_kind=label_kind,
            )  # fmt: skip
        elif root is not None or test_root is not None:
            root, test_root = split_folders(root, test_root)
            pair = labelled_folders(root, test_root, test_fraction, seed=seed)
        else:
            pair = labelled_photos(cache)
    assert pair is not None
    return of_pair(pair)


def split_folders(root: Place, test_root: Place) -> tuple[Place, Place]:
    """Return the class folders to train and to test on, in place of a folder that holds both; logs
    further ones, which are not used.
    """
    if root is None or test_root is not None:
        return root, test_root
    home = Path(str(root)).expanduser()
    split = split_of(home, image_files(home))
    if not split:
        return root, None
    if unused := " and ".join(folder.name for folder in split[2:]):
        warn_once(
            f"data.root={home}: {split[0].name} has the training images and {split[1].name} the "
            f"test images, {unused} is not used; data.root and data.test_root name others"
        )
    return str(split[0]), str(split[1])


@contextmanager
def own_words() -> Iterator[None]:
    """Put errors into the words of this command's settings."""
    try:
        yield
    except UserError as error:
        words = str(error)
        for theirs, ours in WORDS.items():
            words = words.replace(theirs, ours)
        raise type(error)(words) from error


def classification_test(
    task: Task,
    root: Place = None,
    file: Place = None,
    labels: Place = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_kind: LabelKind = None,
) -> LabelledImages:
    """Return images to test a classifier on, with its classes, some of which may have no image.

    Args:
        task: the classifier.
        root: one folder a class, or a folder for testing that holds these; with `file`, the folder
            that its paths are relative to.
        file: a list of paths and labels: class names, or numbers that are the classifier's ids.
        labels: see `classification_data`, as of the others.

    Raises:
        UserError: no images, no labels, classes that the classifier does not know, or several
            labels an image where it takes one, or the other way round.
    """
    own, name = list(task.class_names), str(root if file is None else file)
    if labels is not None and file is None:
        raise UserError(f"data.labels={labels}: name the list of its images, data.file=FILE")
    with own_words():
        if file is None:
            home = existing_folder(root)
            source = class_folders(folder_for_testing(home, own), own)
        else:
            columns = image_column, label_column
            listed = path_list(file, root, own, *columns, False, label_kind, labels is None)
            assert listed is not None
            source = listed
        if labels is not None:
            values, where = load_npy(str(labels), "data.labels"), f"data.labels={labels}"
            source.labels, names = labels_from(values, len(source), where, label_kind, own)
            source.class_names = tuple(names)
    found = labels_of(source, name)
    several = kind_of(found) == "several"
    if several != bool(task.settings["multi_label"]) or (several and found.shape[1] != len(own)):
        each = f"{found.shape[1]} labels of 0 and 1" if several else "one label"
        takes = f"{len(own)} of 0 and 1" if task.settings["multi_label"] else "one"
        raise UserError(f"{name}: images have {each} each, and the classifier takes {takes}")
    words = [*own, *list(source.class_names)[len(own) :]]
    present = np.flatnonzero(class_counts(found)).tolist()
    check_known_classes(name, [words[k] if k < len(words) else str(k) for k in present], own)
    return LabelledImages(source, found, own)


def folder_for_testing(home: Path, class_names: Sequence[str]) -> Path:
    """Return the folder for testing in a folder, by its name, that holds folders itself and is no
    class; else the folder.
    """
    inside = {p.name.lower(): p for p in home.iterdir() if p.is_dir()}
    known = {name.lower() for name in class_names}
    for name in TEST_NAMES:
        if name in inside and name not in known and any(p.is_dir() for p in inside[name].iterdir()):
            return inside[name]
    return home


def of_pair(pair: LabelledPair) -> TransferData:
    """Return labelled images of any source as data of classification.

    Raises:
        UserError: no labels, or numbers; one class only; test images of classes that no training
            image has, or of another kind of labels.
    """
    train, test = (labels_of(source, pair.name) for source in (pair.train, pair.test))
    kind = kind_of(train)
    if train.shape[1:] != test.shape[1:] or kind_of(test) != kind:
        raise UserError(
            f"{pair.name}: training labels are {kind} of shape {train.shape}, test labels "
            f"{kind_of(test)} of shape {test.shape}: give both of one kind"
        )
    counts = class_counts(train)
    names = list(pair.train.class_names)
    names += [str(i) for i in range(len(names), len(counts))]
    unknown = [k for k in np.flatnonzero(class_counts(test)) if k >= len(counts) or not counts[k]]
    if unknown:
        words = [*names, *list(pair.test.class_names)[len(names) :]]
        shown = ", ".join(words[k] if k < len(words) else str(k) for k in unknown[:5])
        raise UserError(
            f"{pair.name}: {len(unknown)} classes of the test images have no training image "
            f"({shown}): add training images of them or leave the test images out"
        )
    if (counts > 0).sum() < 2 and kind == "classes":
        raise UserError(f"{pair.name}: one class only; a classifier needs two")
    return TransferData(
        LabelledImages(pair.train, train, names), LabelledImages(pair.test, test, names), pair.name
    )


def labels_of(source: Source, name: str) -> AnyLabels:
    """Return the labels of a source; raises UserError where there are none, or they are numbers."""
    if source.labels is None:
        raise UserError(f"{name}: no labels; put the images in one folder a class")
    if not len(source):
        raise UserError(f"{name}: no images to train or to test on")
    labels = np.asarray(source.labels)
    if kind_of(labels) == "numbers":
        raise UserError(
            f"{name}: the labels are numbers, and classification takes classes; whole numbers that "
            "are classes: label_kind=classes"
        )
    return labels


def class_counts(labels: AnyLabels) -> Int64[np.ndarray, " K"]:
    """Return how many images have each class."""
    if kind_of(labels) == "several":
        return labels.astype(np.int64).sum(axis=0)
    return np.bincount(labels.astype(np.int64))


def balanced_weights(source: AnnotatedSource) -> Float64[np.ndarray, " K"]:
    """Return weights of classes: N / (classes * images of the class); where images have several
    labels, the weight of a positive one, images without the class by images with it. Classes
    without an image have 1.
    """
    labels, K = np.asarray(source.images.labels), len(source.class_names)
    counts = np.zeros(K)
    present = class_counts(labels)
    counts[: len(present)] = present
    several = kind_of(labels) == "several"
    total = (
        len(labels) - counts if several else np.full(K, len(labels) / max(1, (counts > 0).sum()))
    )
    return np.where((counts > 0) & (total > 0), total / np.maximum(counts, 1), 1.0)
