"""Where images come from, behind one small protocol. Labels are there only when asked for by
name.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from ssl_xcit.data.decode import BadImage, Pixels, read_image, to_rgb
from ssl_xcit.errors import MissingPath, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
Labels = Int64[np.ndarray, " N"]


@runtime_checkable
class Source(Protocol):
    """A finite set of images with random access."""

    labels: Labels | None  # class ids, or None
    class_names: Sequence[str]  # by class id; empty without labels

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """(H, W, 3) RGB.

        Raises:
            BadImage: the image cannot be used.
        """
        ...

    def name(self, index: int) -> str:
        """What a message calls the image: its path, or its place in the set."""
        ...


@dataclass(frozen=True)
class LabelledPair:
    """Labelled images to learn the classes from, and others to be tested on.

    They are looked at with the short side at `resize` pixels and the central `size` x `size` of
    that.
    """

    train: Source
    test: Source
    name: str
    resize: int
    size: int


class Files:
    """Image files by path.

    Args:
        paths: the files.
        labels: their class ids, or None.
        class_names: by class id.
    """

    def __init__(
        self, paths: Sequence[str], labels: Labels | None = None, class_names: Sequence[str] = ()
    ):
        self.paths = np.asarray(
            paths
        )  # one block of memory: workers share it, where a list is copied piece by piece
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Pixels:
        """Decode the file; raises BadImage."""
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])


class Decoded:
    """A torchvision data set (PIL images or arrays with a class id)."""

    def __init__(self, dataset: Sequence, labels: Labels | None, class_names: Sequence[str] = ()):
        self.dataset = dataset
        self.labels = labels
        self.class_names: Sequence[str] = tuple(class_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Pixels:
        """The stored image; raises BadImage."""
        try:
            return to_rgb(self.dataset[index][0])
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """Its place in the set."""
        return f"{type(self.dataset).__name__}[{index}]"


class Subset:
    """Some images of a source.

    Args:
        source: the images.
        indices: which, in the new order.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Pixels:
        """As the source reads it."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.indices[index]))


def image_files(root: str | Path) -> list[str]:
    """Every image file below a folder, sorted by path; hidden files and folders are left out.

    Raises:
        MissingPath: no such folder, or no image in it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise MissingPath(f"root={root}: no such folder")
    found, others, seen = [], 0, set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back, or a second way in
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.join(folder, name))
            else:
                others += 1
    if not found:
        raise MissingPath(
            f"root={root}: no images in it or below ({others:,} other files); "
            f"looked for {' '.join(EXTENSIONS)}"
        )
    return sorted(found)


def folder(root: str | Sequence[str]) -> Files:
    """All images below one folder or several; sub-folders mean nothing, so any tree will do.

    Raises:
        MissingPath: a folder that is missing or has no image.
    """
    roots = [root] if isinstance(root, str | Path | int) else list(root)
    if not roots:
        raise MissingPath("root=[]: name at least one folder of images")
    return Files([path for each in roots for path in image_files(str(each))])


def class_folders(root: str | Path, class_names: Sequence[str] | None = None) -> Files:
    """Images whose class is the first folder below `root`.

    Args:
        root: holds one folder a class.
        class_names: ids by name, when another set has fixed them; a class beyond those gets the ids
            after.

    Raises:
        MissingPath: `root` is missing or has no images.
        UserError: labels are asked for where there are none: images lie in `root` itself, or it
            has one folder only.
    """
    root = Path(root).expanduser()
    paths = image_files(root)
    folders = [Path(path).relative_to(root).parts[0] for path in paths]
    loose = [path for path, name in zip(paths, folders, strict=True) if Path(path).parent == root]
    if loose:
        raise UserError(
            f"root={root}: no labels: {len(loose):,} images lie in it, outside class "
            "folders (such as "
            f"{Path(loose[0]).name}); one folder a class is needed, or evaluate without: "
            "eval_data=none"
        )
    known = list(class_names or [])
    known += sorted(set(folders) - set(known))
    if len(known) < 2:
        raise UserError(
            f"root={root}: one class only ({known[0]}); name the folder that holds the "
            "class folders"
        )
    ids = {name: i for i, name in enumerate(known)}
    return Files(paths, np.array([ids[name] for name in folders], dtype=np.int64), known)


def stratified(labels: Labels, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """A mask that picks of each class the same share: at least one image where it has two, never
    all.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"fraction={fraction}: a share in (0, 1)")
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return chosen


def labelled_folders(
    root: str | None,
    test_root: str | None = None,
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """Labelled images in class folders; without `root` there are none, and evaluation is off.

    Args:
        root: one folder a class.
        test_root: the same classes, other images; without it a share of `root` is held out.
        test_fraction: that share.
        resize: short side in pixels.
        size: side of the central square.
        seed: of the choice.
    """
    if root is None:
        if test_root is not None:
            raise UserError("eval_data.test_root is given without eval_data.root; give both")
        return None
    train: Source = class_folders(root)
    test: Source
    if test_root is None:
        assert train.labels is not None
        chosen = stratified(train.labels, test_fraction, seed)
        train, test = (Subset(train, np.flatnonzero(mask)) for mask in (~chosen, chosen))
    else:
        test = class_folders(test_root, train.class_names)
    name = f"{root} ({len(train.class_names)} class folders)"
    return LabelledPair(train, test, name, resize, size)


def torchvision_set(name: str, root: str, split: str, download: bool) -> Decoded:
    """CIFAR10, CIFAR100, STL10 or ImageNet as torchvision reads them.

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
    labels = getattr(dataset, "labels", None) if name == "STL10" else dataset.targets
    known = None if split == "unlabeled" else np.asarray(labels, dtype=np.int64)
    names = [n if isinstance(n, str) else n[0] for n in dataset.classes]
    return Decoded(dataset, known, [] if known is None else names)


def labelled_torchvision(
    name: str, root: str, download: bool, resize: int, size: int
) -> LabelledPair:
    """The train and test parts of a torchvision set; raises as `torchvision_set`."""
    parts = [torchvision_set(name, root, part, download) for part in ("train", "test")]
    return LabelledPair(parts[0], parts[1], name, resize, size)


def no_labels() -> None:
    """No labelled images: k-NN and linear probe are off."""
