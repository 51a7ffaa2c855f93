"""Locks of the operating system, which end with their process: no stale lock has to be judged."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ssl_xcit.errors import UserError

log = logging.getLogger(__name__)
POLL = 0.1  # seconds between two attempts
PATIENCE = 0.5  # seconds until a wait is logged


class InUse(UserError):
    """Another process has the lock."""


def lock_file(file: IO[Any], shared: bool = False) -> None:
    """Lock an open file without waiting. Child processes do not inherit the lock, and it ends as
    soon as this process closes any handle of the file.

    Raises:
        InUse: another process has it; its text is the file's, in which the holder names itself.
        OSError: a file system without locks.
    """
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InUse(file.read(300).strip() or "another process") from error


@contextmanager
def exclusive(
    path: Path,
    resource: str,
    advice: str = "wait for it",
    wait: bool = False,
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Hold a lock that no other process has.

    Args:
        path: a lock file, which is made, and removed at the end.
        resource: is in use, for the message.
        advice: what to do when another process has it.
        wait: until the other process has ended.
        patience: seconds until a wait is logged.

    Raises:
        InUse: another process has it (says which), and this one does not wait.
        UserError: the file cannot be made.
    """
    begun, warned = time.monotonic(), False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path.parent}: no folder to write to ({error.strerror})") from error
        try:
            lock_file(file)
        except InUse as holder:
            file.close()
            message = f"{resource} is in use by {holder}: {advice}"
            if not wait:
                raise InUse(message) from holder
            if not warned and time.monotonic() - begun > patience:
                log.warning("waiting: %s", message)
                warned = True
            time.sleep(POLL)
            continue
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


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether no other process has the lock, which is then held; the file stays.

    Raises:
        OSError: the file cannot be made.
    """
    with path.open("a+") as file:
        try:
            lock_file(file)
        except (InUse, OSError):
            yield False
        else:
            yield True


def lock_holder(run_dir: Path) -> str:
    """The process that trains in this folder now; empty when none does.

    Only the lock decides, for a killed process leaves the file. Do not call it for a lock that this
    process holds: closing the file would release it.
    """
    try:
        with (run_dir / ".lock").open(errors="replace") as file:
            lock_file(file, shared=True)
    except InUse as holder:
        return str(holder)
    except OSError:  # no file, or a file system without locks
        pass
    return ""
