"""A sweep of toys, in this process or in one that may be killed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from optuna.distributions import CategoricalDistribution, IntDistribution

from ssl_xcit.sweeps import driver, job
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.driver import Sweep
from ssl_xcit.sweeps.launchers import local
from ssl_xcit.sweeps.progress import ProgressLines
from ssl_xcit.sweeps.search import Search
from ssl_xcit.sweeps.space import Space
from ssl_xcit.training.settings import SearchSettings

driver.POLL = job.POLL = 0.02  # toys are quick
TOY = Path(__file__).resolve().parent / "toy.py"
GRID = SearchSettings("knn_k20", True, True, None, None, 0, 0, None)
TPE = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 6, "multivariate": True}
WHOLE = [str(step) for step in range(1, 9)]  # of a trial that took each step once

INTEGERS = Space((), {"lr": IntDistribution(1, 16)}, ("lr=range(1,17)",))


def swept(folder, values=("1", "2", "3"), more=(), launcher=None, space=None, **settings):
    """Exit code."""
    launcher = launcher or local()

    def words(trial):
        place = [f"out={folder}", f"name={trial.folder.name}"]
        return [sys.executable, str(TOY), "pretrain", *trial.overrides, *more, *place]

    folder.mkdir(exist_ok=True)
    space = space or Space((), {"lr": CategoricalDistribution(values)}, tuple(values))
    search = Search(replace(GRID, **settings), space, folder)
    try:
        with ProgressLines(search.total, "knn_k20") as lines:
            return Sweep(search, launcher, words, lines).run()
    finally:
        launcher.close()


def process(folder, **arguments):
    """The same in a process; nothing it prints matters."""
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), json.dumps(arguments)],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def folders(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def states(folder):
    return [trials.state_of(p) for p in folders(folder)]


def steps(folder):
    """Every step that any start of a trial has taken."""
    return [(p / "steps.txt").read_text().split() for p in folders(folder)]


def wait_for(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    space = INTEGERS if arguments.get("sampler") else None
    launcher = local(n_jobs=arguments.pop("jobs", 1))
    sys.exit(swept(Path(sys.argv[1]).resolve(), space=space, launcher=launcher, **arguments))
