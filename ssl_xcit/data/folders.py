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
from ssl_xcit.data.names import Names
from ssl_xcit.data.sources import Files, LabelledPair, Source, held_out
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import default_cache

log = logging.getLogger(__name__)
EXTENSIONS = tuple(b".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif .npy".split())
WORTH_KEEPING = 10_000  # entries from which on the listing is kept
SETTLED = 2_000_000_000  # nanoseconds after which a folder's time tells of every change


def folder(root: str | Sequence[str] | None, labels: bool = False) -> Files:
    """All images below one folder or several, in any tree.

    Args:
        root: one folder or several.
        labels: the first folder below `root` is the class.

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
    if len(homes) == 1:
        return Files(image_files(homes[0]), homes[0])
    return Files(Names.of(os.path.join(h, n) for h in homes for n in image_files(h)))


def image_files(root: str | Path) -> Names:
    """Every image file below a folder, relative to it and sorted; hidden files and folders are left
    out.

    A listing of many files is kept in the cache folder with the time of change of every folder,
    and made again when one differs.

    Raises:
        MissingPath: no such folder, or no image in it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise MissingPath(f"root={root}: no such folder")
    real = os.path.realpath(root)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    file = default_cache() / "folders" / f"{key}.npz"
    kept = load_arrays(file)
    if kept is not None and is_current(kept, os.fsencode(real)):
        return Names(kept["names"], kept["ends"])
    found, others, folders = scan(real)
    names = Names.of(found)
    if not found:
        known = " ".join(e.decode() for e in EXTENSIONS)
        raise MissingPath(
            f"root={root}: no images in it or below ({others:,} other files); looked for {known}"
        )
    if len(found) + len(folders) >= WORTH_KEEPING:
        paths = Names.of(folders)
        times = np.fromiter(folders.values(), np.int64, len(folders))
        arrays = {"names": names.content, "ends": names.ends, "folders": paths.content}
        arrays |= {"folder_ends": paths.ends, "times": times, "scanned": np.array(time.time_ns())}
        save_arrays(file, arrays)
    return names


def scan(real: str) -> tuple[list[bytes], int, dict[bytes, int]]:
    """(image files, number of other files, time of change of each folder in ns), relative paths.

    Links to folders are followed, into each folder once; what cannot be looked at is left out, and
    said.
    """
    found: list[bytes] = []
    others, folders, seen, closed = 0, {}, set(), []
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
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
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
                        others += 1
        except OSError:  # no permission, or gone
            closed.append(inside)
            continue
        folders[inside] = status.st_mtime_ns
        waiting += sorted(below, reverse=True)
        if sys.stderr.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\rlisting {real}: {len(found):,} images\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if closed:
        first = os.fsdecode(os.path.join(home, closed[0]))
        log.warning("%d folders or links cannot be looked into, such as %s", len(closed), first)
    return sorted(found), others, folders


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
    names = image_files(root)
    folders = [name.partition(os.sep)[0] for name in names]
    loose = [name for name in names if os.sep not in name]
    if loose:
        raise UserError(
            f"root={root}: no labels: {len(loose):,} images lie in it, outside class "
            f"folders (such as {loose[0]}); one folder a class is needed, or evaluate without: "
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
    labels = np.fromiter((ids[name] for name in folders), np.int64, len(folders))
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
    test = None if test_root is None else class_folders(test_root, train.class_names)
    name = f"{root} ({len(train.class_names)} class folders)"
    return held_out(train, test, name, test_fraction, resize, size, seed)
