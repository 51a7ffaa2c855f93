"""A trial as a process of its own, wherever a launcher runs it: the same command that a person
types, its output in a file.

A trial that crashes or is killed affects no other, and its memory and GPU are free afterwards.
Imports little, for launchers' processes import this.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT = "output.txt"  # of a trial, in its folder
STOP = ".stop"  # file with the number of a signal, which the job sends to its trial
PARENT = "SSL_XCIT_PARENT"  # variable with the process that a trial ends with, saved
POLL = 0.2  # seconds
IN_USE = 76  # exit code of a trial whose folder another process trains in


@dataclass(frozen=True)
class Job:
    """A process to run.

    Args:
        words: the command line.
        folder: of the run; output goes there.
        environment: variables added to those of this process.
    """

    words: tuple[str, ...]
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> int:
        """Run it, and return its exit code, or below 0 the signal that killed it."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank = os.environ.get("SLURM_PROCID", "0")
        output = OUTPUT if rank == "0" else f"rank{rank}-{OUTPUT}"
        environment = {**os.environ, **self.environment, PARENT: str(os.getpid())}
        with (folder / output).open("ab") as file:
            process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                sent = ""
                while process.poll() is None:
                    time.sleep(POLL)
                    with suppress(OSError, ValueError):
                        number = (folder / STOP).read_text()
                        if number != sent:
                            process.send_signal(int(number))
                            sent = number
                return process.returncode
            finally:  # of this process too: its trial has a minute to save
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60.0)
                process.kill()

    def checkpoint(self, *_: Any) -> Any:
        """Save and queue the trial again; submitit calls this before SLURM ends the job."""
        from submitit.helpers import DelayedSubmission

        ask_to_stop(Path(self.folder), signal.SIGTERM)
        time.sleep(20.0)  # a step and a checkpoint
        (Path(self.folder) / STOP).unlink(missing_ok=True)
        return DelayedSubmission(self)


def ask_to_stop(folder: Path, number: int) -> None:
    """Have the job of this folder send its trial a signal."""
    part = folder / f"{STOP}.part"
    part.write_text(str(int(number)))
    part.replace(folder / STOP)


def end_with(parent: int, number: int) -> None:
    """Have Linux send this process a signal when its parent ends, however that ends; other systems
    cannot. To be called before anything else.
    """
    with suppress(OSError, AttributeError):
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), number)
