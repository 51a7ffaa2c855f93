"""Labels of tar shards: what `.cls` members hold when they are written, and mean when read.

A class name, which two sets agree on; or a class id, which is a position in the list of one set and
has its name in the `shards.json` beside the tar.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ssl_xcit.data.folders import warn_once
from ssl_xcit.data.labels import Labels, named_classes, normalised, numbered
from ssl_xcit.data.remote import INDEX, QUESTIONS, file_system, is_url, retried
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError

MAX_LABEL = 200  # bytes of a .cls member


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
    texts: list[str], tars: Sequence[str], counts: np.ndarray, root: str, known: Sequence[str]
) -> tuple[Labels | None, list[str]]:
    """Return (class ids, class names) by the text of `.cls` members; None unless all have one.

    Args:
        texts: of all images.
        tars: places of the tars; empty behind URLs that no index has.
        counts: images of each.
        root: what messages call them.
        known: class names whose ids another set has fixed.

    Raises:
        UserError: none of the classes is a known one.
    """
    missing = texts.count("")
    if missing:
        if missing < len(texts):
            warn_once(f"data.root={root}: {missing:,} images have no .cls, so none has a label")
        return None, []
    words, names = texts, list(known)
    if all(word.isascii() and word.isdecimal() and len(word) < 10 for word in texts):
        words, of_ids = names_of_ids(texts, tars, counts)
        if words == texts and names == [str(i) for i in range(len(names))]:
            ids = np.array([int(word) for word in texts], np.int64)
            return ids, numbered(ids)
        names = names or of_ids
    labels, classes = named_classes(words, names)
    if known and labels.min() >= len(known):
        raise UserError(
            f"eval_data.test_root={root}: none of its classes ({examples(words)}) is one of the "
            f"training images' ({examples(known)}): where .cls holds class ids, put the {INDEX} "
            "that ssl-xcit shard wrote beside the tars of both"
        )
    return labels, classes


def examples(names: Sequence[str]) -> str:
    """Return a few different names, for a message."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + ", ..." * (len(different) > 3)


def names_of_ids(
    ids: list[str], tars: Sequence[str], counts: np.ndarray
) -> tuple[list[str], list[str]]:
    """Return the class name of each image and all names by class id, from the indices beside the
    tars; the ids and no names unless every image has one.
    """
    names: dict[str, list[str]] = {}
    for folder in {os.path.dirname(tar) for tar in tars if tar}:
        names |= indexed_names(folder)
    of_tar = [names.get(tar, []) for tar in tars]
    owners = np.repeat(np.arange(len(tars)), counts).tolist()
    with suppress(IndexError):
        return [of_tar[n][int(i)] for n, i in zip(owners, ids, strict=True)], of_tar[owners[0]]
    return ids, []


def indexed_names(folder: str) -> dict[str, list[str]]:
    """Return the class names that the index in a folder has, by the path of each of its tars; none
    if it is not there, of another program, or calls two classes alike.
    """
    place = os.path.join(folder, INDEX)
    try:
        if is_url(place):
            content = retried(lambda: file_system(place).cat_file(place), place, QUESTIONS)
        else:
            content = Path(place).read_bytes()
        index = json.loads(content)
        names = [normalised(name) for name in index["class_names"]]
        tars = [os.path.join(folder, row["file"]) for row in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict.fromkeys(tars, names) if len(set(names)) == len(names) else {}
