"""Files of features, one row an image: parquet, npy, and indices of faiss. They are written in
blocks, and what made a file is written in it or beside it.
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
from ssl_xcit.utils.files import replacing, write_json

from .cache import write_rows
from .neighbors import built_index, opened_index, write_index

BLOCK = 8_192  # rows at once
KEY = b"ssl_xcit"  # of parquet's metadata
ENDINGS = (".parquet", ".npy", ".faiss")


@dataclass(frozen=True)
class FeatureTable:
    """Features of the readable images of a source, with their names and labels."""

    features: Any  # (N, C), sliced by rows: an array, a memory map, or several joined
    rows: Int64[np.ndarray, " N"]  # which images of the source
    source: Source  # names and labels
    about: dict[str, Any]  # what made them, plain data

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last row of each block, the last excluded."""
        for start in range(0, len(self.rows), BLOCK):
            yield start, min(start + BLOCK, len(self.rows))

    def name(self, place: int) -> str:
        """Name of an image."""
        return printable_name(self.source, int(self.rows[place]))

    def label(self, place: int) -> int | None:
        """Class id of an image, where there is one."""
        labels = self.source.labels
        if labels is None or label_kind(labels) != "classes":
            return None
        return int(labels[int(self.rows[place])])


def printable_name(source: Source, row: int) -> str:
    """Name of an image; bytes that are not text are written with backslashes."""
    return source.name(row).encode("utf-8", "backslashreplace").decode()


def write_parquet(table: FeatureTable, path: Path) -> None:
    """Write columns row, name, label and feature; what made them is in the metadata."""
    pa, pq = import_pyarrow()
    kind = pa.from_numpy_dtype(table.features.dtype)
    width = table.features.shape[1]
    schema = pa.schema(
        [("row", pa.int64()), ("name", pa.string()), ("label", pa.int64()),
         ("feature", pa.list_(kind, width))],
        metadata={KEY: json.dumps(table.about).encode()},
    )  # fmt: skip
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for start, end in table.blocks():
            flat = pa.array(np.ascontiguousarray(table.features[start:end]).reshape(-1), kind)
            columns = [
                pa.array(table.rows[start:end]),
                pa.array([table.name(i) for i in range(start, end)], pa.string()),
                pa.array([table.label(i) for i in range(start, end)], pa.int64()),
                pa.FixedSizeListArray.from_arrays(flat, width),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def import_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; raises UserError where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'ssl-xcit[tables]'") from error
    return pyarrow, pyarrow.parquet


def rows_file(path: Path) -> Path:
    """The file beside one of features that has the images' rows, names and labels."""
    return path.with_name(f"{path.name}.rows.jsonl")


def write_table(table: FeatureTable, path: Path, index: str) -> None:
    """Write a file by its ending, see `ENDINGS`; `index` is faiss': flat (exact), ivf or hnsw."""
    if path.suffix == ".parquet":
        return write_parquet(table, path)
    # first what lies beside it: a file that is there is complete
    with replacing(rows_file(path)) as part, part.open("w") as rows:
        for place, row in enumerate(table.rows.tolist()):
            content = {"row": row, "name": table.name(place), "label": table.label(place)}
            rows.write(json.dumps(content) + "\n")
    write_json(table.about, path.with_name(f"{path.name}.json"))
    with replacing(path) as part:
        if path.suffix == ".npy":
            with part.open("wb") as file:
                write_rows(file, table.features)
        else:
            write_index(built_index(table.features, index), part)
    return None


def read_about(path: Path) -> dict[str, Any]:
    """What made a file; empty where that is not known."""
    with suppress(OSError, ValueError, KeyError):
        if path.suffix == ".parquet":
            return dict(json.loads(import_pyarrow()[1].read_schema(path).metadata[KEY]))
        return dict(json.loads(path.with_name(f"{path.name}.json").read_text()))
    return {}


def is_complete(path: Path) -> bool:
    """Whether there are as many features as names beside them: they may have been copied apart."""
    if path.suffix == ".parquet":  # which holds both
        return True
    with suppress(Exception):  # of two libraries
        with rows_file(path).open() as file:
            names = sum(1 for _ in file)
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r", allow_pickle=False)) == names
        return int(opened_index(path).ntotal) == names
    return False


class FeatureIndex:
    """A file of features to search in, see `ENDINGS`; raises MissingPath where there is none,
    UserError where it cannot be read or nothing says what made it.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise MissingPath(f"index={path}: no such file; ssl-xcit embed out={path} makes one")
        if path.suffix not in ENDINGS:
            raise UserError(f"index={path}: a file ending in {', '.join(ENDINGS)}")
        if path.suffix == ".parquet":
            import_pyarrow()  # without it nothing tells what made the file
        self.path, self.about = path, read_about(path)
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
                table = import_pyarrow()[1].read_table(path, columns=["name", "feature"])
                features = table["feature"].combine_chunks()
                self.bank = features.values.to_numpy(zero_copy_only=False)
                self.bank = self.bank.reshape(len(table), -1)
                self.names = table["name"].to_pylist()
            else:
                with rows_file(path).open() as file:
                    self.names = [json.loads(line)["name"] for line in file]
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
                "the files do not belong together"
            )
