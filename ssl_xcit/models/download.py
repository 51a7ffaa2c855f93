"""Download a file once, with pooch; compared with the user's digest, and at each use its own."""

import logging
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import replacing, sha256_of, written_to
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
ATTEMPTS = 4  # each from the start
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30.0  # seconds without a byte
TRANSIENT = {408, 429, 500, 502, 503, 504}  # statuses of a server that may answer next time


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
        UserError: no network, no such file there (says where to copy it by other means), another
            digest, or a file that has changed since it was downloaded.
        RunFailed: the disk is full.
    """
    if not path.is_file():
        lock = exclusive(path.with_name(f".{path.name}.lock"), str(path), wait=True)
        with lock, written_to(path.parent):
            if not path.is_file():
                download(address, path, sha256, show)
    verify_cached(path, sha256)
    return path


def download(address: str, path: Path, sha256: str | None, show: bool) -> None:
    """Download a file, which has its name when it is whole and has the digest asked for."""
    with replacing(path) as part:
        receive(address, part, path, show)
        digest, problems = sha256_of(part), []
        with part.open("rb") as file:
            if file.read(200).lstrip().lower().startswith((b"<!doctype", b"<html")):
                problems.append("the text of a web page")  # of a network with a log-in page
        if sha256 is not None and digest != sha256.lower():
            problems.append(f"the SHA-256 {digest}, not {sha256.lower()}")
        if problems:
            raise UserError(f"{address}: the download has {' and '.join(problems)}; it was removed")
    size = path.stat().st_size / 1e6
    say(f"{path}: {size:,.1f} MB from {address}, SHA-256 {digest}", file=sys.stderr)


def receive(address: str, part: Path, path: Path, show: bool) -> None:
    """Download to `part`, again if the server is busy or breaks off; the error names `path`."""
    import pooch  # only where it is needed
    import requests

    downloader = pooch.HTTPDownloader(progressbar=show, chunk_size=1 << 20, timeout=TIMEOUT)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return downloader(address, str(part), None)
        except requests.RequestException as error:
            if error.response is None:
                cause = innermost(error)
                reason, final = str(cause), isinstance(cause, socket.gaierror)  # no network
            else:
                reason = f"{error.response.status_code} {error.response.reason}"
                final = error.response.status_code not in TRANSIENT
            if final or attempt == ATTEMPTS:
                raise UserError(
                    f"{address} cannot be downloaded ({reason}): copy the file by other means to "
                    f"{path}, or anywhere with ckpt=FILE"
                ) from error
            pause = PAUSE * 2 ** (attempt - 1)
            log.warning("%s: %s; trying again in %g s", address, reason, pause)
            time.sleep(pause)


def innermost(error: BaseException) -> BaseException:
    """The error that others were raised for: the system's, in few words."""
    while error.__context__ is not None:
        error = error.__context__
    return error


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
    if not checksum.is_file():  # the first time; a folder that is read-only goes without
        with suppress(OSError), replacing(checksum) as part:
            part.write_text(f"{digest}  {path.name}\n")


def check_sha256(path: Path, digest: str, sha256: str | None) -> None:
    """Raise UserError for a file of another digest than was asked for."""
    if sha256 is not None and sha256.lower() != digest:
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {sha256.lower()}: remove it to download it "
            "again, or correct the digits behind #sha256="
        )
