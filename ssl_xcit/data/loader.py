"""Resilient data loading: a loader whose worker dies or hangs is restarted at the next batch."""

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
from dataclasses import dataclass
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

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.utils.hardware import usable_cores

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
POLL = 1.0  # seconds between two checks of the workers while no batch comes
MAX_RESTARTS, AMONG = 3, 100  # so many restarts within so many batches end the run
MAX_MESSAGE = 1024  # bytes of a worker's message about the error that ends it
NO_MEMORY = "out of memory? Lower num_workers or batch_size"
NO_SHARED_MEMORY = "shared memory is full: enlarge /dev/shm, or lower num_workers or batch_size"
HINTS = {
    -signal.SIGKILL: NO_MEMORY,
    -signal.SIGBUS: NO_SHARED_MEMORY,
    -signal.SIGSEGV: "a decoder crashed: ssl-xcit check finds the file",
}


class Cause(NamedTuple):
    """A cause of accidents."""

    pattern: str  # matches the error's message
    remedy: str
    passes: bool  # whether it may be over in a moment


CAUSES = (  # the first whose pattern matches counts
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
    Cause("file too large", "raise the limit of a file's size (ulimit -f unlimited)", passes=False),
    Cause("can(no|')t allocate memory|MemoryError|insufficient memory", NO_MEMORY, passes=True),
    Cause("shared memory|unable to mmap", NO_SHARED_MEMORY, passes=True),
)


def start_worker(worker_id: int) -> None:
    """Use one thread, and ignore Ctrl-C: workers must outlive it until the step is saved."""
    cv2.setNumThreads(1)  # torch uses one in workers by itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)


FORKING = threading.Lock()  # held by the thread that forks


@contextlib.contextmanager
def one_opencv_thread() -> Iterator[None]:
    """End OpenCV's threads for the time of a fork. Of a pool that has begun, the copy has the book
    but not the threads, and waits for them without end. No other thread may be inside OpenCV then.
    """
    with FORKING:
        count = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            yield
        finally:
            cv2.setNumThreads(count)


class Worker(ForkProcess):
    """A loader process; an error that ends it becomes a line for the process that started it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.message = mmap.mmap(-1, MAX_MESSAGE)  # shared

    def start(self) -> None:
        """Fork, without OpenCV's threads."""
        with one_opencv_thread():
            super().start()

    def run(self) -> None:
        """Load until the loader is closed."""
        # the thread that hands out shared memory calls this hook
        sys.excepthook = lambda kind, error, where: self.end(error)
        try:
            super().run()
        except BaseException as error:
            self.end(error)

    def end(self, error: BaseException) -> None:
        """End the process at once, in whichever thread."""
        try:
            message = one_line(error).encode(errors="replace")[:MAX_MESSAGE]
            self.message[: len(message)] = message
        finally:  # without a message if there is no memory for it
            os._exit(1)

    def last_message(self) -> str:
        """Return the error that ended it; empty: it was none of Python's."""
        return self.message[:].rstrip(b"\0").decode(errors="replace")


class BatchQueue(Queue):
    """A queue that ends its worker when a batch cannot be sent, for nobody would notice."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, batch: object) -> None:
        process = multiprocessing.current_process()
        if isinstance(process, Worker):
            process.end(error)


class WorkerContext(ForkContext):
    """The multiprocessing context of a loader; keeps its processes."""

    def __init__(self) -> None:
        self.made: list[Worker] = []

    def Process(self, *args: Any, **kwargs: Any) -> Worker:  # type: ignore[override]
        """Make one that is not started yet."""
        self.made.append(Worker(*args, **kwargs))
        return self.made[-1]

    def Queue(self, maxsize: int = 0) -> BatchQueue:
        """Make a queue of indices or batches."""
        return BatchQueue(maxsize, ctx=self)

    def started(self) -> list[Worker]:
        """Return processes that are, or were, running."""
        return [worker for worker in self.made if worker.pid is not None]


class Accident(Exception):
    """The workers of a loader failed, through no fault of the program; says what to do."""

    def __init__(self, message: str, passes: bool = True):
        super().__init__(message)
        self.passes = passes  # whether restarting the loader may help


class TooManyAccidents(RunFailed):
    """Loader processes end or hang at the same place again and again."""


class NoWorkers(RunFailed):
    """No loader process can work on this machine or within its limits: no image is to blame."""


@dataclass(eq=False)
class ResilientLoader(Generic[Batch]):
    """Batches `start` to `num_batches` of a loader that is restarted when a worker dies, or when no
    batch comes for `timeout` seconds.

    Since batch n is a function of n, the batches are those of a loader without accidents.

    Attributes:
        waited: seconds that the caller has spent waiting so far.
        done: number of the next batch.
        while_waiting: called every second while no batch comes, and after an accident; may raise.
    """

    make: Callable[[int], DataLoader]  # returns the loader of the batches from a number on
    num_batches: int  # in all
    start: int = 0  # first batch
    timeout: float = 300.0  # seconds

    def __post_init__(self) -> None:
        """Begin at the first batch."""
        self.waited = 0.0
        self.done = self.start
        self.while_waiting: Callable[[], None] = lambda: None
        self.restarts: deque[int] = deque(maxlen=MAX_RESTARTS)

    def __len__(self) -> int:
        """Return the number of all batches, which Lightning compares with the steps of the run."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in order.

        Raises:
            RunFailed: the third accident within a hundred batches, or one that does not pass.
        """
        self.done = self.start
        self.restarts.clear()
        while self.done < self.num_batches:
            prefetch = None
            try:
                prefetch = PrefetchThread(self.make(self.done))
                while self.done < self.num_batches:
                    began = time.perf_counter()
                    batch = prefetch.next(self.timeout, self.while_waiting)
                    self.waited += time.perf_counter() - began
                    self.done += 1
                    yield batch
            except Accident as accident:
                self.while_waiting()
                self.restart(accident)
            finally:
                if prefetch is not None:
                    prefetch.close()

    def restart(self, accident: Accident) -> None:
        """Log it, and give up when it does not pass or happens too often."""
        if not accident.passes:
            raise NoWorkers(str(accident)) from accident
        self.restarts.append(self.done)
        if len(self.restarts) == MAX_RESTARTS and self.done - self.restarts[0] < AMONG:
            raise TooManyAccidents(
                f"{accident}; that was the {MAX_RESTARTS}rd time within {AMONG} batches, at batch "
                f"{self.done}"
            )
        log.warning("%s; started again at batch %s, nothing is lost", accident, self.done)


class PrefetchThread:
    """A thread that takes a loader's batches: a worker that dies in the middle of a message leaves
    its reader waiting for ever, and that must not be the training.
    """

    def __init__(self, loader: DataLoader):
        self.workers: list[Worker] = []
        self.closed = threading.Event()
        self.ready: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(maxsize=1)
        if loader.num_workers == 0:
            cv2.setNumThreads(1)  # OpenCV's threads would fight those of the training
            self.batches = iter(loader)
            return
        context = loader.multiprocessing_context
        assert isinstance(context, WorkerContext)
        use_socket_folder()
        try:
            self.batches = iter(loader)
            threading.Thread(target=self.fetch, daemon=True).start()
        except (OSError, RuntimeError, MemoryError) as error:
            failure = start_failure(error, context.started())
            for worker in context.started():
                worker.kill()
            for frame, _ in traceback.walk_tb(error.__traceback__):
                abandon(frame.f_locals.get("self"))
            raise failure from error
        finally:
            if threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever the main thread is, in the middle of a step
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.workers = context.started()

    def fetch(self) -> None:
        """Fetch until the loader ends, fails, or is closed."""
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
        """Return the next batch.

        Raises:
            Accident: the workers failed.
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
                raise worker_failure(dead)
            if error is not None:
                raise batch_failure(error) from error
            if time.monotonic() >= deadline:
                raise Accident(
                    f"no batch came from {len(self.workers)} loader processes within {timeout:g} s "
                    "(worker_timeout): a file system that hangs?"
                )

    def close(self) -> None:
        """Kill the processes; one that hangs would ignore SIGTERM."""
        self.closed.set()
        for worker in self.workers:
            worker.kill()
        abandon(self.batches)


def worker_failure(dead: Sequence[Worker]) -> Accident:
    """Say which workers ended, how, and what to do."""
    pids_by_reason: dict[str, list[str]] = {}
    passes = True
    for worker in dead:
        worker.join(1.0)
        code = worker.exitcode
        if reason := worker.last_message():
            cause = cause_of(reason)
            hint = cause and cause.remedy
            passes = passes and (cause is None or cause.passes)
        else:
            reason = f"exit code {code}"
            if code is not None and code < 0:
                reason = signal.Signals(-code).name
            hint = HINTS.get(code) if code is not None else None
        reason = f"{reason}: {hint}" if hint else reason
        pids_by_reason.setdefault(reason, []).append(str(worker.pid))
    sentences = [
        f"loader process{'es' * (len(pids) > 1)} {', '.join(pids)} ended ({reason})"
        for reason, pids in pids_by_reason.items()
    ]
    return Accident(", ".join(sentences), passes)


def one_line(error: BaseException) -> str:
    """Return an error's type and message; of one that torch has brought from a worker, its own."""
    lines = str(error).strip().splitlines() or [""]
    if from_worker(error):
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"


def from_worker(error: BaseException) -> bool:
    """Whether torch has brought it from a worker, whose traceback is in its message."""
    return str(error).startswith("Caught ") and "in DataLoader worker process" in str(error)


def cause_of(message: str) -> Cause | None:
    """Return the known cause of an error's message."""
    causes = (cause for cause in CAUSES if re.search(cause.pattern, message, re.IGNORECASE))
    return next(causes, None)


def batch_failure(error: Exception) -> Exception:
    """Return what came in place of a batch: an accident, or an error of the program as it is."""
    message = one_line(error)
    if isinstance(error, RunFailed | UserError) and from_worker(error):
        return type(error)(message.partition(": ")[2])
    if cause := cause_of(message):
        return Accident(f"a batch could not be loaded ({message}): {cause.remedy}", cause.passes)
    if isinstance(error, OSError | EOFError) and not from_worker(error):
        return Accident(f"the connection to a loader process broke ({message})")
    return error


def start_failure(error: Exception, started: Sequence[Worker]) -> Exception:
    """Return why workers could not be started, or an error of the program as it is."""
    if dead := [worker for worker in started if not worker.is_alive()]:
        return worker_failure(dead)
    message = one_line(error)
    if cause := cause_of(message):
        remedy = cause.remedy
    elif isinstance(error, OSError):
        remedy = "/dev/shm must be there, be writable and have room; num_workers=0 does without"
    else:
        return error
    return Accident(f"loader processes cannot be started ({message}): {remedy}", passes=False)


def abandon(iterator: object) -> None:
    """Keep torch's iterator, whose workers are killed, from closing itself when it is collected:
    incomplete it would print a traceback, as in a worker forked meanwhile, and it waits for its
    thread for ever if that waits for a dead worker's message.
    """
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        state = vars(iterator)  # incomplete, it may lack some of these
        state["_shutdown"] = True
        if state.get("_worker_pids_set"):
            _remove_worker_pids(id(iterator))
            state["_worker_pids_set"] = False
        if pinning := state.get("_pin_memory_thread_done_event"):
            pinning.set()


def use_socket_folder() -> None:
    """Choose the folder of the sockets through which workers send tensors: multiprocessing's below
    TMPDIR, or until exit another if that is gone or its path too long (107 bytes at most).

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
    """Whether a socket can be made there, with a name as long as multiprocessing's."""
    if folder is None:
        return False
    path = os.path.join(folder, "listener-12345678")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True


def loader_options(num_workers: int) -> dict[str, Any]:
    """Return the options that all loaders share."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        "multiprocessing_context": WorkerContext() if num_workers else None,
    }


@dataclass(eq=False)
class Results(Dataset[Any]):
    """The results of a function of a number."""

    function: Callable[[int], Any]

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def parallel_map(
    function: Callable[[int], Any],
    count: int,
    num_workers: int | None,
    start: int = 0,
    timeout: float = 300.0,
    chunk: int = 16,
) -> ResilientLoader[list[Any]]:
    """Return `function(i)` for every i in order, in lists of `chunk`, from list `start` on."""
    workers = usable_cores() if num_workers is None else num_workers

    def make(first: int) -> DataLoader:
        return DataLoader(
            Results(function),
            chunk,
            sampler=range(first * chunk, count),
            collate_fn=list,
            generator=torch.Generator(),
            **loader_options(workers),
        )

    return ResilientLoader(make, -(-count // chunk), start, timeout)
