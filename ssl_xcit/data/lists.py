"""Lists of image paths: a text file with one a line, or a parquet file."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_xcit.data.names import Names
from ssl_xcit.data.sources import Files, LabelledPair, held_out, load_labels
from ssl_xcit.errors import MissingPath, UserError


def path_list(
    file: str | None, root: str | None = None, class_names: Sequence[str] | None = None
) -> Files | None:
    """The images that a file lists.

    Args:
        file: `.parquet` with a column `path` and perhaps `label`, or text with one path a line,
            after a tab perhaps its label (a word or a number). None: no images.
        root: what the paths are relative to; None: the file's folder.
        class_names: ids by name, when another list has fixed them.

    Raises:
        MissingPath: no such file, or it lists nothing.
        UserError: some lines have a label and others do not, or it is no such file.
    """
    if file is None:
        return None
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingPath(f"data.file={file}: no such file")
    paths, labels = read_parquet(path) if path.suffix == ".parquet" else read_text(path)
    if not paths:
        raise MissingPath(f"data.file={file}: it lists no paths")
    home = str(Path(root).expanduser() if root else path.absolute().parent)
    first = os.path.join(home, paths[0])
    if not os.path.exists(first) and not any(
        os.path.exists(os.path.join(home, p)) for p in paths[:: max(1, len(paths) // 16)]
    ):
        raise MissingPath(
            f"data.file={file}: none of the paths tried exists, such as {first}: set "
            "data.root=DIR, what they are relative to"
        )
    if labels is None:
        return Files(Names.of(paths), home)
    known = list(class_names or [])
    known += sorted(set(labels) - set(known), key=natural)
    ids = {name: i for i, name in enumerate(known)}
    return Files(Names.of(paths), home, np.array([ids[name] for name in labels], np.int64), known)


def natural(label: str) -> tuple[int, int, str]:
    """Numbers by value, then words."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def read_text(path: Path) -> tuple[list[str], list[str] | None]:
    """Paths, and labels if there are any."""
    try:
        text = path.read_text(
            encoding="utf-8-sig", errors="surrogateescape"
        )  # names may be no text
    except OSError as error:
        raise UserError(f"data.file={path}: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"data.file={path}: not a text file, nor .parquet")
    lines = text.split("\n")  # and hold what Python calls the end of a line
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    widths = {len(row) for row in rows}
    if len(widths) > 1 or not widths <= {1, 2}:
        raise UserError(
            f"data.file={path}: lines of {sorted(widths)} columns; one path a line, or path, tab "
            "and label on each"
        )
    return [row[0] for row in rows], [row[1] for row in rows] if widths == {2} else None


def read_parquet(path: Path) -> tuple[list[str], list[str] | None]:
    """Columns `path` and, if there is one, `label`."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_schema, read_table
    except ImportError as error:
        raise UserError(
            f"data.file={path}: parquet needs pyarrow: pip install 'ssl-xcit[tables]'"
        ) from error
    try:
        columns = [name for name in ("path", "label") if name in read_schema(path).names]
        table = read_table(path, columns=columns)
    except (ArrowException, OSError) as error:
        raise UserError(f"data.file={path}: {str(error).splitlines()[0]}") from error
    if "path" not in table.column_names:
        raise UserError(
            f"data.file={path}: columns {', '.join(read_schema(path).names)}; `path` is needed"
        )
    labels = table["label"].to_pylist() if "label" in table.column_names else None
    if labels is not None and None in labels:
        raise UserError(f"data.file={path}: {labels.count(None):,} rows have no label")
    paths = table["path"].to_pylist()
    if not all(isinstance(p, str) for p in paths):
        raise UserError(f"data.file={path}: column `path` is of {table['path'].type}, not text")
    return paths, None if labels is None else [str(label) for label in labels]


def labelled_lists(
    file: str | None,
    test_file: str | None = None,
    root: str | None = None,
    labels: str | None = None,
    test_labels: str | None = None,
    test_fraction: float = 0.2,
    resize: int = 256,
    size: int = 224,
    seed: int = 0,
) -> LabelledPair | None:
    """`path_list` of labelled images, and of others to be tested on (None: a share is held out).

    Args:
        file: the list.
        test_file: of other images.
        root: what the paths are relative to; None: the file's folder.
        labels: a `.npy` file of the listed images' labels, see `load_labels`; None: the list's own.
        test_labels: likewise of `test_file`.
        test_fraction: share held out where there are no other images.
        resize: short side in pixels.
        size: side of the central square.
        seed: of the choice.

    Raises:
        UserError: labels for the one list and not for the other.
    """
    train = path_list(file, root)
    test = path_list(test_file, root, train.class_names if train is not None else None)
    if (labels is None) != (test_labels is None) and test_file is not None:
        raise UserError("eval_data.labels and eval_data.test_labels: give both, or none")
    for source, given in ((train, labels), (test, test_labels)):
        if source is not None and given is not None:
            source.labels = load_labels(given, len(source))
            source.class_names = ()
    return held_out(train, test, str(file), test_fraction, resize, size, seed)
