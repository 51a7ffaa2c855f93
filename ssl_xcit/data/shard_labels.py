"""Labels of tar shards: what `.cls` members hold when they are written, and mean when read.

A class name, which two sets agree on; or a class id, which is a position in the list of one set and
has its name in the `shards.json` beside the tar.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_xcit.data.folders import warn_once
from ssl_xcit.data.labels import Labels, named_classes, normalised, numbered
from ssl_xcit.data.remote import INDEX, names_by_tar
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError

MAX_LABEL = 200  # bytes of a .cls member


class ShardLabels(NamedTuple):
    """Classes of the images in tars."""

    labels: Labels | None  # class ids
    class_names: list[str]  # by class id
    ids: str = ""  # in `.cls`: "bare", "named" by an index; empty: none, or they are the names


class TarClasses(NamedTuple):
    """Classes of the images in tars, by name, or by id where no index names it."""

    texts: list[str]  # of each image
    names: list[str]  # by class id, of the first index
    kinds: dict[str, str]  # "ids", "words", "index", "numbering": a folder or tar of each kind


def class_texts(source: Source) -> Sequence[str]:
    """Return the class names for `.cls`; none where a reader could not tell one from an id, or from
    another name.
    """
    names = source.class_names
    clear = len(set(names)) == len(names) and all(
        name == normalised(name)
        and not name.isdecimal()
        and name == (encoded := name.encode("utf-8", "ignore")).decode()
        and 0 < len(encoded) < MAX_LABEL
        for name in names
    )
    return names if clear else ()


def shard_labels(
    texts: list[str],
    tars: Sequence[str],
    counts: np.ndarray,
    names: Mapping[str, list[str]],
    root: str,
    known: Sequence[str],
) -> ShardLabels:
    """Return class ids by the text of `.cls` members; none unless all images have one.

    Args:
        texts: of all images.
        tars: places of the tars.
        counts: images of each.
        names: class names by id, of tars that an index lists.
        root: what messages call them.
        known: class names whose ids another set has fixed.

    Raises:
        UserError: none of the classes is a known one, or some are ids and others names.
    """
    missing = texts.count("")
    if missing:
        if missing < len(texts):
            warn_once(f"data.root={root}: {missing:,} images have no .cls, so none has a label")
        return ShardLabels(None, [])
    words, of_ids, kinds = tar_classes(texts, tars, counts, names)
    named = kinds.get("index") or kinds.get("words")
    if named and "ids" in kinds:
        raise UserError(
            f"data.root={root}: the classes of {kinds['ids']} are ids without names, those of "
            f"{named} have names: copy the {INDEX} that ssl-xcit shard wrote beside the tars of "
            "both, or name one of them only"
        )
    kind = "bare" if "ids" in kinds else "named" if "index" in kinds else ""
    if not named and is_numbering(known):
        ids = np.array([int(word) for word in words], np.int64)
        return ShardLabels(ids, numbered(ids), kind)
    labels, classes = named_classes(words, known or of_ids)
    if known and labels.min() >= len(known):
        raise UserError(
            f"eval_data.test_root={root}: none of its classes ({examples(words)}) is one of the "
            f"training images' ({examples(known)}): where .cls holds class ids, put the {INDEX} "
            "that ssl-xcit shard wrote beside the tars of both"
        )
    return ShardLabels(labels, classes, kind)


def examples(names: Sequence[str]) -> str:
    """Return a few different names, for a message."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + ", ..." * (len(different) > 3)


def is_id(text: str) -> bool:
    """Whether a text may be a class id."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def is_numbering(names: Sequence[str]) -> bool:
    """Whether names are those of classes without any, which are their ids."""
    return list(names) == [str(i) for i in range(len(names))]


def tar_classes(
    texts: list[str], tars: Sequence[str], counts: np.ndarray, names: Mapping[str, list[str]]
) -> TarClasses:
    """Replace ids by names where a tar holds nothing else and its index has all of them. In other
    tars of a folder they are ids if no text is a name.
    """
    words: list[str] = []
    of_ids: list[str] = []
    kinds: dict[str, str] = {}
    others: dict[str, set[str]] = {}
    for tar, count in zip(tars, counts.tolist(), strict=True):
        if not count:
            continue
        part = texts[len(words) : len(words) + count]
        different, of_tar = set(part), names.get(tar, [])
        if all(is_id(text) and int(text) < len(of_tar) for text in different):
            words += [of_tar[int(text)] for text in part]
            of_ids = of_ids or of_tar
            kinds["numbering" if is_numbering(of_tar) else "index"] = tar
        else:
            words += part
            others.setdefault(os.path.dirname(tar) or ".", set()).update(different)
    for folder, different in others.items():
        kinds["ids" if all(map(is_id, different)) else "words"] = folder
    return TarClasses(words, of_ids, kinds)


def indexed_names(tars: Sequence[str]) -> dict[str, list[str]]:
    """Return the class names in the indices beside tars on this machine, by tar."""
    names: dict[str, list[str]] = {}
    for folder in {os.path.dirname(tar) for tar in tars}:
        try:
            names |= names_by_tar(json.loads(Path(folder, INDEX).read_bytes()), folder)
        except (OSError, ValueError):  # none, or damaged
            continue
    return names
