"""Loader processes that may die or hang: batches by number, made again from where it happened."""

import contextlib
import logging
import mmap
import multiprocessing
import os
import queue
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any, Generic, NamedTuple, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ssl_xcit.cores import usable_cores
from ssl_xcit.errors import RunFailed

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
POLL = 1.0  # seconds between two looks at the workers while nothing comes
MAX_RESTARTS, AMONG = 3, 100  # so many within so many batches end the run
LAST_WORDS = 1024  # bytes of a worker's about the error that ends it
NO_MEMORY = "out of memory? Lower num_workers or batch_size"
NO_SHARED_MEMORY = "shared memory is full: enlarge /dev/shm, or lower num_workers or batch_size"
HINTS = {
    -signal.SIGKILL: NO_MEMORY,
    -signal.SIGBUS: NO_SHARED_MEMORY,
    -signal.SIGSEGV: "a decoder crashed: ssl-xcit check finds the file",
}


class Cause(NamedTuple):
    """What an error's words mean, what to do, and whether it may be over in a moment."""

    words: str
    remedy: str
    passes: bool


CAUSES = (  # the first whose words are there counts
    Cause(
        "AF_UNIX|pymp-|listener-|temporary directory",
        "loader processes send tensors through sockets: set TMPDIR to a short path that can be "
        "written",
        passes=False,
    ),
    Cause(
        "too many open files|ancdata",
        "raise the limit of open files (ulimit -n 65536), or lower num_workers",
        passes=False,
    ),
    Cause(
        "start new thread|resource temporarily unavailable",
        "no more processes or threads are allowed: raise the limit (ulimit -u or -v, or that of "
        "the container or job), or lower num_workers; num_workers=0 needs none",
        passes=False,
    ),
    Cause(
        "file too large",
        "raise the limit of a file's size (ulimit -f unlimited)",
        passes=False,
    ),
    Cause("can(no|')t allocate memory|MemoryError|insufficient memory", NO_MEMORY, passes=True),
    Cause("shared memory|unable to mmap", NO_SHARED_MEMORY, passes=True),
)


def default_workers(devices: int = 1) -> int:
    """One a core that this process may use and shares with so many devices, less one for training,
    at most 12.
    """
    return min(12, max(0, usable_cores() // max(devices, 1) - 1))


def start_worker(worker_id: int) -> None:
    """One thread each; Ctrl-C is for the process that started them."""
    one_thread()
    ignore_interrupt()


def ignore_interrupt() -> None:
    """Ctrl-C reaches every process of the terminal; those that load must outlive it until the step
    is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def one_thread() -> None:
    """OpenCV's own threads would fight those of the training; torch's are one in workers."""
    cv2.setNumThreads(1)


class Worker(ForkProcess):
    """A loader process; what ends it is no traceback but a line for the process that started it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.note = mmap.mmap(-1, LAST_WORDS)  # shared

    def run(self) -> None:
        """Load until nothing more is wanted."""
        # the thread that hands out shared memory calls this hook
        sys.excepthook = lambda kind, error, where: self.end(error)
        try:
            super().run()
        except BaseException as error:
            self.end(error)

    def end(self, error: BaseException) -> None:
        """At once, in whichever thread."""
        try:
            words = one_line(error).encode(errors="replace")[:LAST_WORDS]
            self.note[: len(words)] = words
        finally:  # without words where there is no memory for them
            os._exit(1)

    def last_words(self) -> str:
        """What it has said about its end; empty: nothing."""
        return self.note[:].rstrip(b"\0").decode(errors="replace")


class Results(Queue):
    """A batch that cannot be sent would never come, and nobody would know: it ends the worker."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, batch: object) -> None:
        process = multiprocessing.current_process()
        if isinstance(process, Worker):
            process.end(error)


class Workers(ForkContext):
    """How a loader starts its processes; keeps them."""

    def __init__(self) -> None:
        self.made: list[Worker] = []

    def Process(self, *args: Any, **kwargs: Any) -> Worker:  # type: ignore[override]
        """One that is not started yet."""
        self.made.append(Worker(*args, **kwargs))
        return self.made[-1]

    def Queue(self, maxsize: int = 0) -> Results:
        """For what they are asked and what they answer."""
        return Results(maxsize, ctx=self)

    def started(self) -> list[Worker]:
        """Those that are, or were, running."""
        return [worker for worker in self.made if worker.pid is not None]


class Accident(Exception):
    """No more batches come from these workers, through no fault of the program.

    Args:
        trouble: what has happened and what to do, in one line.
        passes: whether making the loader again may help.
    """

    def __init__(self, trouble: str, passes: bool = True):
        super().__init__(trouble)
        self.passes = passes


class NoWorkers(RunFailed):
    """This machine or its limits let no loader process work: no image is to blame."""


class Restarting(Generic[Batch]):
    """Batches `start` to `num_batches` of a loader that is made again when a worker dies, or when
    nothing comes for `timeout` seconds.

    Since batch n is a function of n, what comes is the same as without the accident.

    Args:
        make: the loader of the batches from a number on.
        num_batches: in all.
        start: first batch.
        timeout: seconds.

    Attributes:
        waited: seconds that the caller has spent waiting so far.
        done: number of the next batch.
        while_waiting: called every second while nothing comes, and after an accident; may raise.
    """

    def __init__(
        self,
        make: Callable[[int], DataLoader],
        num_batches: int,
        start: int = 0,
        timeout: float = 300.0,
    ):
        self.make = make
        self.num_batches = num_batches
        self.start = start
        self.timeout = timeout
        self.waited = 0.0
        self.done = start
        self.while_waiting: Callable[[], None] = lambda: None
        self.restarts: deque[int] = deque(maxlen=MAX_RESTARTS)

    def __len__(self) -> int:
        """Of all batches, the first included: Lightning compares it with the steps of the run."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order.

        Raises:
            RunFailed: the third accident within a hundred batches, or one that will not pass.
        """
        self.done = self.start
        self.restarts.clear()
        while self.done < self.num_batches:
            fetched = None
            try:
                fetched = Fetched(self.make(self.done))
                while self.done < self.num_batches:
                    began = time.perf_counter()
                    batch = fetched.next(self.timeout, self.while_waiting)
                    self.waited += time.perf_counter() - began
                    self.done += 1
                    yield batch
            except Accident as accident:
                self.while_waiting()
                self.restart(accident)
            finally:
                if fetched is not None:
                    fetched.close()

    def restart(self, trouble: Accident) -> None:
        """Say it, and give up when it will not pass or happens too often."""
        if not trouble.passes:
            raise NoWorkers(str(trouble)) from trouble
        self.restarts.append(self.done)
        if len(self.restarts) == MAX_RESTARTS and self.done - self.restarts[0] < AMONG:
            raise RunFailed(
                f"{trouble}; that was the {MAX_RESTARTS}rd time within {AMONG} batches, at batch "
                f"{self.done}"
            )
        log.warning("%s; started again at batch %s, nothing is lost", trouble, self.done)


class Fetched:
    """A loader's batches, taken by a thread of their own: a worker that dies in the middle of a
    message leaves whoever reads it waiting for ever, and that must not be the training.
    """

    def __init__(self, loader: DataLoader):
        self.workers: list[Worker] = []
        self.closed = threading.Event()
        self.ready: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(maxsize=1)
        if loader.num_workers == 0:
            one_thread()
            self.batches = iter(loader)
            return
        context = loader.multiprocessing_context
        assert isinstance(context, Workers)
        use_socket_folder()
        try:
            self.batches = iter(loader)
            threading.Thread(target=self.fetch, daemon=True).start()
        except (OSError, RuntimeError, MemoryError) as error:
            trouble = start_trouble(error, context.started())
            for worker in context.started():
                worker.kill()
            for frame, _ in traceback.walk_tb(error.__traceback__):
                abandon(frame.f_locals.get("self"))
            raise trouble from error
        finally:
            if threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever the main thread is, in the middle of a step
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.workers = context.started()

    def fetch(self) -> None:
        """Until the loader ends, fails, or nobody asks any more."""
        while not self.closed.is_set():
            try:
                item: tuple[Any, Exception | None] = next(self.batches), None
            except Exception as error:
                item = None, error
            while not self.closed.is_set():
                with contextlib.suppress(queue.Full):
                    self.ready.put(item, timeout=POLL)
                    break
            if item[1] is not None:
                return

    def next(self, timeout: float, while_waiting: Callable[[], None]) -> Any:
        """The next batch.

        Raises:
            Accident: what happened to the workers.
        """
        if not self.workers:
            return next(self.batches)
        deadline = time.monotonic() + timeout
        while True:
            try:
                batch, error = self.ready.get(timeout=min(POLL, timeout))
            except queue.Empty:
                batch, error = None, None
                while_waiting()
            else:
                if error is None:
                    return batch
                wait([w.sentinel for w in self.workers], timeout=1.0)
            dead = [w for w in self.workers if not w.is_alive()]
            if dead:
                raise obituary(dead)
            if error is not None:
                raise batch_trouble(error) from error
            if time.monotonic() >= deadline:
                raise Accident(
                    f"nothing came from {len(self.workers)} loader processes within {timeout:g} s "
                    "(worker_timeout): a file system that hangs?"
                )

    def close(self) -> None:
        """End the processes; one that hangs would outlive a polite request."""
        self.closed.set()
        for worker in self.workers:
            worker.kill()
        abandon(self.batches)


def obituary(dead: Sequence[Worker]) -> Accident:
    """Which workers ended, how, and what it may mean."""
    ended: dict[str, list[str]] = {}
    passes = True
    for worker in dead:
        worker.join(1.0)
        code = worker.exitcode
        if words := worker.last_words():
            cause = cause_of(words)
            hint = cause and cause.remedy
            passes = passes and (cause is None or cause.passes)
        else:
            words = f"exit code {code}"
            if code is not None and code < 0:
                words = signal.Signals(-code).name
            hint = HINTS.get(code) if code is not None else None
        ended.setdefault(f"{words}: {hint}" if hint else words, []).append(str(worker.pid))
    causes = [
        f"loader process{'es' * (len(pids) > 1)} {', '.join(pids)} ended ({how})"
        for how, pids in ended.items()
    ]
    return Accident(", ".join(causes), passes)


def one_line(error: BaseException) -> str:
    """An error's type and words; of one that torch has brought from a worker, those of there."""
    lines = str(error).strip().splitlines() or [""]
    if from_worker(error):
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"


def from_worker(error: BaseException) -> bool:
    """Whether torch has brought it from a worker, with the traceback of there in its words."""
    return str(error).startswith("Caught ") and "in DataLoader worker process" in str(error)


def cause_of(words: str) -> Cause | None:
    """What an error's words mean, if that is known."""
    return next((cause for cause in CAUSES if re.search(cause.words, words, re.IGNORECASE)), None)


def batch_trouble(error: Exception) -> Exception:
    """What came in place of a batch: an accident, or an error of the program as it is."""
    words = one_line(error)
    if cause := cause_of(words):
        return Accident(f"a batch could not be loaded ({words}): {cause.remedy}", cause.passes)
    if isinstance(error, OSError | EOFError) and not from_worker(error):
        return Accident(f"the connection to a loader process broke ({words})")
    return error


def start_trouble(error: Exception, started: Sequence[Worker]) -> Exception:
    """Why workers could not be started, or an error of the program as it is."""
    if dead := [worker for worker in started if not worker.is_alive()]:
        return obituary(dead)
    words = one_line(error)
    if cause := cause_of(words):
        remedy = cause.remedy
    elif isinstance(error, OSError):
        remedy = "/dev/shm must be there, be writable and have room; num_workers=0 does without"
    else:
        return error
    return Accident(f"loader processes cannot be started ({words}): {remedy}", passes=False)


def abandon(iterator: object) -> None:
    """Keep torch's iterator, whose workers are killed, from closing itself when it is collected:
    half made it would print a traceback, as in a worker forked meanwhile, and it waits for its
    thread for ever where that waits for a dead worker's message.
    """
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        state = vars(iterator)  # half made, it may lack some of these
        state["_shutdown"] = True
        if state.get("_worker_pids_set"):
            _remove_worker_pids(id(iterator))
            state["_worker_pids_set"] = False
        if pinning := state.get("_pin_memory_thread_done_event"):
            pinning.set()


def use_socket_folder() -> None:
    """Tensors come from workers through sockets, in a folder of multiprocessing's below TMPDIR, and
    a socket's path has at most 107 bytes. Where that folder holds none, or is gone, another is used
    until exit.

    Raises:
        Accident: there is none.
    """
    settings: dict[str, Any] = multiprocessing.current_process().__dict__["_config"]
    if holds_sockets(settings.get("tempdir")):
        return
    for place in (None, "/tmp", "/dev/shm", "/var/tmp"):
        try:
            folder = tempfile.mkdtemp(prefix="pymp-", dir=place)
        except OSError:
            continue
        Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)
        if holds_sockets(folder):
            settings["tempdir"] = folder
            return
    raise Accident(
        f"loader processes need a folder for sockets, and TMPDIR={os.environ.get('TMPDIR', '')}, "
        "/tmp, /dev/shm and /var/tmp hold none: set TMPDIR to a short path that can be written",
        passes=False,
    )


def holds_sockets(folder: str | None) -> bool:
    """Whether one can be made there, with a name as long as multiprocessing's."""
    if folder is None:
        return False
    path = os.path.join(folder, "listener-12345678")
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True


def loader_options(num_workers: int) -> dict[str, Any]:
    """What all loaders share."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        "multiprocessing_context": Workers() if num_workers else None,
    }


class Looks(Dataset[Any]):
    """What a function finds in each of so many images."""

    def __init__(self, look: Callable[[int], Any], count: int):
        self.look = look
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.look(index)


def look_at_all(
    look: Callable[[int], Any],
    count: int,
    num_workers: int | None,
    start: int = 0,
    timeout: float = 300.0,
    chunk: int = 16,
) -> Restarting[list[Any]]:
    """`look(i)` for every i, in parallel and in order, in lists of `chunk`, from list number
    `start` on.
    """
    dataset = Looks(look, count)
    workers = usable_cores() if num_workers is None else num_workers

    def make(first: int) -> DataLoader:
        return DataLoader(
            dataset,
            chunk,
            sampler=range(first * chunk, count),
            collate_fn=list,
            generator=torch.Generator(),
            **loader_options(workers),
        )

    return Restarting(make, -(-count // chunk), start, timeout)
