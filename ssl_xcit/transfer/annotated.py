"""What segmentation and detection data have in common: files in folders, what was left out, and
annotations that were drawn on an image before or after its orientation was applied.
"""

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ssl_xcit.data.decode import orientation_of
from ssl_xcit.data.folders import TEST_NAMES, TRAIN_NAMES
from ssl_xcit.data.formats import readable_formats
from ssl_xcit.data.labels import normalised
from ssl_xcit.data.picture import BadImage, as_bad_image
from ssl_xcit.data.sources import Files, some_rows
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.terminal import printable

log = logging.getLogger(__name__)
EXAMPLES = 3  # in a sentence
FEW = 5  # names, likewise
T = TypeVar("T")


class Misfit(BadImage):
    """Annotations that can be read, and do not fit their image or the classes."""


def existing_folder(root: object, key: str = "data.root") -> Path:
    """Return a folder that a setting names.

    Raises:
        MissingPath: there is none.
    """
    home = Path(str(root)).expanduser()
    if not home.is_dir():
        raise MissingPath(f"{key}={root}: no such folder")
    return home


def inner_folder(home: Path, fits: Callable[[Path], T | None]) -> tuple[Path, T] | None:
    """Return the folder, or the only one in it and so on, that fits, and what was found there:
    archives unpack to `VOCdevkit/VOC2012/`. None: there is none.
    """
    for _ in range(3):
        if (found := fits(home)) is not None:
            return home, found
        inside = [p for p in home.iterdir() if p.is_dir() and not p.name.startswith(".")]
        if len(inside) != 1:
            return None
        home = inside[0]
    return None


def parts_in(home: Path, first: str, second: str) -> dict[str, tuple[str, str]]:
    """Return the pairs of folders below `home` for training and for testing, by `train` and `test`:
    `first/train` and `second/train`, or `train/first` and `train/second`, or for training `first`
    and `second` themselves. Of several for testing the first of `TEST_NAMES` is used.
    """
    whole = all((home / kind).is_dir() for kind in (first, second))
    parts: dict[str, tuple[str, str]] = {}
    names = {p.name.lower(): p.name for p in (home / first if whole else home).iterdir()}
    for part, usual in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        for name in (names[word] for word in usual if word in names):
            pair = tuple(
                f"{kind}/{name}" if whole else f"{name}/{kind}" for kind in (first, second)
            )
            if part not in parts and all((home / folder).is_dir() for folder in pair):
                parts[part] = pair[0], pair[1]
    if "train" not in parts:
        return {"train": (first, second)} if whole else {}
    return parts


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error.reason})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def listed_names(home: Path) -> list[str] | None:
    """Return class names, a line each, of `classes.txt` or files of such names; None: no file."""
    for name in ("classes.txt", "class_names.txt", "labels.txt"):
        if (home / name).is_file():
            return lines_of(home / name)
    return None


def distinct_names(names: Sequence[object], where: str) -> tuple[str, ...]:
    """Return class names in one spelling.

    Raises:
        UserError: one is there twice, or empty.
    """
    made = tuple(normalised(str(name)) for name in names)
    twice = [name for name, count in Counter(made).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the class {twice[0]!r} is named twice; a name for each class")
    if "" in made:
        raise UserError(f"{where}: class {made.index('')} has no name")
    return made


def split_rows(rows: Sequence[T], fraction: float, seed: int, name: str) -> dict[str, list[T]]:
    """Hold a share of the rows out for testing.

    Raises:
        UserError: there are fewer than two.
    """
    if fraction == 0:
        return {"train": list(rows), "test": list(rows)}
    if len(rows) < 2:
        raise UserError(
            f"{name}: {len(rows)} image with annotations, and two are needed to hold one out; "
            "name others with data.test_root=DIR"
        )
    chosen = some_rows(len(rows), fraction, seed).tolist()
    return {
        "train": [row for row, test in zip(rows, chosen, strict=True) if not test],
        "test": [row for row, test in zip(rows, chosen, strict=True) if test],
    }


def warn_left_out(where: str, left_out: Sequence[str]) -> None:
    """Log one warning about all that is not used, with examples."""
    if left_out:
        more = ", ..." if len(left_out) > EXAMPLES else ""
        log.warning(
            "%s: left out %s: %s%s",
            where, f"{len(left_out):,}", printable("; ".join(left_out[:EXAMPLES])), more,
        )  # fmt: skip


def warn_unlearnt(where: str, names: Sequence[str], train: np.ndarray, test: np.ndarray) -> None:
    """Log a warning about classes that only test images have.

    Args:
        where: the data set.
        names: K class names.
        train: (K,) whether the class is in training images.
        test: likewise in test images.
    """
    unlearnt = [names[k] for k in np.flatnonzero(test & ~train).tolist()]
    if unlearnt:
        log.warning(
            "%s: test images have %s that no training image has (%s): they count as missed",
            where, "a class" if len(unlearnt) == 1 else f"{len(unlearnt):,} classes", few(unlearnt),
        )  # fmt: skip


def check_known_classes(where: str, there: Sequence[str], own: Sequence[str]) -> None:
    """Raise UserError where images have classes that a head does not know.

    Args:
        where: the images.
        there: their classes.
        own: those of the head.
    """
    unknown = [name for name in there if name not in set(own)]
    if unknown:
        raise UserError(
            f"{where} has classes that the head does not know ({few(unknown)}): the images have "
            f"{len(there):,} ({few(there)}), and the head {len(own):,} ({few(own)}); name images "
            "of its classes with data.root=DIR"
        )


def few(names: Sequence[str]) -> str:
    """Return the first of some names."""
    return ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")


def orientation_between(
    images: Files, index: int, annotated: tuple[int, int], decoded: tuple[int, int]
) -> int:
    """Return the EXIF orientation, 1 to 8, that turns annotations as the decoded image was turned.

    Annotations of the size that the image is decoded to are taken as upright. Where height and
    width change places and the file says that it lies on its side, they are of its stored pixels.

    Args:
        images: where the file is.
        index: of the image.
        annotated: height and width that the annotations are for.
        decoded: height and width of the image, upright.

    Raises:
        BadImage: they do not fit.
    """
    if annotated == decoded:
        return 1
    if annotated == decoded[::-1]:
        with as_bad_image():
            file = Image.open(io.BytesIO(images.read(index)), formats=readable_formats())
            if (orientation := orientation_of(file)) > 4:
                return orientation
    raise Misfit(
        f"its annotations are for {annotated[1]} x {annotated[0]} pixels, and the image has "
        f"{decoded[1]} x {decoded[0]}"
    )


def digest_of_all(parts: Mapping[str, bytes | str]) -> str:
    """Return a SHA-256 of named parts."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        content = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(f"{name} {len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def stem_of(path: str) -> str:
    """Return a path without the ending of its name."""
    return os.path.splitext(path)[0]
