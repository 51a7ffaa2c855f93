"""Write files atomically: under a temporary name, flushed to the disk, then renamed.

Temporary files are hidden, end in `.part` and lie in the same folder, for a rename does not cross
file systems. The system's temporary folder is never used.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.utils.terminal import say

PARTIAL = ".part"
RESULTS_OF = ".results-of"  # file in a folder of results: path of the run or weights


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write, which takes the place of `path` at the end, or is removed.

    File and name are flushed to the disk: a power failure leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{PARTIAL}")
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
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a dictionary atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file, or an empty one where it is missing or cut short."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def remove_partial(folder: Path) -> None:
    """Remove the temporary files that a killed process left in this folder."""
    for part in folder.glob(f".*{PARTIAL}"):
        part.unlink()


def writable_folder(path: Path) -> None:
    """Make a folder; raise UserError unless files can be made in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path}: no folder to write to ({error.strerror})") from error


def writable_or_here(folder: Path, *parts: str, holds: Sequence[str] = ()) -> Path:
    """Make a folder for results in the folder of a run; where that is read-only, such as a
    colleague's, in a folder of its name in the working directory, which is printed.

    Args:
        folder: of a run, or of weights.
        parts: of the path below it.
        holds: folders in it that will be written too, if they exist.

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
    source = os.fsencode(folder.absolute())
    name = folder.absolute().name or "results"
    here = Path(name)
    if os.path.lexists(here) and not holds_results_of(here, source):  # another run, or its results
        here = Path(f"{name}-{hashlib.sha256(source).hexdigest()[:8]}")
    try:
        writable_folder(here.joinpath(*parts))
        (here / RESULTS_OF).write_bytes(source)
    except (UserError, OSError) as error:
        raise UserError(
            f"{reason}, and neither can {Path.cwd()}: name a folder that can, out=..."
        ) from error
    place = here.joinpath(*parts)
    say(f"{reason}: results go to {place} where you are; out=... names another place")
    return place


def holds_results_of(folder: Path, source: bytes) -> bool:
    """Whether a folder was made for the results of this run or weights."""
    try:
        return (folder / RESULTS_OF).read_bytes() == source
    except OSError:
        return False


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Errors of the disk in a block that writes to a folder, or a file, become one line.

    Raises:
        UserError: the folder cannot be made or written.
        RunFailed: the disk is full, or gone.
    """
    writable_folder(out.parent if out.suffix and not out.is_dir() else out)
    try:
        yield
    except UserError:  # a missing file is an OSError too
        raise
    except OSError as error:
        raise RunFailed(f"{out} cannot be written ({error}): make room, and try again") from error


def plain_names(words: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Words as names of files or folders: each once, also where capitals do not count, and none
    of `others`.
    """
    names: list[str] = []
    taken = {name.casefold() for name in others}
    for word in words:
        plain = re.sub(r"[^\w.-]+", "_", word, flags=re.ASCII).strip("._")[:80] or "image"
        name, number = plain, 2
        while name.casefold() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def default_cache() -> Path:
    """$XDG_CACHE_HOME/ssl_xcit, or ~/.cache/ssl_xcit, or without a home a temporary folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_xcit"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / f"ssl_xcit-{os.getuid()}"


class HashingWriter:
    """A binary file to append to, and the SHA-256 of its content."""

    def __init__(self, file: Any):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append bytes."""
        self.sha256.update(data)
        return int(self.file.write(data))


def sha256_of(path: Path) -> str:
    """The digest in hexadecimal, read from the disk where the system drops its cached copy."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
