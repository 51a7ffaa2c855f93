"""Loader processes that may die or hang: batches by number, made again from where it happened."""

import contextlib
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from ssl_xcit.cores import usable_cores
from ssl_xcit.errors import RunFailed

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
POLL = 1.0  # seconds between two looks at the workers while nothing comes
MAX_RESTARTS, AMONG = 3, 100  # so many within so many batches end the run
HINTS = {
    -signal.SIGKILL: "out of memory? Lower num_workers or batch_size",
    -signal.SIGBUS: "shared memory is full: enlarge /dev/shm, or lower num_workers or batch_size",
    -signal.SIGSEGV: "a decoder crashed: ssl-xcit check finds the file",
}


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
        self.restarts: deque[int] = deque(maxlen=MAX_RESTARTS)

    def __len__(self) -> int:
        """Of all batches, the first included: Lightning compares it with the steps of the run."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order.

        Raises:
            RunFailed: the third accident within a hundred batches.
        """
        self.done = self.start
        self.restarts.clear()
        while self.done < self.num_batches:
            fetched = Fetched(self.make(self.done))
            try:
                trouble = None
                while self.done < self.num_batches and trouble is None:
                    began = time.perf_counter()
                    batch, trouble = fetched.next(self.timeout)
                    self.waited += time.perf_counter() - began
                    if trouble is None:
                        self.done += 1
                        yield batch
            finally:
                fetched.close()
            if trouble is not None:
                self.restart(trouble)

    def restart(self, trouble: str) -> None:
        """Say it, and give up when it happens too often."""
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
        self.workers: list[BaseProcess] = []
        self.closed = threading.Event()
        self.ready: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(maxsize=1)
        if loader.num_workers == 0:
            one_thread()
            self.batches = iter(loader)
            return
        before = set(multiprocessing.active_children())
        self.batches = iter(loader)
        self.workers = [p for p in multiprocessing.active_children() if p not in before]
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the main thread happens to be, in the middle of a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=self.fetch, daemon=True).start()

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

    def next(self, timeout: float) -> tuple[Any, str | None]:
        """(the next batch, None), or (None, what happened to the workers)."""
        if not self.workers:
            return next(self.batches), None
        deadline = time.monotonic() + timeout
        while True:
            try:
                batch, error = self.ready.get(timeout=min(POLL, timeout))
            except queue.Empty:
                batch, error = None, None
            else:
                if error is None:
                    return batch, None
                wait([w.sentinel for w in self.workers], timeout=1.0)
            dead = [w for w in self.workers if not w.is_alive()]
            if dead:
                return None, obituary(dead)
            if error is not None:
                raise error
            if time.monotonic() >= deadline:
                return None, (
                    f"nothing came from {len(self.workers)} loader processes within {timeout:g} s "
                    "(worker_timeout): a file system that hangs?"
                )

    def close(self) -> None:
        """End the processes; one that hangs would outlive a polite request."""
        self.closed.set()
        for worker in self.workers:
            worker.kill()


def obituary(dead: list[BaseProcess]) -> str:
    """Which workers ended, how, and what it may mean."""
    causes = []
    for worker in dead:
        worker.join(1.0)
        code = worker.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        hint = f": {HINTS[code]}" if code in HINTS else ""
        causes.append(f"loader process {worker.pid} ended ({how}{hint})")
    return ", ".join(causes)


def loader_options(num_workers: int) -> dict[str, Any]:
    """What all loaders share."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
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
