"""Download a file once: an interrupted download is resumed, the file is compared with the digests
that server and user give, and with its own whenever it is used again.
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
from ssl_xcit.utils.files import flush, replacing, sha256_of, written_to
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.terminal import PlainColumn, say

log = logging.getLogger(__name__)
ATTEMPTS = 6  # in a row that receive nothing
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
BROKEN = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
)  # fmt: skip


class Unavailable(UserError):
    """A file cannot be downloaded; says where to copy it by other means."""


def fetch(address: str, path: Path, sha256: str | None = None, show: bool = False) -> Path:
    """Download the file of this address unless it is there, and return its path.

    Beside it `NAME.sha256` has the digest of the first whole download, in the format of
    `sha256sum`. Two processes that need it at once wait for each other.

    Args:
        address: http or https.
        path: where the file goes.
        sha256: the digest that it must have, in hexadecimal; None: any.
        show: a progress bar.

    Raises:
        Unavailable: there is no network, or no such file there.
        UserError: it has another digest, or has changed since it was downloaded.
        RunFailed: the disk is full.
    """
    if not path.is_file():
        lock = exclusive(path.with_name(f".{path.name}.lock"), str(path), wait=True)
        with lock, written_to(path.parent):
            if not path.is_file():
                download(address, path, sha256, show)
    verify_cached(path, sha256)
    return path


def verify_cached(path: Path, sha256: str | None) -> None:
    """Raise UserError unless a file is as it was downloaded, and of the digest asked for."""
    digest, checksum = sha256_of(path), path.with_name(f"{path.name}.sha256")
    with suppress(OSError, IndexError):
        recorded = checksum.read_text().split()[0]
        if recorded != digest:
            raise UserError(
                f"{path} has changed since it was downloaded (SHA-256 {digest}, then {recorded}): "
                "remove it to download it again"
            )
    check_sha256(path, digest, sha256)
    if not checksum.is_file():  # copied here by hand
        write_checksum(path, digest)


def check_sha256(path: Path, digest: str, sha256: str | None) -> None:
    """Raise UserError for a file of another digest than was asked for."""
    if sha256 is not None and sha256.lower() != digest:
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {sha256.lower()}: remove it to download it "
            "again, or correct the digits behind #sha256="
        )


def write_checksum(path: Path, digest: str) -> None:
    """Write `NAME.sha256` as `sha256sum` does; a folder that is read-only goes without."""
    with suppress(OSError), replacing(path.with_name(f"{path.name}.sha256")) as part:
        part.write_text(f"{digest}  {path.name}\n")


def download(address: str, path: Path, sha256: str | None, show: bool) -> None:
    """Download into `.NAME.download`, which stays when the connection breaks, then rename."""
    part = path.with_name(f".{path.name}.download")
    about = part.with_name(f"{part.name}.json")
    bar = Progress(
        PlainColumn("{task.description}"), *Progress.get_default_columns()[1:],
        DownloadColumn(), TransferSpeedColumn(), disable=not show, transient=True,
    )  # fmt: skip
    failures, most, complete = 0, 0, False
    with bar:
        task = bar.add_task(path.name, total=None)
        while not complete:
            most = max(most, partial_size(part))
            try:
                complete = receive(address, part, about, bar, task)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise Unavailable(
                        manual_download(address, path, f"{error.code} {error.reason}")
                    ) from error
                failures, trouble = failures + 1, f"{error.code} {error.reason}"
            except BROKEN as error:
                reason = getattr(error, "reason", None)
                trouble = str(reason or error or type(error).__name__)
                if isinstance(reason, socket.gaierror) and not partial_size(
                    part
                ):  # no network at all
                    raise Unavailable(manual_download(address, path, trouble)) from error
                failures = 0 if partial_size(part) > most else failures + 1
            else:
                trouble = f"it ended after {partial_size(part):,} bytes"
                failures = 0 if complete or partial_size(part) > most else failures + 1
            if not complete and failures:
                if failures >= ATTEMPTS:
                    raise Unavailable(manual_download(address, path, trouble))
                pause = PAUSE * 2 ** (failures - 1)
                log.warning("%s: %s; trying again in %g s", address, trouble, pause)
                time.sleep(pause)
    digest = verify_received(part, about, address, sha256)
    flush(part)
    write_checksum(path, digest)
    part.replace(path)
    about.unlink(missing_ok=True)
    size = path.stat().st_size / 1e6
    say(f"{path}: {size:,.1f} MB from {address}, SHA-256 {digest}", file=sys.stderr)


def partial_size(part: Path) -> int:
    """Bytes that were received."""
    return part.stat().st_size if part.is_file() else 0


def receive(address: str, part: Path, about: Path, bar: Progress, task: Any) -> bool:
    """Continue a download; True when the file is complete.

    A file that the server has replaced meanwhile is downloaded from the start: `If-Range` makes
    the server send all of it.
    """
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(about.read_text())
    done = partial_size(part) if known.get("etag") else 0
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
        return discard(part, about)  # longer than the server's file, which is another one now
    with answer:
        if answer.status != 206:
            done = 0
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            return discard(part, about)
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


def discard(part: Path, about: Path) -> bool:
    """Remove a partial download; False, for it is not complete."""
    part.unlink(missing_ok=True)
    about.unlink(missing_ok=True)
    return False


def verify_received(part: Path, about: Path, address: str, sha256: str | None) -> str:
    """Compare a download with the digests that server and user give, and return its SHA-256.

    Raises:
        UserError: it differs, or is a web page; it is removed.
    """
    known = json.loads(about.read_text())
    etag = re.fullmatch(r'"([0-9a-f]{32})"', known.get("etag") or "")
    problems, digest = [], sha256_of(part)
    with part.open("rb") as file:
        if file.read(200).lstrip().lower().startswith((b"<!doctype", b"<html")):
            problems.append("the text of a web page")  # of a network with a log-in page
    if etag:  # S3's, of a file that was uploaded in one piece
        md5 = hashlib.md5(usedforsecurity=False)
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                md5.update(chunk)
        if md5.hexdigest() != etag[1]:
            problems.append(f"the MD5 {md5.hexdigest()}, not the server's {etag[1]}")
    if sha256 is not None and digest != sha256.lower():
        problems.append(f"the SHA-256 {digest}, not {sha256.lower()}")
    if problems:
        discard(part, about)
        raise UserError(f"{address}: the download has {' and '.join(problems)}; it was removed")
    return digest


def manual_download(address: str, path: Path, reason: str) -> str:
    """The message for a file that cannot be downloaded."""
    return (
        f"{address} cannot be downloaded ({reason}): copy the file by other means to {path}, or "
        "anywhere with ckpt=FILE"
    )
