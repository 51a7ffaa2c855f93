"""A sweep of toys, in this process or in one that may be killed."""

import os
import subprocess
import sys
from pathlib import Path

from ssl_xcit.sweeps import driver, job
from ssl_xcit.sweeps.driver import Sweep, Watcher
from ssl_xcit.sweeps.launchers import Basic, Joblib
from ssl_xcit.sweeps.searches import Grid
from ssl_xcit.sweeps.space import Choice, Space

TOY = Path(__file__).resolve().parent / "toy.py"


class Recorder(Watcher):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def started(self, trial):
        self.lines.append(("started", trial.number))

    def ended(self, trial, state, value, error):
        self.lines.append((state, trial.number, value, error))

    def message(self, text):
        self.lines.append(("message", text))


def toy_words(trial, *more):
    place = [f"out={trial.folder.resolve().parent}", f"name={trial.folder.name}"]
    return [sys.executable, str(TOY), "pretrain", *trial.overrides, *more, *place]


def swept(
    folder, values=("1", "2", "3"), more=(), launcher=None, search=None, space=None, retry=True
):
    """(exit code, lines of the recorder)."""
    recorder, launcher, search = Recorder(), launcher or Basic(), search or Grid()
    search.start(space or Space((), {"lr": Choice(tuple(values))}), folder)
    launcher.start(folder)
    try:
        sweep = Sweep(search, launcher, lambda t: toy_words(t, *more), "knn_k20", retry, recorder)
        code = sweep.run()
    finally:
        launcher.close()
        search.close()
    return code, recorder.lines


def process(folder, jobs=1, values="1,2,3,4,5,6", more="sleep=0.05"):
    """The same in a process; nothing it prints matters."""
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(jobs), values, *more.split()],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


if __name__ == "__main__":
    driver.POLL = job.POLL = 0.02
    launcher = Basic() if sys.argv[2] == "1" else Joblib(int(sys.argv[2]), [])
    print("ready", flush=True)
    sys.exit(swept(Path(sys.argv[1]), sys.argv[3].split(","), sys.argv[4:], launcher)[0])
