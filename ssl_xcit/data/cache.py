"""Cache files and folders: listings of folders and shards, indices of images, built-in images."""

import os
import shutil
import tempfile
from collections.abc import Callable
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


def folder_made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder's content in another one, which takes its name when it is whole; return it."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(work)
        work.chmod(0o755)  # mkdtemp's are for one user
        try:
            work.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
