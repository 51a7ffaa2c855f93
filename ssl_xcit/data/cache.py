"""What is worth keeping between runs: the built-in photographs, indices of folders and shards."""

import os
import tempfile
from pathlib import Path

import numpy as np


def load_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """Arrays by name; None when there is no such file, or it is damaged. No pickles."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return dict(content)
    except Exception:  # numpy and zipfile raise half a dozen types; whoever asks makes it again
        return None


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all; a cache that cannot be written is done without."""
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
