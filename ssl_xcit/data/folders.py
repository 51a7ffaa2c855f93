"""Images in folders: any tree, or one folder a class; the listing of a large tree is cached."""

import glob
import hashlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from ssl_xcit.data.cache import load_arrays, save_arrays
from ssl_xcit.data.formats import (
    EXTENSIONS,
    HEAD,
    SkippedFiles,
    readable_by_head,
    readable_formats,
    remedy_by_ending,
)
from ssl_xcit.data.labels import named_classes
from ssl_xcit.data.sources import (
    Files,
    LabelledPair,
    Place,
    Places,
    Seed,
    Source,
    TestFraction,
    as_places,
    held_out,
)
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.files import default_cache
from ssl_xcit.utils.validation import PLACE, Count, Text

log = logging.getLogger(__name__)
FORMAT = 2  # of a cached listing
WORTH_KEEPING = 10_000  # entries from which on a listing is cached
SETTLED = 2_000_000_000  # nanoseconds after which a folder's time tells of every change
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "validation", "valid")  # the first that is there is used
OWN = (  # files that mark folders to skip: runs, pictures, virtual environments
    {b"run.json", b"config.yaml", b"images.npz"}, {b"run.json", b"config.yaml", b"checkpoints"},
    {b"visualize.json", b"index.html"}, {b"predict.json", b"predictions.csv"}, {b"pyvenv.cfg"},
)  # fmt: skip
warned: set[str] = set()  # warnings that this process has logged


def folder(
    root: Places, labels: Annotated[bool, PLACE] = False, out: Annotated[object, PLACE] = None
) -> Files:
    """Return all images below one folder or several, in any tree.

    With `labels` the first folder below `root` is the class. `out` is a folder of results, which is
    skipped; anything but text has no effect.

    Raises:
        MissingPath: a folder that is missing or has no image.
        UserError: labels of several roots, or see `class_folders`.
    """
    roots = as_places(root)
    if not roots:
        raise MissingPath(f"root={root}: name at least one folder of images")
    if labels:
        if len(roots) > 1:
            raise UserError(f"root={roots}: labels need one root, with one folder a class")
        return class_folders(str(roots[0]))
    homes = [str(Path(str(root)).expanduser()) for root in roots]
    names = [image_files(home, out) for home in homes]
    for home, inside in zip(homes, names, strict=True):
        if split := split_of(Path(home), inside):
            parts = " and ".join(p.name for p in split)
            warn_once(
                f"{home} holds {parts}, and all of their images are used; root={split[0]} takes "
                "the training images alone"
            )
    if len(homes) == 1:
        return Files(names[0], homes[0])
    paths = (
        os.path.join(home, n) for home, inside in zip(homes, names, strict=True) for n in inside
    )
    return Files(StringArray.of(paths), homes=homes)


def warn_once(sentence: str) -> None:
    """Log a warning once in a process."""
    if sentence not in warned:
        warned.add(sentence)
        log.warning("%s", sentence)


def image_files(root: str | Path, out: object = None) -> StringArray:
    """Return the paths of all image files below a folder, relative to it and sorted.

    Images are told by the ending of their name, and without a known one by their first bytes.
    Hidden files and folders, run folders, caches, virtual environments and `out` are skipped. A
    warning counts what was left out.

    A listing of many files is cached with the time of change of every folder, and made again when
    one differs.

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
    cached = load_arrays(file)
    if cached is not None and is_current(cached, os.fsencode(real)):
        if left_out := cached["left_out"].tobytes().decode("utf-8", "surrogateescape"):
            warn_once(f"{root}: left out: {left_out}")
        return StringArray(cached["names"], cached["ends"])
    paths, left_out, folders, settled = scan(real, skipped)
    names = StringArray.of(paths)
    if not paths:
        others = f"left out: {left_out}" if left_out else "no files"
        raise MissingPath(f"root={root}: no images in it or below ({others})")
    if left_out:
        warn_once(f"{root}: left out: {left_out}")
    if settled and len(paths) + len(folders) >= WORTH_KEEPING:
        inside = StringArray.of(folders)
        times = np.fromiter(folders.values(), np.int64, len(folders))
        arrays = {"names": names.content, "ends": names.ends, "folders": inside.content}
        arrays |= {"folder_ends": inside.ends, "times": times, "scanned": np.array(time.time_ns())}
        arrays |= {"left_out": StringArray.of([left_out]).content}
        save_arrays(file, arrays)
    return names


def named_images(wanted: Text | Sequence[Text], out: object = None) -> list[Path]:
    """Return the files, each once, that `images=` names: files, folders with anything below but for
    `out` and what `image_files` skips, and patterns.

    Raises:
        MissingPath: no such file or folder, or a pattern that fits nothing.
    """
    paths: list[Path] = []
    for word in map(str, wanted if isinstance(wanted, list | tuple) else [wanted]):
        path = Path(word).expanduser()
        if path.is_dir():
            try:
                here = [path / name for name in image_files(path, out)]
            except MissingPath as error:  # its message names root
                raise MissingPath(str(error).replace("root=", "images=", 1)) from error
        elif path.is_file():
            here = [path]
        else:
            fitting = sorted(glob.glob(str(path), recursive=True))
            here = [Path(name) for name in fitting if not Path(name).is_dir()]
        if not here:
            raise MissingPath(
                f"images={word}: no file fits; name a file, a folder, or a pattern in quotes, such "
                "as images='DIR/**/*.jpg'"
            )
        paths += here
    return list(dict.fromkeys(paths))


def excluded(real: str, out: object) -> set[bytes]:
    """Return absolute folders below `real` that hold results or caches."""
    outputs = [os.path.realpath(default_cache())]
    if isinstance(out, str):
        outputs.append(os.path.realpath(Path(out).expanduser()))
    return {os.fsencode(p) for p in outputs if p.startswith(os.path.join(real, ""))}


def scan(real: str, skipped: set[bytes]) -> tuple[list[bytes], str, dict[bytes, int], bool]:
    """List a tree.

    Links to folders are followed, into each folder once; a warning names what cannot be opened.

    Returns:
        Relative paths of the image files, a sentence about the files that were left out, the time
        of change of each folder in ns, and whether no file without a known ending was empty or
        closed, as one that is being copied.
    """
    images: list[bytes] = []
    skipped_files, own = SkippedFiles(), []
    folders: dict[bytes, int] = {}
    seen, closed, settled = set(), [], True
    waiting, last_shown = [b""], time.monotonic()
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
                images.append(name)
            else:
                is_image, remedy = False, remedy_by_ending(entry.name)
                if remedy is None:
                    head = head_of(entry.path)
                    settled = settled and bool(head)
                    is_image, remedy = readable_by_head(head)
                if is_image:
                    images.append(name)
                else:
                    skipped_files.add(entry.name, remedy)
        waiting += sorted(below, reverse=True)
        if sys.stderr.isatty() and time.monotonic() - last_shown > 0.5:
            last_shown = time.monotonic()
            print(f"\rlisting {len(images):,} images\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if closed:
        first = os.fsdecode(os.path.join(home, closed[0]))
        log.warning("%d folders or links cannot be opened, such as %s", len(closed), first)
    sentence = skipped_files.sentence()
    if own:
        first = os.fsdecode(own[0])
        runs = (
            f"{len(own):,} folder{'s' * (len(own) > 1)} of runs, results or caches, such as {first}"
        )
        sentence = f"{sentence}, {runs}" if sentence else runs
    return sorted(images), sentence, folders, settled


def head_of(path: bytes) -> bytes | None:
    """Return the first bytes of a file; None: it cannot be read, or is a pipe or a device."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return None


def is_current(cached: dict[str, np.ndarray], home: bytes) -> bool:
    """Whether no folder has changed since it was listed."""
    try:
        folders, times = StringArray(cached["folders"], cached["folder_ends"]), cached["times"]
        if int(cached["scanned"]) - int(times.max()) < SETTLED:
            return False  # a change within the clock's grain would not show
        return all(
            os.stat(os.path.join(home, os.fsencode(name))).st_mtime_ns == t
            for name, t in zip(folders, times.tolist(), strict=True)
        )
    except (KeyError, ValueError, OSError):
        return False


def split_of(root: Path, files: StringArray) -> list[Path]:
    """Return the training folder, then test folders, if a folder holds these instead of classes,
    else nothing. Beside other folders they are a split only if they hold folders themselves.
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
    """Return images whose class is the first folder below `root`.

    `class_names` are those whose ids another set has fixed; further classes get the ids after.

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
    root: Place,
    test_root: Place = None,
    test_fraction: TestFraction = 0.2,
    resize: Count = 256,
    size: Count = 224,
    seed: Seed = 0,
) -> LabelledPair | None:
    """Return labelled images in class folders; None without `root`: evaluation is off.

    `root` holds one folder a class, or a training and a test folder (`TRAIN_NAMES`, `TEST_NAMES`)
    that hold these. Without `test_root` a share of `root` is held out, see `held_out`.
    """
    if root is None:
        if test_root is not None:
            raise UserError("eval_data.test_root is given without eval_data.root; give both")
        return None
    home = Path(str(root)).expanduser()
    if test_root is None and (split := split_of(home, image_files(home))):
        root, test_root = map(str, split[:2])
        unused = "".join(f"; {p.name} is not used" for p in split[2:])
        warn_once(
            f"eval_data.root={home}: {split[0].name} has the training images and {split[1].name} "
            f"the test images{unused}; eval_data.root and eval_data.test_root name others"
        )
    train: Source = class_folders(str(root))
    test = None if test_root is None else class_folders(str(test_root), train.class_names)
    name = f"{root} ({len(train.class_names)} class folders)"
    return held_out(train, test, name, test_fraction, resize, size, seed)
