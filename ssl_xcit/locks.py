"""Locks of the system, which end with their process, however that ends: there is no stale one to
judge.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_xcit.errors import UserError

log = logging.getLogger(__name__)


class InUse(UserError):
    """Another process has the lock."""


@contextmanager
def exclusive(path: Path, what: str, otherwise: str = "wait for it") -> Iterator[None]:
    """Nobody else has this lock meanwhile. It is the system's and ends with the process, however
    that ends; children do not inherit it.

    Args:
        path: a file that is made, and removed.
        what: is in use, for the message.
        otherwise: what to do when another process has it.

    Raises:
        InUse: another process has it (says which).
        UserError: the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path.parent}: no folder to write to ({error.strerror})") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InUse(f"{what} is in use by {holder}: {otherwise}") from error
        except OSError as error:
            log.warning("%s: no locks on this file system (%s)", path.parent, error)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # who held it has just removed it: a lock on that file means nothing
    with suppress(OSError):  # a full disk may spoil the text, not the lock
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def lock_holder(run_dir: Path) -> str:
    """Which process trains in this folder now; empty when none does.

    The system's lock tells, for a killed process leaves the file. It is not to be asked for a lock
    that this process holds: closing the file would give it up.
    """
    try:
        with (run_dir / ".lock").open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read(300).decode("utf-8", "replace").strip() or "another process"
    except OSError:  # no file, or a file system without locks
        pass
    return ""
