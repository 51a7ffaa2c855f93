"""A file from the network, once: resumed where it broke off, compared with what the server and the
user say of it, and with itself whenever it is used again.
"""

import hashlib
import http.client
import json
import logging
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from ssl_xcit.errors import UserError
from ssl_xcit.files import flush, replacing, sha256_of, written_to
from ssl_xcit.locks import InUse, exclusive
from ssl_xcit.terminal import PlainColumn, say

log = logging.getLogger(__name__)
ATTEMPTS = 6  # in a row without a byte more
PAUSE = 0.5  # seconds before the second attempt, twice as long before each other
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
BROKEN = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
)  # fmt: skip


class Elsewhere(UserError):
    """It cannot be had from the network; says how to bring it by hand."""


def fetched(address: str, path: Path, sha256: str | None = None, show: bool = False) -> Path:
    """The file of this address, downloaded unless it is there.

    Beside it `NAME.sha256` has the digest of the first whole download, in the format of
    `sha256sum`. Two processes that want it at once wait for each other.

    Args:
        address: http or https.
        path: where it goes.
        sha256: what it must be, in hexadecimal; None: nothing is known.
        show: a progress bar.

    Raises:
        Elsewhere: there is no network, or no such file there.
        UserError: it is not what it must be, or has changed since it was downloaded.
        RunFailed: the disk is full.
    """
    lock, waits = path.with_name(f".{path.name}.lock"), False
    while not path.is_file():
        try:
            with exclusive(lock, str(path)), written_to(path.parent):
                if not path.is_file():
                    download(address, path, sha256, show)
        except InUse as error:
            if not waits:
                log.warning("waiting: %s", error)
            waits = True
            time.sleep(0.5)
    check_kept(path, sha256)
    return path


def check_kept(path: Path, sha256: str | None) -> None:
    """That a file is what was downloaded, and what it must be.

    Raises:
        UserError: it is not.
    """
    digest, note = sha256_of(path), path.with_name(f"{path.name}.sha256")
    with suppress(OSError, IndexError):
        noted = note.read_text().split()[0]
        if noted != digest:
            raise UserError(
                f"{path} has changed since it was downloaded (SHA-256 {digest}, then {noted}): "
                "remove it, and it is downloaded again"
            )
    check_given(path, digest, sha256)
    if not note.is_file():  # brought by hand
        write_note(path, digest)


def check_given(path: Path, digest: str, sha256: str | None) -> None:
    """That a file that is there is the one that was asked for.

    Raises:
        UserError: it is not.
    """
    if sha256 is not None and sha256.lower() != digest:
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {sha256.lower()}: remove it to have it anew, "
            "or mend what stands behind #sha256="
        )


def write_note(path: Path, digest: str) -> None:
    """As `sha256sum` writes it."""
    with suppress(OSError), replacing(path.with_name(f"{path.name}.sha256")) as part:
        part.write_text(f"{digest}  {path.name}\n")


def download(address: str, path: Path, sha256: str | None, show: bool) -> None:
    """Into `.NAME.download`, which stays when it breaks off, then the name."""
    part = path.with_name(f".{path.name}.download")
    about = part.with_name(f"{part.name}.json")
    bar = Progress(
        PlainColumn("{task.description}"), *Progress.get_default_columns()[1:],
        DownloadColumn(), TransferSpeedColumn(), disable=not show, transient=True,
    )  # fmt: skip
    failures, most, whole = 0, 0, False
    with bar:
        task = bar.add_task(path.name, total=None)
        while not whole:
            most = max(most, size_of(part))
            try:
                whole = receive(address, part, about, bar, task)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise Elsewhere(
                        by_hand(address, path, f"{error.code} {error.reason}")
                    ) from error
                failures, trouble = failures + 1, f"{error.code} {error.reason}"
            except BROKEN as error:
                reason = getattr(error, "reason", None)
                trouble = str(reason or error or type(error).__name__)
                if isinstance(reason, socket.gaierror) and not size_of(part):  # no network at all
                    raise Elsewhere(by_hand(address, path, trouble)) from error
                failures = 0 if size_of(part) > most else failures + 1
            else:
                trouble = f"it ends after {size_of(part):,} bytes"
                failures = 0 if whole or size_of(part) > most else failures + 1
            if not whole and failures:
                if failures >= ATTEMPTS:
                    raise Elsewhere(by_hand(address, path, trouble))
                pause = PAUSE * 2 ** (failures - 1)
                log.warning("%s: %s; once more in %g s", address, trouble, pause)
                time.sleep(pause)
    digest = check_received(part, about, address, sha256)
    flush(part)
    write_note(path, digest)
    part.replace(path)
    about.unlink(missing_ok=True)
    size = path.stat().st_size / 1e6
    say(f"{path}: {size:,.1f} MB from {address}, SHA-256 {digest}", file=sys.stderr)


def size_of(part: Path) -> int:
    """Of what is there."""
    return part.stat().st_size if part.is_file() else 0


def receive(address: str, part: Path, about: Path, bar: Progress, task: Any) -> bool:
    """Go on with what is there; whether it is whole now.

    What the server has replaced meanwhile starts again: `If-Range` has it send all of it.
    """
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(about.read_text())
    done = size_of(part) if known.get("etag") else 0
    total = known.get("total")
    if done and done == total:
        return True
    request = urllib.request.Request(address, headers={"User-Agent": "ssl_xcit"})
    if done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", known["etag"])
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return start_again(part, about)  # more than there is: it is another file now
    with answer:
        if answer.status != 206:
            done = 0
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            return start_again(part, about)
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else None
        content = {"etag": answer.headers.get("ETag"), "total": total}
        about.write_text(json.dumps(content))
        bar.update(task, completed=done, total=total)
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(task, completed=done)
    return total is None or done == total


def start_again(part: Path, about: Path) -> bool:
    """What is there is of no use; not whole."""
    part.unlink(missing_ok=True)
    about.unlink(missing_ok=True)
    return False


def check_received(part: Path, about: Path, address: str, sha256: str | None) -> str:
    """Against the server's word and the user's; what is wrong is not kept.

    Returns:
        The SHA-256.

    Raises:
        UserError: it is something else.
    """
    known = json.loads(about.read_text())
    etag = re.fullmatch(r'"([0-9a-f]{32})"', known.get("etag") or "")
    problems, digest = [], sha256_of(part)
    with part.open("rb") as file:
        if file.read(200).lstrip().lower().startswith((b"<!doctype", b"<html")):
            problems.append("the text of a web page")  # of a network that asks to log in
    if etag:  # S3's, of a file that was uploaded in one piece
        md5 = hashlib.md5(usedforsecurity=False)
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                md5.update(chunk)
        if md5.hexdigest() != etag[1]:
            problems.append(f"the MD5 {md5.hexdigest()}, and the server says {etag[1]}")
    if sha256 is not None and digest != sha256.lower():
        problems.append(f"the SHA-256 {digest}, not {sha256.lower()}")
    if problems:
        start_again(part, about)
        raise UserError(f"{address}: what came has {' and '.join(problems)}; it is not kept")
    return digest


def by_hand(address: str, path: Path, reason: str) -> str:
    """What to do without the network."""
    return (
        f"{address} cannot be downloaded ({reason}): bring the file by other means as {path}, or "
        "anywhere with ckpt=FILE"
    )
