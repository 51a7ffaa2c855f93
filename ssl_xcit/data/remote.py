"""Tar shards behind URLs: whole files are fetched through fsspec into a cache folder, ahead of use.

fsspec's own caches have neither a limit, nor checksums, nor locks between processes. Here a file is
fetched by one process of the machine into a temporary file, which goes on where it was cut off, is
compared with the checksum of the index that `ssl-xcit shard` writes, and takes its name when it is
whole. Beyond the limit the files that were not used for the longest time are removed.
"""

import fnmatch
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ssl_xcit.data.labels import normalised
from ssl_xcit.errors import MissingPath, RunFailed, UserError
from ssl_xcit.utils.files import PARTIAL, flush, sha256_of, writable_folder
from ssl_xcit.utils.locks import InUse, exclusive

log = logging.getLogger(__name__)
T = TypeVar("T")
INDEX, LISTING = "shards.json", "listing.jsonl.gz"  # beside the tars, by `ssl-xcit shard`
MAX_INDEX = 2**28  # bytes
MAX_URLS = 10**6  # that a pattern stands for
BLOCK = 2**23  # bytes of a request
TRIES, QUESTIONS = 8, 6  # without progress, until a server counts as gone; before anything starts
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try, doubled each time; at most
TIMEOUT = 60.0  # seconds without a byte
SLOW = 30.0  # seconds between two lines about a file that is waited for
ABANDONED = 3600.0  # seconds after which a temporary file may be removed
REFRESHED = 10.0  # seconds between two notes that a file is in use
WAIT = 60.0  # seconds until waiting for another process is logged
AT_ONCE = 16  # questions for sizes
LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true: a "
    "public bucket; FSSPEC_S3_ENDPOINT_URL=URL: a server of your own)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS=FILE, or type gcloud auth application-default login",
    "hf": "set HF_TOKEN, or type hf auth login",
    "http": "put the login into ~/.netrc, or use an address that holds a token",
}
LOGIN |= {"gcs": LOGIN["gs"], "s3a": LOGIN["s3"], "https": LOGIN["http"]}
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface-hub"}
NO_LOGIN = ("NoCredentials", "PartialCredentials", "DefaultCredentials", "ProfileNotFound")
OURS = (TypeError, AttributeError, NotImplementedError, NameError)  # not the server's
OURS_IN_CACHE = re.compile(rf"[0-9a-f]{{64}}|\.[0-9a-f]{{64}}\.\d+{re.escape(PARTIAL)}")
thread_locks: dict[tuple[int, Path], threading.Lock] = {}  # by process, for one may be forked


class Refusal(UserError):
    """A server does not give what was asked for."""


class Missing(Refusal, MissingPath):
    """A server does not have what was asked for."""


class RemoteFile(NamedTuple):
    """A file behind a URL."""

    url: str
    size: int  # in bytes
    sha256: str = ""  # in hexadecimal; empty: no index says so
    version: str = ""  # what the server calls its version

    @property
    def name(self) -> str:
        """Return its name in the cache, by its content where that is known."""
        known = f"{shown(self.url)}\0{self.size}\0{self.version}"
        return self.sha256 or hashlib.sha256(os.fsencode(known)).hexdigest()


class FoundTars(NamedTuple):
    """Tars behind URLs, and what the index beside them says."""

    tars: list[RemoteFile]
    listings: list[RemoteFile]  # of the images in them
    class_names: dict[str, list[str]]  # by class id, of the tar with a URL


def is_url(place: object) -> bool:
    """Whether a place is a URL, not a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(place)) is not None


def protocol_of(url: str) -> str:
    """Return `s3` of `s3://bucket/train`."""
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """Return a URL without the password or signature that it may hold."""
    return re.sub(r"(?<=://)[^/@]*@", "", url.partition("?")[0])


def file_system(url: str) -> Any:
    """Return fsspec's file system for a URL.

    Raises:
        UserError: a package is missing, or there is none for such URLs.
    """
    protocol = protocol_of(url)
    options: dict[str, Any] = {}
    try:
        import fsspec

        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            client = {"timeout": timeout, "trust_env": True}  # proxies, ~/.netrc
            configured = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
            options["client_kwargs"] = client | configured
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise UserError(
            f"{shown(url)} needs a package that is not installed ({error}): pip install "
            f"'ssl-xcit[remote]' {PACKAGES.get(protocol, '')}".rstrip()
        ) from error
    except ValueError as error:
        if "rotocol" not in str(error):
            raise
        raise UserError(
            f"{shown(url)}: {protocol}:// is not known; s3://, gs://, hf://, http:// and https:// "
            "are, and whatever else fsspec has"
        ) from error


def retried(
    call: Callable[[], T],
    url: str,
    tries: int = TRIES,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Return `call()`, repeated with growing pauses while the connection or the server fails.

    Args:
        call: to the server.
        url: for messages.
        tries: this many failures in a row without progress are the end.
        progress: returns a number that has grown when a failed call got something done.

    Raises:
        UserError: the server refuses; says what to set.
        RunFailed: it fails for too long.
    """
    failures, most = 0, progress()
    while True:
        try:
            return call()
        except (UserError, RunFailed, *OURS):
            raise
        except Exception as error:
            error = underlying(error, url)
            status = status_of(error)
            if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
                raise refusal(url, status) from error
            reason = f"status {status}" if status else f"{type(error).__name__}: {error}"
            failures = 1 if progress() > most else failures + 1
            most = max(most, progress())
            if failures >= tries:
                raise RunFailed(
                    f"{shown(url)} cannot be fetched ({reason}, {failures} times in a row): is the "
                    "address right, and the network up? The same command goes on"
                ) from error
            pause = min(LONGEST_PAUSE, PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            with suppress(AttributeError, KeyError, ValueError, TypeError):
                asked = float(error.headers["Retry-After"])  # type: ignore[attr-defined]
                pause = max(pause, min(asked, LONGEST_PAUSE))
            level = logging.WARNING if failures > 2 else logging.INFO
            log.log(level, "%s: %s; again in %.1f s", shown(url), reason, pause)
            time.sleep(pause)


def underlying(error: Exception, url: str) -> Exception:
    """Return the error itself: fsspec's HTTP calls every failure to learn a size a missing file."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and isinstance(cause, Exception)
    return cause if hidden and protocol_of(url).startswith("http") else error  # type: ignore[return-value]


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error of some file system stands for; None: another error."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # of gcsfs
        return 403
    if type(error).__name__.startswith(NO_LOGIN):
        return 401
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def refusal(url: str, status: int) -> Refusal:
    """Return an error that says what to set."""
    login = LOGIN.get(protocol_of(url), f"see the documentation of fsspec's {protocol_of(url)}://")
    if status == 404:
        hidden = f"; of a private place: {login}" if protocol_of(url) in ("hf", "gs", "gcs") else ""
        return Missing(f"{shown(url)}: no such bucket, folder or file (404){hidden}")
    if status in (401, 403):
        reason = "a login is needed" if status == 401 else "access is denied"
        return Refusal(f"{shown(url)}: {reason} ({status}): {login}")
    return Refusal(f"{shown(url)}: the server refuses with status {status}")


def find_tars(place: str) -> FoundTars:
    """Find the tars of a folder, of a pattern (`*`, `{000..127}`), or one; by the index beside them
    where there is one.

    Raises:
        MissingPath: there are none.
        UserError: the server refuses, or does not tell sizes.
    """
    path, query, _ = place.partition("?")
    path = path.removesuffix(f"/{INDEX}").rstrip("/")
    is_folder = not path.endswith(".tar")
    folder, _, last = (path, "", "*.tar") if is_folder else path.rpartition("/")
    if set("*{}") & set(folder):
        raise UserError(f"data.root={shown(place)}: * and {{}} may stand in the last part only")
    named = [place] if query else [f"{folder}/{name}" for name in expanded(last)]
    index = FoundTars([], [], {}) if query else read_index(folder)
    known = {file.url: file for file in index.tars}
    found: dict[str, Any] = {url: {} for url in named}
    if "*" in last:
        fitting = [url for url in known if fnmatch.fnmatch(url.rpartition("/")[2], last)]
        found = {url: {} for url in fitting} or listed(folder, last)
    if not found:
        raise MissingPath(f"data.root={shown(place)}: no tar shards (*.tar) there")
    urls = sorted(found) if "*" in last else named
    if known.keys() >= set(urls):
        return index._replace(tars=[known[url] for url in urls])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tars = list(pool.map(lambda url: described(url, found[url]), urls))
    return FoundTars(tars, [], index.class_names)


def expanded(pattern: str) -> list[str]:
    """Return `x-008.tar`, `x-009.tar`, `x-010.tar` of `x-{008..010}.tar`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        if "{" in pattern:
            raise UserError(f"data.root: {pattern}: braces hold two numbers, as {{000000..000127}}")
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MAX_URLS:
        raise UserError(f"data.root: {pattern}: it stands for {max(0, last - first + 1):,} tars")
    before, after = pattern[: match.start()], expanded(pattern[match.end() :])
    width = len(match[1]) if match[1].startswith("0") else 0
    return [f"{before}{i:0{width}d}{end}" for i in range(first, last + 1) for end in after]


def listed(folder: str, pattern: str) -> dict[str, Any]:
    """Return the URLs in a folder that fit a pattern, with what its file system says of them."""
    try:
        rows = retried(lambda: file_system(folder).ls(folder, detail=True), folder, QUESTIONS)
    except Refusal as error:
        if not protocol_of(folder).startswith("http"):
            raise
        raise type(error)(
            f"{error}; where a server lists no folder, name the tars: "
            f"data.root='{shown(folder)}/NAME-{{000000..000127}}.tar'"
        ) from error
    names = {str(row["name"]).rstrip("/").rpartition("/")[2]: row for row in rows}
    return {f"{folder}/{n}": row for n, row in names.items() if fnmatch.fnmatch(n, pattern)}


def described(url: str, row: Any) -> RemoteFile:
    """Return a file with its size and version, which are asked for if `row` has none."""
    if row.get("size") is None:
        row = retried(lambda: file_system(url).info(url), url, QUESTIONS)
    if row.get("size") is None:
        raise UserError(f"{shown(url)}: the server does not tell its size; {INDEX} beside it would")
    keys = ("ETag", "etag", "LastModified", "Last-Modified", "md5Hash", "blob_id", "created")
    return RemoteFile(url, int(row["size"]), "", repr([row[key] for key in keys if key in row]))


def read_index(folder: str) -> FoundTars:
    """Return what the index of a folder says; no tars where there is none, or none with checksums.

    Raises:
        RunFailed: the server fails for too long.
    """
    url = f"{folder}/{INDEX}"

    def content() -> bytes:
        with file_system(url).open(url, "rb", block_size=BLOCK, cache_type="none") as file:
            blocks, size = [], 0
            while (block := file.read(BLOCK)) and size <= MAX_INDEX:
                blocks.append(block)
                size += len(block)
        return b"".join(blocks)

    try:
        text = retried(content, url, QUESTIONS)
    except Refusal:
        return FoundTars([], [], {})  # many a bucket denies what is not there
    class_names: dict[str, list[str]] = {}
    try:
        rows = json.loads(text)
        class_names = names_by_tar(rows, folder)
        about = rows["listing"]
        listing = RemoteFile(f"{folder}/{LISTING}", int(about["bytes"]), about["sha256"])
        tars = [
            RemoteFile(f"{folder}/{row['file']}", int(row["bytes"]), row["tar_sha256"])
            for row in rows["shards"]
        ]
        names = [file.url[len(folder) + 1 :] for file in tars]
        if not all(re.fullmatch(r"[^/\\?#\0]+\.tar", name) for name in names) or not all(
            file.size >= 0 and re.fullmatch("[0-9a-f]{64}", file.sha256)
            for file in (*tars, listing)
        ):
            raise ValueError("a name, a size or a checksum that is none")
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s is no index with checksums (%s); ssl-xcit shard writes one",
            shown(url), type(error).__name__,
        )  # fmt: skip
        return FoundTars([], [], class_names)
    return FoundTars(tars, [listing], class_names)


def names_by_tar(index: Any, folder: str) -> dict[str, list[str]]:
    """Return the class names in an index by the place of each of its tars; none if it is of another
    program, or calls two classes alike.
    """
    try:
        names = [normalised(name) for name in index["class_names"]]
        tars = [os.path.join(folder, row["file"]) for row in index["shards"]]
    except (KeyError, TypeError):
        return {}
    return dict.fromkeys(tars, names) if len(set(names)) == len(names) else {}


@dataclass(frozen=True)
class FileCache:
    """Whole files in a folder, which all processes of a machine share."""

    folder: Path
    limit: int  # in bytes

    def path(self, file: RemoteFile) -> Path:
        """Return where a file is, or will be."""
        return self.folder / file.name

    def fetch(self, file: RemoteFile, tries: int = TRIES, wait: bool = True) -> Path:
        """Fetch a file if it is not there, and return its path; without `wait` only if no other
        thread or process fetches it.

        Raises:
            UserError: the server refuses.
            RunFailed: the server fails, or the disk, or the file is not what the index says.
        """
        path = self.path(file)
        lock = thread_locks.setdefault((os.getpid(), path), threading.Lock())
        if not lock.acquire(blocking=wait):
            return path
        place = self.folder / "locks" / file.name
        try:
            with exclusive(place, f"{shown(file.url)}", "it is being fetched", wait, patience=WAIT):
                if path.exists():
                    with suppress(OSError):  # removed meanwhile, or another user's
                        os.utime(path)
                else:
                    self.download(file, path, tries, waited_for=wait)
        except InUse:
            pass
        except UserError:  # MissingPath is an OSError too
            raise
        except OSError as error:
            raise self.unwritable(error) from error
        finally:
            lock.release()
        return path

    def download(self, file: RemoteFile, path: Path, tries: int, waited_for: bool) -> None:
        """Fetch a file that no other process fetches."""
        part = self.folder / f".{file.name}.{file.size}{PARTIAL}"
        for attempt in range(2):
            self.make_room(file.size, part)
            retried(
                lambda: self.append(file, part, waited_for),
                file.url, tries, lambda: part.stat().st_size,
            )  # fmt: skip
            if file.sha256 in ("", sha256_of(part)):
                break
            part.unlink()
            if attempt:
                raise RunFailed(
                    f"{shown(file.url)}: twice its SHA-256 was not that of {INDEX}: copy the shard "
                    f"or {INDEX} there again"
                )
            log.warning("%s: not the checksum of %s; fetched again", shown(file.url), INDEX)
        flush(part)
        part.replace(path)

    def append(self, file: RemoteFile, part: Path, waited_for: bool) -> None:
        """Append to a temporary file what it lacks."""
        http = protocol_of(file.url).startswith("http")
        options = {"size": file.size} if http else {}
        fs = file_system(file.url)
        with part.open("ab", buffering=0) as out:
            if out.tell() > file.size:
                out.truncate(0)
                out.seek(0)
            try:
                with fs.open(
                    file.url, "rb", block_size=BLOCK, cache_type="none", **options
                ) as source:
                    source.seek(out.tell())
                    self.copy(source, out, file, waited_for)
            except ValueError:  # fsspec's, of a server that knows no ranges: from the beginning
                if not http:
                    raise
                out.truncate(0)
                out.seek(0)
                with fs.open(file.url, "rb", block_size=0) as source:
                    self.copy(source, out, file, waited_for)

    def copy(self, source: Any, out: Any, file: RemoteFile, waited_for: bool) -> None:
        """Append blocks until the file has its size; say how far it is while somebody waits."""
        said = time.monotonic()
        while (missing := file.size - out.tell()) > 0:
            block = memoryview(source.read(min(BLOCK, missing)))[:missing]
            if not block:
                raise OSError(f"it ended {missing:,} bytes early")
            try:
                while block:
                    block = block[out.write(block) :]
            except OSError as error:
                raise self.unwritable(error) from error
            if waited_for and time.monotonic() - said > SLOW:
                said = time.monotonic()
                log.warning(
                    "waiting for %s: %.0f of %.0f MB",
                    shown(file.url), out.tell() / 1e6, file.size / 1e6,
                )  # fmt: skip

    def unwritable(self, error: OSError) -> RunFailed:
        """Return what to do about a full disk."""
        return RunFailed(
            f"data.cache={self.folder} cannot be written ({error.strerror}): make room, name "
            "another folder with data.cache=DIR, or set a lower data.cache_gb"
        )

    def make_room(self, size: int, part: Path) -> None:
        """Remove the files that were not used for the longest time until one of this size fits, and
        reserve its place by its temporary file, whose name says how large it will be.
        """
        place = self.folder / "locks" / "room"
        lock = thread_locks.setdefault((os.getpid(), place), threading.Lock())
        with lock, exclusive(place, f"data.cache={self.folder}", wait=True, patience=WAIT):
            rows, on_disk = [], 0
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if OURS_IN_CACHE.fullmatch(path.name) is None or path == part:
                        continue  # the folder may hold other files
                    partial = path.name.endswith(PARTIAL)
                    planned = int(path.name.split(".")[-2]) if partial else status.st_size
                    in_use = partial and time.time() - status.st_mtime < ABANDONED
                    on_disk += status.st_blocks * 512
                    rows.append((in_use, status.st_mtime, planned, path))
            held = sum(row[2] for row in rows)
            limit = min(self.limit, on_disk + shutil.disk_usage(self.folder).free)
            for in_use, _, planned, path in sorted(rows):
                if in_use or held + size <= limit:
                    break
                path.unlink(missing_ok=True)  # who reads it goes on doing so
                held -= planned
            part.touch()


class ShardFetcher:
    """Opens the files of a set of shards, fetched when they are asked for, or ahead of that by a
    thread of each process.
    """

    def __init__(self, files: Sequence[RemoteFile], cache: FileCache):
        self.files, self.cache = files, cache
        self.pid = 0  # of the process that the following belongs to
        self.moment: Any = None
        self.last = -2  # shard that was opened
        self.refreshed: dict[int, float] = {}  # times by descriptor
        self.todo: deque[int] = deque()
        self.wake = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFetcher, (self.files, self.cache)  # another process has its own thread

    def open(self, shard: int) -> int:
        """Return a descriptor of a shard."""
        file = self.files[shard]
        if self.moment is None and shard == self.last + 1 < len(self.files) - 1:  # one by one
            self.fetch_ahead([shard + 1])
        self.last = shard
        while True:
            try:
                descriptor = os.open(self.cache.path(file), os.O_RDONLY)
            except FileNotFoundError:
                self.cache.fetch(file)
                continue
            if os.fstat(descriptor).st_size == file.size:
                return descriptor
            os.close(descriptor)
            log.warning("%s was damaged in %s; fetched again", shown(file.url), self.cache.folder)
            self.cache.path(file).unlink(missing_ok=True)

    def refresh(self, descriptor: int) -> None:
        """Note that a file is in use, so that others are removed before it."""
        now = time.monotonic()
        if now - self.refreshed.get(descriptor, -math.inf) > REFRESHED:
            self.refreshed[descriptor] = now
            with suppress(OSError):  # another user's
                os.utime(descriptor)

    def read_ahead(self, moment: Any, upcoming: Callable[[], Iterable[int]]) -> None:
        """Fetch shards that will be read, as many as the cache holds, unless that was the last
        `moment` too.
        """
        if (moment, os.getpid()) == (self.moment, self.pid):
            return
        self.moment = moment
        chosen, total = [], 0
        for shard in upcoming():
            total += self.files[shard].size
            if total > self.cache.limit:
                break
            chosen.append(shard)
        self.fetch_ahead(chosen)

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Let the thread of this process fetch shards."""
        if self.pid != os.getpid():
            self.pid, self.wake = os.getpid(), threading.Event()
            threading.Thread(target=self.work, args=(self.wake,), daemon=True).start()
        self.todo = deque(shards)
        self.wake.set()

    def work(self, wake: threading.Event) -> None:
        """Fetch what is to do; whoever needs a file that fails tries again and says why."""
        while True:
            wake.wait()
            wake.clear()
            while self.todo:
                with suppress(Exception):
                    self.cache.fetch(self.files[self.todo.popleft()], tries=2, wait=False)


def open_cache(folder: Path, limit_gb: float) -> FileCache:
    """Return a cache in a folder, which is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        writable_folder(folder / "locks")
    except UserError as error:
        raise UserError(f"data.cache={folder}: {error}; name another folder") from error
    return FileCache(folder, int(limit_gb * 1e9))


def check_limit(
    files: Sequence[RemoteFile], num_images: int, window: int, cache: FileCache
) -> None:
    """Check that the shards whose images are mixed with each other fit the cache.

    Raises:
        UserError: they do not; says which value would do.
    """
    at_once = min(len(files), math.ceil(window * len(files) / num_images) + 2)
    needed = sum(sorted((file.size for file in files), reverse=True)[:at_once])
    if needed > cache.limit:
        digits = 10 ** (2 - math.floor(math.log10(needed / 1e9)))
        raise UserError(
            f"data.cache_gb={cache.limit / 1e9:g}: up to {at_once} shards are read at a time for "
            f"data.window={window}: set data.cache_gb={math.ceil(needed / 1e9 * digits) / digits:g}"
            " or more, or a smaller window"
        )
