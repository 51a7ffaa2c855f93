"""Lists of image paths: text with one a line, CSV and TSV with or without a header, or parquet."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from ssl_xcit.data.folders import warn_once
from ssl_xcit.data.labels import labels_from, load_npy
from ssl_xcit.data.sources import (
    Files,
    LabelKind,
    LabelledPair,
    Place,
    Seed,
    TestFraction,
    held_out,
)
from ssl_xcit.data.string_array import StringArray
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.utils.validation import PLACE, Count

# Headings of published lists, without capitals, spaces and underscores
IMAGE_COLUMNS = (
    "path", "filepath", "imagepath", "filename", "file", "image", "imagefile", "imagename", "img",
    "imgpath", "images",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "target", "category", "classname", "labelname", "y", "labels")
Column = Annotated[str | None, PLACE]
Switch = Annotated[bool, PLACE]


class Table(NamedTuple):
    """Paths as a list has them, and labels as a column of values, if there is one."""

    paths: list[str]
    labels: np.ndarray | None


def path_list(
    file: Place,
    root: Place = None,
    class_names: Sequence[str] | None = None,
    image_column: Column = None,
    label_column: Column = None,
    backslashes: Switch = False,
    label_kind: LabelKind = None,
    labelled: bool = False,
) -> Files | None:
    """Return the images that a file lists.

    Args:
        file: `.parquet`, `.csv`, `.tsv`, or text with one path a line, after a tab perhaps its
            label (a word or a number). None: no images.
        root: what the paths are relative to; None: the file's folder.
        class_names: ids by name, if another list has fixed them.
        image_column: heading of the paths; None: one of `IMAGE_COLUMNS`.
        label_column: heading of the labels; None: one of `LABEL_COLUMNS`, if there is one.
        backslashes: separate folders, as on Windows.
        label_kind: `classes` or `numbers`, where the labels' type leaves it open.
        labelled: labels are needed; else invalid ones are left out, with a warning.

    Raises:
        MissingPath: no such file, or it lists nothing, or nothing that is there.
        UserError: it cannot be read as a list, or its labels are invalid.
    """
    if file is None:
        return None
    path = Path(str(file)).expanduser()
    if not path.is_file():
        raise MissingPath(f"data.file={file}: no such file")
    columns = (image_column, label_column)
    table = read_parquet(path, *columns) if path.suffix == ".parquet" else read_text(path, *columns)
    paths = table.paths
    if not paths:
        raise MissingPath(f"data.file={file}: it lists no paths")
    if backslashes:
        paths = [name.replace("\\", "/") for name in paths]
    home = str(Path(str(root)).expanduser() if root else path.absolute().parent)
    values = table.labels
    if not any_exists(paths, home):
        split = [name.rpartition(" ")[::2] for name in paths]  # `n01440764/1.JPEG 0`
        if values is not None or not any_exists([name for name, _ in split], home):
            raise none_exists(file, paths, home)
        paths = [name for name, _ in split]
        values = as_numbers(np.array([word for _, word in split]))
    if values is None:
        return Files(StringArray.of(paths), home)
    try:
        labels, names = labels_from(
            values, len(paths), f"data.file={file}", label_kind, class_names or ()
        )
    except UserError as error:
        if labelled:
            raise
        warn_once(f"labels are left out: {error}")
        return Files(StringArray.of(paths), home)
    return Files(StringArray.of(paths), home, labels, names)


def any_exists(paths: Sequence[str], home: str) -> bool:
    """Whether any of a sample of the listed paths is a file."""
    sample = [paths[0], *paths[:: max(1, len(paths) // 16)]]
    return any(os.path.isfile(os.path.join(home, name)) for name in sample)


def none_exists(file: Place, paths: Sequence[str], home: str) -> MissingPath:
    """Return the error of a list of files that are not there; says what to set."""
    if any_exists([name.replace("\\", "/") for name in paths], home):
        return MissingPath(
            f"data.file={file}: its paths separate folders by backslashes, such as {paths[0]}: set "
            "data.backslashes=true (eval_data.backslashes=true)"
        )
    return MissingPath(
        f"data.file={file}: none of the paths tried exists, such as {os.path.join(home, paths[0])}:"
        " set data.root=DIR, what they are relative to"
    )


def read_text(path: Path, image_column: str | None, label_column: str | None) -> Table:
    """Read paths, and labels if there are any, of a text file: `.csv` is separated by commas,
    semicolons or tabs, others by tabs; with quotes as in CSV where it is one, and a header where
    its first line has known headings.

    Raises:
        UserError: no text, lines of different lengths, or no such column.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.file={path}: {error.strerror}") from error
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding, "surrogateescape")  # names may be no text
    except UnicodeDecodeError as error:
        raise UserError(f"data.file={path}: not a text file ({error.reason})") from error
    if "\0" in text:
        raise UserError(f"data.file={path}: not a text file, nor .parquet")
    lines = [line.rstrip("\r") for line in text.split("\n")]  # names hold other ends of a line
    lines = [line for line in lines if line.strip()]
    rows = split_rows(lines, path)
    if not rows:
        return Table([], None)
    first = [plain(cell) for cell in rows[0]]
    named = [plain(c) for c in (image_column, label_column) if c is not None]
    usual = IMAGE_COLUMNS if len(first) == 1 else (*IMAGE_COLUMNS, *LABEL_COLUMNS)
    has_header = any(c in first for c in named) or any(c in usual for c in first)
    header, body = (rows[0], rows[1:]) if has_header else ([], rows)
    widths = {len(row) for row in rows}
    if len(widths) > 1 or (not header and not widths <= {1, 2}):
        raise UserError(
            f"data.file={path}: lines of {sorted(widths)} columns; one path a line, or path and "
            "label on each, or a header that names a column path"
        )
    if not header:
        if named:
            raise UserError(no_column(path, image_column or label_column or "", rows[0]))
        labels = np.array([row[1] for row in body]) if widths == {2} else None
        return Table([row[0] for row in body], as_numbers(labels))
    image, label = chosen_columns(path, header, image_column, label_column)
    labels = None if label is None else np.array([row[label] for row in body])
    return Table([row[image] for row in body], as_numbers(labels))


def split_rows(lines: Sequence[str], path: Path) -> list[list[str]]:
    """Split each line into cells.

    Raises:
        UserError: quotes are not closed.
    """
    if path.suffix.lower() not in (".csv", ".tsv"):
        return [line.split("\t") for line in lines]
    counts = {mark: lines[0].count(mark) for mark in ("\t", ";", ",")} if lines else {"\t": 0}
    separator = "\t" if path.suffix.lower() == ".tsv" else max(counts, key=lambda m: counts[m])
    try:
        rows = list(csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"data.file={path}: not a table ({error})") from error
    return [[cell.strip(" ") for cell in row] for row in rows]


def plain(heading: str) -> str:
    """Return a heading without capitals, spaces, hyphens and underscores."""
    return heading.strip().lower().replace("_", "").replace(" ", "").replace("-", "")


def chosen_columns(
    path: Path, header: Sequence[str], image: str | None, label: str | None
) -> tuple[int, int | None]:
    """Return the columns of the paths and of the labels (None: there are none).

    Raises:
        UserError: no such column.
    """
    chosen: list[int | None] = []
    headings = [plain(heading) for heading in header]
    for name, usual in ((image, IMAGE_COLUMNS), (label, LABEL_COLUMNS)):
        wanted = usual if name is None else (plain(name),)
        matches = [headings.index(heading) for heading in wanted if heading in headings]
        if name is not None and not matches:
            raise UserError(no_column(path, name, header))
        chosen.append(matches[0] if matches else None)
    if chosen[0] is None:
        raise UserError(
            f"data.file={path}: columns {', '.join(header)}; `path` is needed, or name it with "
            "data.image_column=..."
        )
    return chosen[0], chosen[1]


def no_column(path: Path, name: str, header: Sequence[str]) -> str:
    """Return the message about a column that is not there."""
    return f"data.file={path}: no column {name}; there are {', '.join(header)}"


def as_numbers(labels: np.ndarray | None) -> np.ndarray | None:
    """Parse text labels as floating point if all are numbers, and not all are whole (`3`)."""
    if labels is None or not len(labels) or all(label.strip().isdecimal() for label in labels):
        return labels
    try:
        return np.array([float(label) for label in labels])
    except ValueError:
        return labels


def read_parquet(path: Path, image_column: str | None, label_column: str | None) -> Table:
    """Read the columns of paths and, if there is one, of labels; by the same names as in text."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_schema, read_table
    except ImportError as error:
        raise UserError(
            f"data.file={path}: parquet needs pyarrow: pip install 'ssl-xcit[tables]'"
        ) from error
    try:
        header = read_schema(path).names
        image, label = chosen_columns(path, header, image_column, label_column)
        columns = [header[image], *([header[label]] if label is not None else [])]
        table = read_table(path, columns=columns)
    except (ArrowException, OSError) as error:
        raise UserError(f"data.file={path}: {str(error).splitlines()[0]}") from error
    values: list[Any] | None = None if label is None else table[columns[1]].to_pylist()
    if values is not None and None in values:
        raise UserError(f"data.file={path}: {values.count(None):,} rows have no label")
    paths = table[columns[0]].to_pylist()
    if not all(isinstance(p, str) for p in paths):
        raise UserError(
            f"data.file={path}: column `{columns[0]}` is of {table[columns[0]].type}, not text"
        )
    return Table(paths, None if values is None else np.array(values))


def labelled_lists(
    file: Place,
    test_file: Place = None,
    root: Place = None,
    labels: Place = None,
    test_labels: Place = None,
    test_fraction: TestFraction = 0.2,
    resize: Count = 256,
    size: Count = 224,
    seed: Seed = 0,
    image_column: Column = None,
    label_column: Column = None,
    backslashes: Switch = False,
    label_kind: LabelKind = None,
) -> LabelledPair | None:
    """Return `path_list` of labelled images, and of others to test on (None: a share is held out).

    Args:
        labels: a `.npy` file of the listed images' labels, see `labels.labels_from`; None: the
            list's own.
        test_labels: likewise of `test_file`.
        test_fraction, resize, size, seed: see `held_out`; the others: see `path_list`.

    Raises:
        UserError: labels for the one list and not for the other.
    """
    options = (image_column, label_column, backslashes, label_kind, labels is None)
    train = path_list(file, root, None, *options)
    test = path_list(test_file, root, train.class_names if train is not None else None, *options)
    if (labels is None) != (test_labels is None) and test_file is not None:
        raise UserError("eval_data.labels and eval_data.test_labels: give both, or none")
    known: Sequence[str] = ()
    for source, given in ((train, labels), (test, test_labels)):
        if source is not None and given is not None:
            values = load_npy(str(given), "eval_data.labels")
            source.labels, known = labels_from(
                values, len(source), f"eval_data.labels={given}", label_kind, known
            )
            source.class_names = tuple(known)
    return held_out(train, test, str(file), test_fraction, resize, size, seed)
