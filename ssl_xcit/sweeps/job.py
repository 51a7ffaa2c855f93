"""A trial as a process of its own, wherever a launcher runs it: the same command that a person
types, its output in a file.

What crashes, runs out of memory or is killed takes no other trial along, and memory and GPU are
free again afterwards. Light, for launchers' processes import this.
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

STOP = ".stop"  # holds the number of a signal: whoever runs the trial passes it on
PARENT = "SSL_XCIT_PARENT"  # whose end ends the trial, saved
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Job:
    """What to start.

    Args:
        words: the command.
        folder: of the run; output goes there.
        output: name of the file for it.
        environment: variables beside those that are there.
    """

    words: tuple[str, ...]
    folder: str
    output: str = "output.txt"
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> int:
        """Run it.

        Returns:
            Its exit code; below 0: the signal that killed it.
        """
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank = os.environ.get("SLURM_PROCID", "0")
        output = self.output if rank == "0" else f"rank{rank}-{self.output}"
        environment = {**os.environ, **self.environment, PARENT: str(os.getpid())}
        with (folder / output).open("ab") as file:
            process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                return watched(process, folder / STOP)
            finally:
                if process.poll() is None:
                    end(process)

    def checkpoint(self, *_: Any) -> Any:
        """Called by submitit before SLURM ends the job: the trial saves, and is queued again."""
        from submitit.helpers import DelayedSubmission

        ask_to_stop(Path(self.folder), signal.SIGTERM)
        time.sleep(20.0)  # a step and a checkpoint
        (Path(self.folder) / STOP).unlink(missing_ok=True)
        return DelayedSubmission(self)


def watched(process: subprocess.Popen[bytes], stop: Path) -> int:
    """Wait for the end; pass on the signals that are asked for, each once."""
    sent = ""
    while (code := process.poll()) is None:
        time.sleep(POLL)
        with suppress(OSError, ValueError):
            wanted = stop.read_text()
            if wanted != sent:
                process.send_signal(int(wanted))
                sent = wanted
    return code


def end(process: subprocess.Popen[bytes]) -> None:
    """Have it save and go."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60.0)
    process.kill()


def ask_to_stop(folder: Path, number: int) -> None:
    """Have whoever runs the trial of this folder send it a signal."""
    part = folder / f"{STOP}.part"
    part.write_text(str(int(number)))
    part.replace(folder / STOP)


def end_with(parent: int, number: int) -> None:
    """Have Linux send this process a signal when its parent ends, however that ends; elsewhere
    nothing does. To be called before anything else.
    """
    with suppress(OSError, AttributeError):
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), number)
