"""Extract features of a source into files, resumable by a folder beside them."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssl_xcit.data.bad_samples import FILE as BAD
from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import replacing, write_json, written_to
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.terminal import say

from .cache import Folder
from .extract import KINDS
from .extractor import FeatureExtractor
from .store import FeatureTable, is_complete, printable_name, read_about, write_table

DIFFERENCES = {  # what files are compared by, and what is said where they differ
    "weights": "from other weights",
    "images": "of {before} images, where there are {now} now",
    "names": "of images with other names",
    "stamp": "of images whose files have changed since",
    "content": "of other images of the same number and names",
    "preprocess": "with other preprocess.* settings",
    "resize": "with resize={before}, not {now}",
    "size": "with size={before}, not {now}",
    "features": "with features={before}, not {now}",
    "dtype": "with dtype={before}, not {now}",
    "labels": "with other labels",
    "index": "with index={before}, not {now}",
}


def work_folder(out: Path) -> Path:
    """The hidden folder beside a file in which its features are gathered."""
    return out.with_name(f".{out.name}.embedding")


def labels_digest(source: Source) -> str | None:
    """SHA-256 of the labels, which are written beside the features."""
    if source.labels is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(source.labels).tobytes()).hexdigest()


def describe_differences(before: dict[str, Any], about: dict[str, Any]) -> str:
    """What is not the same, in words; empty where all is."""
    keys = [key for key in DIFFERENCES if key in about and before.get(key) != about[key]]
    # times of files that were just written prove nothing, and older versions noted one of the two
    for key in ("stamp", "content"):
        if None in (before.get(key), about.get(key)) and key in keys:
            keys.remove(key)
    of_images = ("stamp", "content", "labels")
    implied = {"images": ("names", *of_images), "names": of_images, "stamp": ("content",)}
    for key in [key for key in implied if key in keys]:
        keys = [other for other in keys if other not in implied[key]]
    return ", ".join(DIFFERENCES[k].format(before=before.get(k), now=about[k]) for k in keys)


def is_there(out: Path, about: dict[str, Any]) -> bool:
    """Whether a file is written already; raises UserError where another file has its name."""
    if not out.exists():
        return False
    before = read_about(out)
    if not before or not is_complete(out):
        trouble = "is none that ssl-xcit embed made" if not before else "is not whole"
        raise UserError(f"out={out} is there, and {trouble}: name another file, or remove it")
    if differences := describe_differences(before, about):
        raise UserError(f"out={out} is there, made {differences}: name another file, or remove it")
    say(f"{out} is there")
    return True


@contextmanager
def locked(outs: Sequence[Path]) -> Iterator[None]:
    """Lock all files; raises UserError where another process writes one of them."""
    with ExitStack() as stack:
        for out in sorted(outs):  # in one order, so that of two commands one goes on
            lock = out.with_name(f"{work_folder(out).name}.lock")
            stack.enter_context(exclusive(lock, str(out)))
        yield


def open_folder(work: Path, about: dict[str, Any], dtype: str) -> Folder:
    """The hidden folder, new or begun before; raises UserError if that was with other settings."""
    work.mkdir(exist_ok=True)
    note = work / "settings.json"
    if note.is_file():
        before = json.loads(note.read_text())
        if differences := describe_differences(before, about):
            raise UserError(
                f"{work} was begun {differences}: name another out=..., or remove that folder"
            )
    write_json(about, note)
    return Folder(work, dtype)


class JoinedArrays:
    """Arrays of the same rows beside each other, joined where rows are taken."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.shape = (len(arrays[0]), sum(a.shape[1] for a in arrays))
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.concatenate([array[rows] for array in self.arrays], axis=-1)


def embed(
    extractor: FeatureExtractor,
    source: Source,
    about: dict[str, Any],
    outs: Mapping[Path, dict[str, Any]],
    first: Path,
    index: str,
) -> tuple[int, list[int]]:
    """Write the features of all images that can be read; return their number, and which cannot.

    Args:
        about: `resize`, `size`, kind of `features`, `dtype`, and what else features depend on.
        outs: files to write, with what each says about itself.
        first: file that the work folder and the list of bad images are named after.
        index: of faiss, see `built_index`.
    """
    work, parts = work_folder(first), list(KINDS[about["features"]])
    try:
        with written_to(first):
            folder = open_folder(work, about, about["dtype"])
            if missing := folder.missing(parts):
                sizes = about["resize"], about["size"]
                folder.fill(extractor, source, *sizes, missing, "features")
            arrays, rows = folder.load(parts)
            bad = write_bad_samples(source, rows, extractor.preprocess, first)
        features = arrays[parts[0]] if len(parts) == 1 else JoinedArrays(list(arrays.values()))
        for out, content in outs.items():
            with written_to(out):
                write_table(FeatureTable(features, rows, source, content), out, index)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on ({work})")
        raise
    del features, arrays
    shutil.rmtree(work)
    return len(rows), bad


def write_bad_samples(
    source: Source, rows: np.ndarray, preprocess: Preprocess, out: Path
) -> list[int]:
    """Write `NAME.bad_samples.jsonl` with the reasons; return which images are bad."""
    bad = np.setdiff1d(np.arange(len(source)), rows).tolist()
    path = out.with_name(f"{out.name}.{BAD}")
    if not bad:
        path.unlink(missing_ok=True)
        return []
    with replacing(path) as part, part.open("w") as file:
        for index in bad:
            reason = "could not be read then"
            try:
                decode(source.read(index), preprocess)
            except BadImage as error:
                reason = str(error)
            content = {"place": index, "name": printable_name(source, index), "reason": reason}
            file.write(json.dumps(content) + "\n")
    return bad
