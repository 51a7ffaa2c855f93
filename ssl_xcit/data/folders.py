"""Images in folders: any tree, or one folder a class. A large tree is listed once."""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.formats import (
    EXTENSIONS,
    HEAD,
    LeftOut,
    looked_at,
    readable_formats,
    told_by_ending,
)
from ssl_xcit.data.labels import named_classes
from ssl_xcit.data.names import Names
from ssl_xcit.data.sources import Files, LabelledPair, Source, held_out
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import default_cache

log = logging.getLogger(__name__)
FORMAT = 2  # of a kept listing
WORTH_KEEPING = 10_000  # entries from which on the listing is kept
SETTLED = 2_000_000_000  # nanoseconds after which a folder's time tells of every change
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "validation", "valid")  # the first that is there is used
OWN = (  # what is in folders that are not looked into: runs, pictures, virtual environments
    {b"run.json", b"config.yaml", b"images.npz"}, {b"run.json", b"config.yaml", b"checkpoints"},
    {b"visualize.json", b"index.html"}, {b"pyvenv.cfg"},
)  # fmt: skip
said: set[str] = set()  # what this process has told, once


def folder(root: str | Sequence[str] | None, labels: bool = False, out: object = None) -> Files:
    """All images below one folder or several, in any tree.

    Args:
        root: one folder or several.
        labels: the first folder below `root` is the class.
        out: a folder of results, which is not looked into; anything else means nothing.

    Raises:
        MissingPath: a folder that is missing or has no image.
        UserError: labels of several roots, or see `class_folders`.
    """
    roots = [root] if isinstance(root, str | Path | int) else list(root or [])
    if not roots or None in roots:
        raise MissingPath(f"root={root}: name at least one folder of images")
    if labels:
        if len(roots) > 1:
            raise UserError(f"root={roots}: labels need one root, with one folder a class")
        return class_folders(str(roots[0]))
    homes = [str(Path(str(each)).expanduser()) for each in roots]
    found = [image_files(home, out) for home in homes]
    for home, names in zip(homes, found, strict=True):
        say_split(Path(home), names)
    if len(homes) == 1:
        return Files(found[0], homes[0])
    paths = Names.of(
        os.path.join(h, n) for h, names in zip(homes, found, strict=True) for n in names
    )
    return Files(paths, homes=homes)


def say_split(root: Path, files: Names) -> None:
    """Say once that training on all of a folder includes its test images."""
    if split := split_of(root, files):
        names = " and ".join(p.name for p in split)
        say_once(
            f"{root} holds {names}, and all of their images are used; root={split[0]} takes the "
            "training images alone"
        )


def say_once(sentence: str) -> None:
    """A warning, once in a process."""
    if sentence not in said:
        said.add(sentence)
        log.warning("%s", sentence)


def image_files(root: str | Path, out: object = None) -> Names:
    """Every image file below a folder, relative to it and sorted.

    An image is told by the ending of its name, and without a known one by its first bytes. Hidden
    files and folders, run folders, caches, virtual environments and `out` are not looked into. What
    is left out is said once.

    A listing of many files is kept in the cache folder with the time of change of every folder,
    and made again when one differs.

    Raises:
        MissingPath: no such folder, or no image in it.
        UserError: it is a file.
    """
    root = Path(root).expanduser()
    if root.is_file():
        raise UserError(
            f"root={root} is a file: name its folder, or a list or an array as data.file"
        )
    if not root.is_dir():
        raise MissingPath(f"root={root}: no such folder")
    real = os.path.realpath(root)
    skipped = excluded(real, out)
    formats = " ".join(readable_formats()).encode()  # which decide what is left out
    parts = [b"%d" % FORMAT, formats, os.fsencode(real), *sorted(skipped)]
    key = hashlib.sha256(b"\0".join(parts))
    file = default_cache() / "folders" / f"{key.hexdigest()[:16]}.npz"
    kept = load_arrays(file)
    if kept is not None and is_current(kept, os.fsencode(real)):
        if left_out := kept["left_out"].tobytes().decode("utf-8", "surrogateescape"):
            say_once(f"{root}: left out: {left_out}")
        return Names(kept["names"], kept["ends"])
    found, left_out, folders, settled = scan(real, skipped)
    names = Names.of(found)
    if not found:
        others = f"left out: {left_out}" if left_out else "no files"
        raise MissingPath(f"root={root}: no images in it or below ({others})")
    if left_out:
        say_once(f"{root}: left out: {left_out}")
    if settled and len(found) + len(folders) >= WORTH_KEEPING:
        paths = Names.of(folders)
        times = np.fromiter(folders.values(), np.int64, len(folders))
        arrays = {"names": names.content, "ends": names.ends, "folders": paths.content}
        arrays |= {"folder_ends": paths.ends, "times": times, "scanned": np.array(time.time_ns())}
        arrays |= {"left_out": Names.of([left_out]).content}
        save_arrays(file, arrays)
    return names


def excluded(real: str, out: object) -> set[bytes]:
    """Absolute folders below `real` that hold results or caches."""
    wanted = [os.path.realpath(default_cache())]
    if isinstance(out, str):
        wanted.append(os.path.realpath(Path(out).expanduser()))
    return {os.fsencode(p) for p in wanted if p.startswith(os.path.join(real, ""))}


def scan(real: str, skipped: set[bytes]) -> tuple[list[bytes], str, dict[bytes, int], bool]:
    """(image files, what was left out, time of change of each folder in ns, whether no file had to
    be judged that is empty or cannot be read, as one that is being copied), relative paths.

    Links to folders are followed, into each folder once; what cannot be looked at is left out, and
    said.
    """
    found: list[bytes] = []
    left_out, own = LeftOut(), []
    folders: dict[bytes, int] = {}
    seen, closed, settled = set(), [], True
    waiting, shown = [b""], time.monotonic()
    home = os.fsencode(real)
    while waiting:
        inside = waiting.pop()
        path = os.path.join(home, inside)
        below = []
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:  # a link back, or a second way in
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(b".")]
        except OSError:  # no permission, or gone
            closed.append(inside)
            continue
        folders[inside] = status.st_mtime_ns
        names = {entry.name for entry in listed}
        if inside and (path in skipped or any(own_files <= names for own_files in OWN)):
            own.append(inside)
            continue
        for entry in listed:
            name = os.path.join(inside, entry.name)
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                closed.append(name)
                continue
            if is_folder:
                below.append(name)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(name)
            else:
                is_image, remedy = False, told_by_ending(entry.name)
                if remedy is None:
                    head = head_of(entry.path)
                    settled = settled and bool(head)
                    is_image, remedy = looked_at(head)
                if is_image:
                    found.append(name)
                else:
                    left_out.add(entry.name, remedy)
        waiting += sorted(below, reverse=True)
        if sys.stderr.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\rlisting {len(found):,} images\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if closed:
        first = os.fsdecode(os.path.join(home, closed[0]))
        log.warning("%d folders or links cannot be looked into, such as %s", len(closed), first)
    sentence = left_out.sentence()
    if own:
        first = os.fsdecode(own[0])
        runs = (
            f"{len(own):,} folder{'s' * (len(own) > 1)} of runs, results or caches, such as {first}"
        )
        sentence = f"{sentence}, {runs}" if sentence else runs
    return sorted(found), sentence, folders, settled


def head_of(path: bytes) -> bytes | None:
    """The first bytes of a file; None where it cannot be read, or is a pipe or a device."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return None


def is_current(kept: dict[str, np.ndarray], home: bytes) -> bool:
    """Whether no folder has changed since it was listed."""
    try:
        folders, times = Names(kept["folders"], kept["folder_ends"]), kept["times"]
        if int(kept["scanned"]) - int(times.max()) < SETTLED:
            return False  # a change within the clock's grain would not show
        return all(
            os.stat(os.path.join(home, os.fsencode(name))).st_mtime_ns == t
            for name, t in zip(folders, times.tolist(), strict=True)
        )
    except (KeyError, ValueError, OSError):
        return False


def split_of(root: Path, files: Names) -> list[Path]:
    """Training folder, then test folders, where a folder holds these instead of classes; else
    empty. Beside others they are a split where they hold folders themselves, and not images.

    Args:
        root: the folder.
        files: images in it, relative.
    """
    deep: dict[str, bool] = {}  # first folder -> whether all of its images lie in folders
    for name in files:
        first, inside, rest = name.partition(os.sep)
        if inside:
            deep[first] = deep.get(first, True) and os.sep in rest
    known = {name.lower(): name for name in deep}
    train = [known[name] for name in TRAIN_NAMES if name in known]
    test = [known[name] for name in TEST_NAMES if name in known]
    test.sort(key=lambda name: not deep[name])  # of several those with classes first
    if len(train) != 1 or not test:
        return []
    alone = len(deep) == 1 + len(test)
    if alone or (deep[train[0]] and any(deep[name] for name in test)):
        return [root / name for name in (*train, *test)]
    return []


def class_folders(root: str | Path, class_names: Sequence[str] | None = None) -> Files:
    """Images whose class is the first folder below `root`.

    Args:
        root: holds one folder a class.
        class_names: ids by name, when another set has fixed them; a class beyond those gets the ids
            after.

    Raises:
        MissingPath: `root` is missing or has no images.
        UserError: labels are asked for where there are none: images lie in `root` itself, it has
            one folder only, or its folders are a training and a test set.
    """
    root = Path(root).expanduser()
    names = image_files(root)
    if split := split_of(root, names):
        raise UserError(
            f"root={root} holds {' and '.join(p.name for p in split)}, which are no classes: name "
            f"one of them, such as root={split[0]}"
        )
    folders = [name.partition(os.sep)[0] for name in names]
    loose = [name for name in names if os.sep not in name]
    if loose:
        raise UserError(
            f"root={root}: no labels: {len(loose):,} images lie in it, outside class "
            f"folders (such as {loose[0]}); one folder a class is needed, or evaluate without: "
            "eval_data=none"
        )
    labels, known = named_classes(folders, class_names or (), key=None)
    if len(known) < 2:
        raise UserError(
            f"root={root}: one class only ({known[0]}); name the folder that holds the "
            "class folders"
        )
    return Files(names, str(root), labels, known)


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
        root: one folder a class; or a training and a test folder (`TRAIN_NAMES`, `TEST_NAMES`) that
            hold these.
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
    home = Path(root).expanduser()
    if test_root is None and (split := split_of(home, image_files(home))):
        root, test_root = map(str, split[:2])
        unused = "".join(f"; {p.name} is not used" for p in split[2:])
        say_once(
            f"eval_data.root={home}: {split[0].name} has the training images and {split[1].name} "
            f"the test images{unused}; eval_data.root and eval_data.test_root name others"
        )
    train: Source = class_folders(root)
    test = None if test_root is None else class_folders(test_root, train.class_names)
    name = f"{root} ({len(train.class_names)} class folders)"
    return held_out(train, test, name, test_fraction, resize, size, seed)
