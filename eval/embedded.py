"""Files of features, one row an image: parquet, NumPy's, and indices of faiss. Each is written a
block at a time, and says in itself or beside it what made it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import replacing

from .feature_cache import write_rows
from .search import built_index, opened_index, write_index

BLOCK = 8_192  # rows at once
KEY = b"ssl_xcit"  # of parquet's metadata
ENDINGS = (".parquet", ".npy", ".faiss")


@dataclass(frozen=True)
class Embedded:
    """Features of the readable images of a source.

    Args:
        features: (N, C), sliced by rows: an array, a memory map, or several joined.
        rows: which images of the source.
        source: names and labels.
        about: what made them, plain data.
    """

    features: Any
    rows: Int64[np.ndarray, " N"]
    source: Source
    about: dict[str, Any]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last row of each block, the last excluded."""
        for start in range(0, len(self.rows), BLOCK):
            yield start, min(start + BLOCK, len(self.rows))

    def name(self, place: int) -> str:
        """Of an image; what is no text is written with backslashes."""
        name = self.source.name(int(self.rows[place]))
        return name.encode("utf-8", "backslashreplace").decode()

    def label(self, place: int) -> int | None:
        """Its class id, where there is one."""
        labels = self.source.labels
        if labels is None or label_kind(labels) != "classes":
            return None
        return int(labels[int(self.rows[place])])


def write_parquet(what: Embedded, path: Path) -> None:
    """Columns row, name, label and feature; what made them is in the metadata.

    Raises:
        UserError: pyarrow is missing.
    """
    pa, pq = arrow()
    kind = pa.from_numpy_dtype(what.features.dtype)
    width = what.features.shape[1]
    schema = pa.schema(
        [("row", pa.int64()), ("name", pa.string()), ("label", pa.int64()),
         ("feature", pa.list_(kind, width))],
        metadata={KEY: json.dumps(what.about).encode()},
    )  # fmt: skip
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for start, end in what.blocks():
            flat = pa.array(np.ascontiguousarray(what.features[start:end]).reshape(-1), kind)
            columns = [
                pa.array(what.rows[start:end]),
                pa.array([what.name(i) for i in range(start, end)], pa.string()),
                pa.array([what.label(i) for i in range(start, end)], pa.int64()),
                pa.FixedSizeListArray.from_arrays(flat, width),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def arrow() -> tuple[Any, Any]:
    """pyarrow and its parquet.

    Raises:
        UserError: it is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'ssl-xcit[tables]'") from error
    return pyarrow, pyarrow.parquet


def write_beside(what: Embedded, path: Path) -> None:
    """`NAME.npy.json`: what made the file; `NAME.npy.rows.jsonl`: row, name and label of each."""
    with replacing(path.with_name(f"{path.name}.rows.jsonl")) as part, part.open("w") as file:
        for place, row in enumerate(what.rows.tolist()):
            content = {"row": row, "name": what.name(place), "label": what.label(place)}
            file.write(json.dumps(content) + "\n")
    with replacing(path.with_name(f"{path.name}.json")) as part:
        part.write_text(json.dumps(what.about, indent=2) + "\n")


def write(what: Embedded, path: Path, index: str) -> None:
    """By the ending of its name.

    Args:
        what: the features.
        path: see `ENDINGS`.
        index: of faiss: flat (exact), ivf or hnsw.
    """
    if path.suffix == ".parquet":
        return write_parquet(what, path)
    write_beside(what, path)  # first: where the file is, all of it is
    with replacing(path) as part:
        if path.suffix == ".npy":
            with part.open("wb") as file:
                write_rows(file, what.features)
        else:
            write_index(built_index(what.features, index), part)
    return None


def about_file(path: Path) -> dict[str, Any]:
    """What made it; empty where that is not known."""
    with suppress(OSError, ValueError, KeyError):
        if path.suffix == ".parquet":
            return dict(json.loads(arrow()[1].read_schema(path).metadata[KEY]))
        return dict(json.loads(path.with_name(f"{path.name}.json").read_text()))
    return {}


def is_whole(path: Path) -> bool:
    """Whether there are as many features as names beside them: they may have been copied apart."""
    if path.suffix == ".parquet":  # which holds both
        return True
    with suppress(Exception):  # of two libraries
        with path.with_name(f"{path.name}.rows.jsonl").open() as file:
            names = sum(1 for _ in file)
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r", allow_pickle=False)) == names
        return int(opened_index(path).ntotal) == names
    return False


class Opened:
    """A file of features to search in.

    Args:
        path: of one of the formats.

    Raises:
        MissingPath: no such file.
        UserError: it cannot be read, or nothing says what made it.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise MissingPath(f"index={path}: no such file; ssl-xcit embed out={path} makes one")
        if path.suffix not in ENDINGS:
            raise UserError(f"index={path}: a file ending in {', '.join(ENDINGS)}")
        if path.suffix == ".parquet":
            arrow()  # else nothing could tell what made it
        self.path, self.about = path, about_file(path)
        if not self.about:
            raise UserError(
                f"index={path}: nothing tells what made it; was it made by ssl-xcit embed, and is "
                f"{path.name}.json beside it?"
            )
        self.names: Sequence[str]
        self.index: Any = None
        self.bank: Any = None
        try:
            if path.suffix == ".parquet":
                table = arrow()[1].read_table(path, columns=["name", "feature"])
                features = table["feature"].combine_chunks()
                self.bank = features.values.to_numpy(zero_copy_only=False)
                self.bank = self.bank.reshape(len(table), -1)
                self.names = table["name"].to_pylist()
            else:
                beside = path.with_name(f"{path.name}.rows.jsonl")
                self.names = [json.loads(line)["name"] for line in beside.open()]
                if path.suffix == ".npy":
                    self.bank = np.load(path, mmap_mode="r", allow_pickle=False)
                else:
                    self.index = opened_index(path)
        except UserError:
            raise
        except Exception as error:  # of three libraries
            raise UserError(f"index={path} cannot be read: {error}") from error
        count = len(self.bank) if self.index is None else self.index.ntotal
        if count != len(self.names):
            raise UserError(
                f"index={path} has {count:,} rows, and {len(self.names):,} names are beside it: "
                "they are not of one another"
            )
