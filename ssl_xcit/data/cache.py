"""Arrays in cache files: listings of folders and shards, indices of images."""

import os
import tempfile
from pathlib import Path

import numpy as np


def load_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """Load arrays by name, without pickles; None: no such file, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return dict(content)
    except Exception:  # numpy and zipfile raise half a dozen types; whoever asks makes it again
        return None


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the file whole or not at all; an error of the disk is ignored."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                np.savez(out, **arrays)  # type: ignore[arg-type]
            os.replace(part, file)
        except BaseException:
            os.unlink(part)
            raise
    except OSError:
        return
