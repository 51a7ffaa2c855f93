"""Labels of images: class ids (from names, too), several labels an image, or numbers to predict.

Class names from folders, lists, tables, shards and arrays pass through `normalised`, so that two
spellings that look alike are one class.
"""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from ssl_xcit.errors import MissingPath, UserError

Labels = Int64[np.ndarray, " N"]
AnyLabels = Shaped[np.ndarray, "N *K"]  # of any kind, see `label_kind`
MAX_NAMES = 1_000_000
log = logging.getLogger(__name__)


def normalised(name: str) -> str:
    """Return a class name in Unicode's composed form (NFC), without white space at its ends."""
    return unicodedata.normalize("NFC", name).strip().strip("\ufeff\u200b").strip()


def natural(name: str) -> tuple[int, int, str]:
    """Return a key that sorts numbers by value, then words."""
    return (0, int(name), "") if name.isascii() and name.isdecimal() else (1, 0, name)


def named_classes(
    names: Sequence[str], known: Sequence[str] = (), key: Callable[[str], Any] | None = natural
) -> tuple[Labels, list[str]]:
    """Return (class ids, class names) of images by the name of their class.

    Args:
        names: of the class of each image; normalised here.
        known: class names whose ids another set has fixed; others get the ids after.
        key: to sort new names by; None: as text.
    """
    spellings: dict[str, str] = {name: normalised(name) for name in set(names)}
    classes = list(known)
    new = set(spellings.values()) - set(classes)
    classes += sorted(new, key=key) if key else sorted(new)
    ids = {name: i for i, name in enumerate(classes)}
    log_similar_names(spellings, new)
    return np.array([ids[spellings[name]] for name in names], np.int64), classes


def log_similar_names(spellings: dict[str, str], names: set[str]) -> None:
    """Log which spellings were taken for one class, and which classes differ by capitals only."""
    merged, cases = defaultdict(set), defaultdict(set)
    for spelling, name in spellings.items():
        merged[name].add(spelling)
    for name in names:
        cases[name.casefold()].add(name)
    for groups, verdict in (
        (merged, "are one class"),
        (cases, "are two classes: only capitals differ"),
    ):
        similar = [sorted(group) for group in groups.values() if len(group) > 1]
        if similar:
            more = f" (and {len(similar) - 1} more)" if len(similar) > 1 else ""
            pair = " and ".join(map(ascii, similar[0][:2]))
            log.warning("the labels %s %s%s", pair, verdict, more)


def numbered(labels: np.ndarray) -> list[str]:
    """Return class ids as names of classes without any; empty where ids are no small numbers."""
    if label_kind(labels) != "classes" or not len(labels) or labels.max() >= MAX_NAMES:
        return []
    return [str(i) for i in range(int(labels.max()) + 1)]


def label_kind(labels: np.ndarray | None) -> str:
    """Return `classes` for (N,) whole numbers, `several` for (N, K) of 0 and 1, else `numbers`."""
    if labels is None or (labels.ndim == 1 and labels.dtype.kind in "ui"):
        return "classes"
    return "several" if labels.ndim == 2 and labels.dtype.kind in "uib" else "numbers"


def labels_from(
    values: np.ndarray, count: int, where: str, kind: str | None = None, known: Sequence[str] = ()
) -> tuple[AnyLabels, list[str]]:
    """Return (labels, class names) from an array or a column of a table.

    Args:
        values: (N,) or (N, 1) class ids, names or numbers; (N, K) of 0 and 1 where an image may
            have several labels; (N, D) numbers of floating point.
        count: N.
        where: what messages call them, `data.labels=FILE`.
        kind: `classes` or `numbers`, where the type leaves it open; None: by the type.
        known: class names whose ids another set has fixed.

    Raises:
        UserError: another number of images, values that mean nothing, or whole numbers stored as
            floating point without `kind`.
    """
    values = np.asarray(values)
    if values.dtype.kind == "O" and all(isinstance(v, str) for v in values.reshape(-1)):
        values = values.astype(str)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape[:1] != (count,) or values.ndim > 2 or values.dtype.kind not in "uibfUST":
        raise UserError(
            f"{where}: shape {values.shape} of {values.dtype}; ({count},) class ids are needed, "
            f"class names or numbers, or ({count}, K) of 0 and 1"
        )
    if values.dtype.kind in "UST":
        if values.ndim == 2:
            raise UserError(f"{where}: {values.shape[1]} columns of text; one name an image")
        decoded = [v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()]
        if missing := sum(not normalised(word) for word in decoded):
            raise UserError(f"{where}: {missing:,} rows have no label")
        return named_classes(decoded, known)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise UserError(f"{where}: not all numbers are finite")
        whole = values.ndim == 1 and bool((values == np.rint(values)).all())
        if kind is None and whole and len(values):
            raise UserError(
                f"{where}: whole numbers stored as floating point: are they classes or quantities? "
                "Set eval_data.label_kind=classes or eval_data.label_kind=numbers"
            )
        if kind == "classes" and not whole:
            raise UserError(f"{where}: label_kind=classes, and not all are whole numbers")
        if kind != "classes":
            return values.astype(np.float64), []
    elif kind == "numbers":
        return values.astype(np.float64), []
    if values.ndim == 2 and not np.isin(values, (0, 1)).all():
        raise UserError(f"{where}: ({count}, K) labels are 0 or 1 each")
    if values.size and values.min() < 0:
        raise UserError(f"{where}: class ids start at 0, and one is {values.min()}")
    labels = values.astype(np.int64)
    return labels, numbered(labels)


def load_npy(file: str, key: str) -> np.ndarray:
    """Map a `.npy` file into memory; no pickles.

    Raises:
        MissingPath: no such file.
        UserError: it is no such file, or holds Python objects.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingPath(f"{key}={file}: no such file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}={file}: not a .npy file of numbers or text ({reason})") from error
