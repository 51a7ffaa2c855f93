"""Files that are whole or not there: written beside their name, flushed to the disk, renamed.

Temporary files lie in the same folder, hidden, and end in `.part`: a rename does not cross file
systems, and who finds one knows whose it is. The system's temporary folder is never used.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.terminal import say

SUFFIX = ".part"
OF = ".results-of"  # in a folder of results: of which run or weights they are


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` at the end, or is removed.

    It is on the disk before it gets the name, and the name is on the disk afterwards: a power
    failure leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{SUFFIX}")
    try:
        yield part
        flush(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot flush a folder
        flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in this folder."""
    for part in folder.glob(f".*{SUFFIX}"):
        part.unlink()


def writable_folder(path: Path) -> None:
    """Make it, and see that files can be made in it.

    Raises:
        UserError: neither can be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path}: no folder to write to ({error.strerror})") from error


def writable_or_here(folder: Path, *parts: str, holds: Sequence[str] = ()) -> Path:
    """A place in a folder, made; or the same in a folder of its name where you are, where that one
    may only be read, as a colleague's run. Which is printed.

    Args:
        folder: of a run, or of weights.
        parts: of the path from there.
        holds: folders that will be written in that place, if they are there.

    Raises:
        UserError: neither can be written.
    """
    wanted = place = folder.joinpath(*parts)
    try:
        for place in (wanted, *(wanted / name for name in holds)):
            if place == wanted or place.is_dir():
                writable_folder(place)
        return wanted
    except UserError as error:
        reason = f"{place} cannot be written ({getattr(error.__cause__, 'strerror', None)})"
    whole = os.fsencode(folder.absolute())
    name = folder.absolute().name or "results"
    here = Path(name)
    if os.path.lexists(here) and not is_of(here, whole):  # some other run's results, or a run
        here = Path(f"{name}-{hashlib.sha256(whole).hexdigest()[:8]}")
    try:
        writable_folder(here.joinpath(*parts))
        (here / OF).write_bytes(whole)
    except (UserError, OSError) as error:
        raise UserError(
            f"{reason}, and neither can {Path.cwd()}: name a place that can, out=..."
        ) from error
    found = here.joinpath(*parts)
    say(f"{reason}: results go to {found} where you are; out=... names another place")
    return found


def is_of(here: Path, whole: bytes) -> bool:
    """Whether a folder was made for results of that one."""
    try:
        return (here / OF).read_bytes() == whole
    except OSError:
        return False


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Work whose results go into a folder, or a file; that they cannot is said in a line.

    Raises:
        UserError: the folder cannot be made or written.
        RunFailed: the disk is full, or gone.
    """
    writable_folder(out.parent if out.suffix and not out.is_dir() else out)
    try:
        yield
    except UserError:  # some of which are of files that are not there
        raise
    except OSError as error:
        trouble = f"{out} cannot be written ({error})"
        raise RunFailed(f"{trouble}: make room, and try again") from error


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ssl_xcit, or ~/.cache/ssl_xcit, or without a home a temporary folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_xcit"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / f"ssl_xcit-{os.getuid()}"


class Hashing:
    """A binary file that is only appended to, and the SHA-256 of what went in.

    `torch.save` turns an error of the disk into one of its own; `error` is what happened.
    """

    def __init__(self, file: Any):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes, in whatever holds them."""
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """As of files."""
        self.file.flush()


def sha256_of(path: Path) -> str:
    """In hexadecimal; read from the disk where the system lets go of its copy in memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
