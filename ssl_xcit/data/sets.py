"""Images that lie in arrays, or in sets that other libraries read: torchvision, Hugging Face."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.names import Names
from ssl_xcit.data.order import Shards
from ssl_xcit.data.preprocess import MAX_CHANNELS
from ssl_xcit.data.sources import (
    AnyLabels,
    Files,
    LabelledPair,
    Labels,
    Source,
    held_out,
    label_kind,
    load_labels,
    load_npy,
)
from ssl_xcit.errors import MissingPath, UserError

MAX_NAMES = 1_000_000


class Arrays:
    """Images of one size in an array (N, H, W) or (N, H, W, channels), perhaps a memory map.

    Args:
        images: uint8, or another number type with `preprocess.value_range`.
        name: what a message calls the set.
        labels: class ids, or None.
        class_names: by class id.
    """

    shards: Shards | None = None

    def __init__(
        self,
        images: np.ndarray,
        name: str,
        labels: AnyLabels | None = None,
        class_names: Sequence[str] = (),
    ):
        self.images = images
        self.set_name = name
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self.images, np.memmap):
            return self.__dict__
        return {**self.__dict__, "images": Path(str(self.images.filename))}  # not its content

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.images, Path):
            self.images = np.load(self.images, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """The stored pixels, copied out of the map."""
        return np.array(self.images[index])

    def name(self, index: int) -> str:
        """Its place in the set."""
        return f"{self.set_name}[{index}]"


class HuggingFace:
    """A data set of Hugging Face's `datasets` library, its encoded images undecoded."""

    shards: Shards | None = None

    def __init__(self, dataset: Any, column: str, name: str, label: str | None):
        self.dataset = dataset
        self.column = column
        self.set_name = name
        self.labels: Labels | None = None
        self.class_names: Sequence[str] = ()
        if label is not None:
            ids = np.asarray(dataset[label])
            if ids.dtype.kind not in "ui" or (len(ids) and ids.min() < 0):
                raise UserError(
                    f"data.label={label}: class ids, whole numbers from 0, are needed "
                    f"({name} has {dataset.features[label]})"
                )
            self.labels = ids.astype(np.int64)
            feature = dataset.features[label]
            self.class_names = tuple(getattr(feature, "names", None) or numbered(self.labels))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes:
        """The encoded image; raises BadImage."""
        image = self.dataset[index][self.column]
        try:
            if image["bytes"] is not None:
                return image["bytes"]
            return Path(image["path"]).read_bytes()
        except (OSError, TypeError, KeyError) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Its place in the set."""
        return f"{self.set_name}[{index}]"


def arrays(file: str | None, labels: str | None = None) -> Arrays | None:
    """`.npy` files, mapped into memory: images (N, H, W) or (N, H, W, channels), and labels, see
    `load_labels`.

    Raises:
        MissingPath: no such file.
        UserError: another shape or type.
    """
    if file is None:
        return None
    images = load_npy(file, "data.file")
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
        raise UserError(
            f"data.file={file}: shape {images.shape} of {images.dtype}; images are (N, H, W) or "
            "(N, H, W, channels) of numbers"
        )
    if images.ndim == 4 and images.shape[-1] > MAX_CHANNELS:
        raise UserError(
            f"data.file={file}: shape {images.shape} has {images.shape[-1]} channels; channels "
            "come last: np.save(file, images.transpose(0, 2, 3, 1))"
        )
    if labels is None:
        return Arrays(images, Path(file).name)
    known = load_labels(labels, len(images))
    return Arrays(images, Path(file).name, known, numbered(known))


def numbered(labels: np.ndarray) -> list[str]:
    """Names of classes that have none; none for ids that are no small numbers."""
    if label_kind(labels) != "classes" or not len(labels) or labels.max() >= MAX_NAMES:
        return []
    return [str(i) for i in range(int(labels.max()) + 1)]


def labelled_arrays(
    file: str | None,
    labels: str | None = None,
    test_file: str | None = None,
    test_labels: str | None = None,
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """`arrays` with labels, and others to be tested on (None: a share is held out)."""
    train, test = arrays(file, labels), arrays(test_file, test_labels)
    return held_out(train, test, str(file), test_fraction, resize, size, seed)


def huggingface(
    root: str | None, split: str | None = None, image: str = "image", label: str | None = None
) -> HuggingFace | None:
    """A set that `Dataset.save_to_disk` wrote.

    Args:
        root: its folder; None: no images.
        split: of a set that has several.
        image: the column of images.
        label: the column of class ids; None: without labels.

    Raises:
        MissingPath: no such folder.
        UserError: `datasets` is not installed, no such set, split or column.
    """
    if root is None:
        return None
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data=huggingface needs the datasets library: pip install 'ssl-xcit[huggingface]'"
        ) from error
    path = Path(root).expanduser()
    if not path.is_dir():
        raise MissingPath(f"data.root={root}: no such folder")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"data.root={root}: not a set of Dataset.save_to_disk ({str(error).splitlines()[0]})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"data.split={split}: {root} has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    for key, column in (("image", image), ("label", label)):
        if column is not None and column not in loaded.column_names:
            raise UserError(
                f"data.{key}={column}: {root} has columns {', '.join(loaded.column_names)}"
            )
    try:
        undecoded = loaded.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # whatever the column's type makes arrow raise
        raise UserError(
            f"data.image={image}: a column of {loaded.features[image]}, not of images"
        ) from error
    return HuggingFace(undecoded, image, path.name, label)


def labelled_huggingface(
    root: str | None,
    split: str | None = None,
    test_split: str | None = None,
    image: str = "image",
    label: str = "label",
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """`huggingface` with labels, and another split to be tested on (None: a share is held out)."""
    if root is None and test_split is not None:
        raise UserError("eval_data.test_split is given without eval_data.root; give both")
    train = huggingface(root, split, image, label)
    test = None if test_split is None else huggingface(root, test_split, image, label)
    return held_out(train, test, str(root), test_fraction, resize, size, seed)


def torchvision_set(name: str, root: str, split: str, download: bool) -> Source:
    """CIFAR10, CIFAR100, STL10 or ImageNet as torchvision lays them out.

    Args:
        name: torchvision's class.
        root: where the files are, or are put.
        split: train, test (ImageNet: val), or unlabeled (STL10).
        download: fetch what is missing.

    Raises:
        MissingPath: the files are not there, or cannot be fetched; says what to do.
    """
    from torchvision import datasets  # the other sources do without

    options: dict[str, object]
    if name in ("CIFAR10", "CIFAR100"):
        options = {"train": split == "train", "download": download}
    elif name == "STL10":
        options = {"split": split, "download": download}
    elif name == "ImageNet":
        options = {"split": "val" if split == "test" else split}
    else:
        raise UserError(f"name={name}: one of CIFAR10, CIFAR100, STL10, ImageNet")
    home = Path(root).expanduser().absolute()
    made = [path for path in (home, *home.parents) if not path.exists()]
    try:
        dataset = getattr(datasets, name)(root=str(home), **options)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        if made:  # torchvision makes the folder before it looks for the network
            shutil.rmtree(made[-1], ignore_errors=True)
        if name == "ImageNet":
            fix = f"put ILSVRC2012_devkit_t12.tar.gz, _img_train.tar and _img_val.tar into {root}"
        elif download:
            fix = f"no network? Put torchvision's archive into {root}, or use data=photos"
        else:
            fix = f"fetch it with data.download=true eval_data.download=true, or put it into {root}"
        raise MissingPath(f"{name} is not in {root} ({reason}): {fix}") from error
    names = [n if isinstance(n, str) else n[0] for n in dataset.classes]
    if name == "ImageNet":
        paths, targets = zip(*dataset.samples, strict=True)
        return Files(Names.of(paths), "", np.asarray(targets, np.int64), names)
    images = dataset.data if name != "STL10" else dataset.data.transpose(0, 2, 3, 1)
    title = f"{name} {split}"
    if split == "unlabeled":
        return Arrays(images, title)
    targets = dataset.labels if name == "STL10" else dataset.targets
    return Arrays(images, title, np.asarray(targets, np.int64), names)


def labelled_torchvision(
    name: str, root: str, download: bool, resize: int, size: int
) -> LabelledPair:
    """The train and test parts of a torchvision set; raises as `torchvision_set`."""
    parts = [torchvision_set(name, root, part, download) for part in ("train", "test")]
    return LabelledPair(parts[0], parts[1], name, resize, size)
