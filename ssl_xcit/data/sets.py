"""Images in arrays, and sets that other libraries read: torchvision, Hugging Face."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ssl_xcit.data.array_files import npy_header
from ssl_xcit.data.labels import AnyLabels, labels_from, load_npy, normalised
from ssl_xcit.data.order import Shards
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import MAX_CHANNELS
from ssl_xcit.data.sources import (
    Files,
    LabelKind,
    LabelledPair,
    Place,
    Seed,
    Source,
    TestFraction,
    held_out,
)
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.validation import PLACE, Count, Text

SetName = Literal["CIFAR10", "CIFAR100", "STL10", "ImageNet"]  # torchvision's classes
SetRoot = Annotated[Text, PLACE]
Download = Annotated[bool, PLACE]
Member = Annotated[str | None, PLACE]  # of an .npz file


class Arrays:
    """Images of one size in an array (N, H, W) or (N, H, W, channels), perhaps a memory map: uint8,
    or another number type with `preprocess.value_range`. Messages call the set by its `name`.
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
        """Copy the stored pixels out of the map."""
        return np.array(self.images[index])

    def name(self, index: int) -> str:
        """Return its place in the set."""
        return f"{self.set_name}[{index}]"


class HuggingFace:
    """A data set of Hugging Face's `datasets` library, whose images are not decoded by it."""

    shards: Shards | None = None

    def __init__(
        self,
        dataset: Any,
        column: str,
        name: str,
        label: str | None,
        label_kind: str | None = None,
        known: Sequence[str] = (),
    ):
        self.dataset = dataset
        self.column = column
        self.fingerprint = ""  # of the rows, as the library has it
        self.set_name = name
        self.labels: AnyLabels | None = None
        self.class_names: Sequence[str] = ()
        if label is not None:
            values = np.asarray(dataset[label])
            where = f"data.label={label} of {name}"
            self.labels, classes = labels_from(values, len(dataset), where, label_kind, known)
            named = getattr(dataset.features[label], "names", None)
            self.class_names = tuple(map(normalised, named)) if named else tuple(classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes:
        """Read the encoded image; raises BadImage."""
        image = self.dataset[index][self.column]
        try:
            if image["bytes"] is not None:
                return image["bytes"]
            return Path(image["path"]).read_bytes()
        except (OSError, TypeError, KeyError) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Return its place in the set."""
        return f"{self.set_name}[{index}]"


def arrays(
    file: Place,
    labels: Place = None,
    member: Member = None,
    label_kind: LabelKind = None,
    known: Sequence[str] = (),
) -> Arrays | None:
    """Return images (N, H, W) or (N, H, W, channels) of a `.npy` file, mapped into memory, or of a
    member of an `.npz` file.

    Args:
        file: the file; None: no images.
        labels: a `.npy` file of labels, or the name of a member of the `.npz`; see
            `labels.labels_from`.
        member: of an `.npz` file; None: the only one that can be images.
        label_kind: `classes` or `numbers`, where the type of the labels leaves it open.
        known: class names whose ids another set has fixed.

    Raises:
        MissingPath: no such file.
        UserError: another shape or type, or no such member.
    """
    if file is None:
        return None
    file = str(file)
    members = npz_members(file)
    if members is None and member is not None:
        raise UserError(f"data.member={member}: {file} is no .npz file, so it has no members")
    name = Path(file).name
    if members is None:
        images = load_npy(file, "data.file")
    else:
        member = member or only_images(file, members)
        images = npz_member(file, members, member)
        name = f"{name}:{member}"
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
        return Arrays(images, name)
    if members is not None and not Path(str(labels)).expanduser().is_file():
        values = npz_member(file, members, str(labels))
    else:
        values = load_npy(str(labels), "data.labels")
    known_labels, classes = labels_from(
        values, len(images), f"data.labels={labels}", label_kind, known
    )
    return Arrays(images, name, known_labels, classes)


def npz_members(file: str) -> dict[str, str] | None:
    """Return shape and type of every array in an `.npz` file, by name; None: it is another file.

    Raises:
        MissingPath: no such file.
        UserError: it is damaged.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingPath(f"data.file={file}: no such file")
    if not zipfile.is_zipfile(path):
        if path.suffix == ".npz":
            raise UserError(f"data.file={file}: not an .npz file, or cut short; copy it again")
        return None
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as stream:
                        shape, dtype = npy_header(stream)
                    members[name.removesuffix(".npy")] = f"{shape} {dtype}"
    except Exception as error:  # zipfile and numpy raise half a dozen types
        raise UserError(f"data.file={file} cannot be read ({error}): copy it again") from error
    if not members:
        raise UserError(f"data.file={file}: an archive without arrays: unpack it")
    return members


def npz_member(file: str, members: dict[str, str], name: str) -> np.ndarray:
    """Read an array of an `.npz` file into memory.

    Raises:
        UserError: no such member, or it cannot be read.
    """
    if name not in members:
        raise UserError(f"{file} has no member {name}; there are {listed(members)}")
    try:
        with np.load(Path(file).expanduser(), allow_pickle=False) as archive:
            return archive[name]
    except Exception as error:  # as above, and MemoryError
        raise UserError(f"{file}, member {name} cannot be read ({error})") from error


def only_images(file: str, members: dict[str, str]) -> str:
    """Return the member that holds images.

    Raises:
        UserError: none or several may be images; says what to type.
    """
    likely = [name for name, kind in members.items() if kind.count(",") >= 2]
    if len(likely) == 1:
        return likely[0]
    raise UserError(
        f"data.file={file} has the members {listed(members)}: name the images with data.member="
        f"{likely[0] if likely else 'NAME'}; of eval_data name member, labels, test_member and "
        "test_labels"
    )


def listed(members: dict[str, str]) -> str:
    """Return names with shapes and types."""
    return ", ".join(f"{name} {kind}" for name, kind in members.items())


def labelled_arrays(
    file: Place,
    labels: Place = None,
    test_file: Place = None,
    test_labels: Place = None,
    test_fraction: TestFraction = 0.2,
    resize: Count = 256,
    size: Count = 224,
    seed: Seed = 0,
    member: Member = None,
    test_member: Member = None,
    label_kind: LabelKind = None,
) -> LabelledPair | None:
    """Return labelled `arrays`; to test on, `test_file`, `test_member` of `file`, or a share."""
    train = arrays(file, labels, member, label_kind)
    if test_file is None and test_member is not None:
        test_file = file
    names = train.class_names if train is not None else ()
    test = arrays(test_file, test_labels, test_member, label_kind, names)
    return held_out(train, test, str(file), test_fraction, resize, size, seed)


def huggingface(
    root: Place,
    split: str | None = None,
    image: str = "image",
    label: str | None = None,
    label_kind: LabelKind = None,
    known: Sequence[str] = (),
) -> HuggingFace | None:
    """Return a set that `Dataset.save_to_disk` wrote.

    Args:
        root: its folder; None: no images.
        split: of a set that has several.
        image: the column of images.
        label: the column of labels, see `labels.labels_from`; None: without labels.
        label_kind: `classes` or `numbers`, where the type of the labels leaves it open.
        known: class names whose ids another set has fixed.

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
    path = Path(str(root)).expanduser()
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
    source = HuggingFace(undecoded, image, path.name, label, label_kind, known)
    source.fingerprint = f"{getattr(loaded, '_fingerprint', '')} {image}"  # before the cast
    return source


def labelled_huggingface(
    root: Place,
    split: str | None = None,
    test_split: str | None = None,
    image: str = "image",
    label: str = "label",
    test_fraction: TestFraction = 0.2,
    resize: Count = 256,
    size: Count = 224,
    seed: Seed = 0,
    label_kind: LabelKind = None,
) -> LabelledPair | None:
    """Return `huggingface` with labels, and a split to test on (None: a share is held out)."""
    if root is None and test_split is not None:
        raise UserError("eval_data.test_split is given without eval_data.root; give both")
    train = huggingface(root, split, image, label, label_kind)
    known = () if train is None or label_kind == "numbers" else train.class_names
    test = None
    if test_split is not None:
        test = huggingface(root, test_split, image, label, label_kind, known)
    return held_out(train, test, str(root), test_fraction, resize, size, seed)


def torchvision_set(
    name: SetName, root: SetRoot, split: Literal["train", "test", "unlabeled"], download: Download
) -> Source:
    """Return a set as torchvision reads it.

    The test split of ImageNet is its validation images; only STL10 has unlabeled ones.

    Raises:
        MissingPath: the files are not there, or cannot be fetched; says what to do.
    """
    from torchvision import datasets  # the other sources do without

    options: dict[str, object]
    if name == "ImageNet":
        options = {"split": "val" if split == "test" else split}
    elif name == "STL10":
        options = {"split": split, "download": download}
    else:
        options = {"train": split == "train", "download": download}
    home = Path(str(root)).expanduser().absolute()
    missing = [path for path in (home, *home.parents) if not path.exists()]
    try:
        dataset = getattr(datasets, name)(root=str(home), **options)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        if missing:  # torchvision makes the folder before it tries the network
            shutil.rmtree(missing[-1], ignore_errors=True)
        if name == "ImageNet":
            fix = f"put ILSVRC2012_devkit_t12.tar.gz, _img_train.tar and _img_val.tar into {root}"
        elif download:
            fix = f"no network? Put torchvision's archive into {root}, or use data=photos"
        else:
            fix = (
                "fetch it with data.download=true (eval_data alone: eval_data.download=true), or "
                f"put it into {root}"
            )
        raise MissingPath(f"{name} is not in {root} ({reason}): {fix}") from error
    names = [n if isinstance(n, str) else n[0] for n in dataset.classes]
    if name == "ImageNet":
        paths, targets = zip(*dataset.samples, strict=True)
        return Files(StringArray.of(paths), "", np.asarray(targets, np.int64), names)
    images = dataset.data if name != "STL10" else dataset.data.transpose(0, 2, 3, 1)
    title = f"{name} {split}"
    if split == "unlabeled":
        return Arrays(images, title)
    targets = dataset.labels if name == "STL10" else dataset.targets
    return Arrays(images, title, np.asarray(targets, np.int64), names)


def labelled_torchvision(
    name: SetName, root: SetRoot, download: Download, resize: Count, size: Count
) -> LabelledPair:
    """Return the train and test splits of a torchvision set; raises as `torchvision_set`."""
    train = torchvision_set(name, root, "train", download)
    test = torchvision_set(name, root, "test", download)
    return LabelledPair(train, test, name, resize, size)
