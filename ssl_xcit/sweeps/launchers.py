"""Where trials run: each launcher takes jobs and gives futures. Trials are processes of their own
everywhere (`job.py`); a launcher's own processes only wait for them.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ssl_xcit.cores import usable_cores
from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.job import Job


@runtime_checkable
class Running(Protocol):
    """A job that was started."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> int:
        """Its exit code; raises what went wrong with the launcher."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """See the classes below.

    Attributes:
        slots: how many jobs run at once.
    """

    slots: int

    def start(self, folder: Path) -> None:
        """Before the first job; `folder` is the sweep's."""

    def overrides(self) -> list[str]:
        """Settings for every trial that are no part of its results."""
        ...

    def environment(self, slot: int) -> dict[str, str]:
        """Variables for a job in this slot."""
        ...

    def submit(self, job: Job) -> Running:
        """Run it, here or elsewhere."""
        ...

    def close(self) -> None:
        """After the last job."""


class Local:
    """On this machine: GPUs and cores are shared out among the slots.

    Args:
        n_jobs: trials at once; None: one for each `gpus_per_trial` GPUs, without GPUs one.
        gpus: their numbers; `auto`: all that there are.
        gpus_per_trial: how many each trial sees.

    Raises:
        UserError: fewer GPUs than the trials need.
    """

    def __init__(
        self, n_jobs: int | None = None, gpus: Sequence[int] | str = "auto", gpus_per_trial: int = 1
    ):
        if n_jobs is not None and (type(n_jobs) is not int or n_jobs < 1):
            raise UserError(f"launcher.n_jobs={n_jobs}: a whole number from 1, or null")
        if type(gpus_per_trial) is not int or gpus_per_trial < 1:
            raise UserError(f"launcher.gpus_per_trial={gpus_per_trial}: a whole number from 1")
        self.gpus = known_gpus() if gpus == "auto" else [str(gpu) for gpu in gpus]
        self.gpus_per_trial = gpus_per_trial
        places = len(self.gpus) // gpus_per_trial
        if self.gpus and places < (n_jobs or 1):
            raise UserError(
                f"launcher: {n_jobs or 1} trials at once with {gpus_per_trial} GPUs each, and there"
                f" are {len(self.gpus)} (launcher.gpus={gpus}): set launcher.n_jobs={places or 1} "
                "or launcher.gpus_per_trial"
            )
        self.slots = n_jobs or max(1, places)
        self.pool: Any = None

    def start(self, folder: Path) -> None:
        """Threads that wait."""
        self.pool = ThreadPoolExecutor(self.slots)

    def overrides(self) -> list[str]:
        """Loader processes, when several trials share the cores."""
        if self.slots == 1:
            return []
        return [f"num_workers={max(0, usable_cores() // self.slots - 1)}"]

    def environment(self, slot: int) -> dict[str, str]:
        """Its GPUs; its share of the cores, for two trials with a thread a core each would slow
        each other down many times over.
        """
        found = {}
        if self.gpus:
            first = slot * self.gpus_per_trial
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.gpus_per_trial])
        if self.slots > 1 and "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(max(1, usable_cores() // self.slots))
        return found

    def submit(self, job: Job) -> Running:
        """In a process, watched by a thread."""
        return self.pool.submit(job)

    def close(self) -> None:
        """The threads end with their jobs."""
        if self.pool is not None:
            self.pool.shutdown()


class Basic(Local):
    """One trial after another, each with all GPUs and cores."""

    def __init__(self) -> None:
        super().__init__(1, [])


class Joblib(Local):
    """Several trials at once on this machine, by joblib's processes."""

    def start(self, folder: Path) -> None:
        """Processes that wait; joblib is there with scikit-learn."""
        from joblib.externals.loky import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(self.slots, initializer=prepare_process)


def prepare_process() -> None:
    """Ctrl-C is for the sweep, which asks the trials to stop; and nothing outlives it."""
    import signal

    from ssl_xcit.sweeps.job import end_with

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(os.getppid(), signal.SIGKILL)


def known_gpus() -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class Submitit:
    """Jobs of SLURM, or processes of this machine that stand in for them, by submitit.

    Args:
        cluster: slurm, local, or None: SLURM where it is.
        jobs: in the queue at once.
        parameters: of submitit's `AutoExecutor.update_parameters`.

    Raises:
        UserError: submitit is missing.
    """

    def __init__(
        self,
        cluster: str | None = None,
        jobs: int = 100,
        parameters: Mapping[str, Any] | None = None,
    ):
        try:
            import submitit
        except ImportError as error:
            raise missing("submitit") from error
        if cluster not in (None, "slurm", "local"):
            raise UserError(f"launcher.cluster={cluster}: slurm, local, or null")
        self.submitit, self.cluster = submitit, cluster
        self.slots = jobs
        self.parameters = {k: v for k, v in (parameters or {}).items() if v is not None}
        self.executor: Any = None

    def start(self, folder: Path) -> None:
        """Its own records lie in the sweep's folder.

        Raises:
            UserError: no SLURM here, or a parameter that submitit does not know.
        """
        try:
            self.executor = self.submitit.AutoExecutor(folder / ".submitit", cluster=self.cluster)
            self.executor.update_parameters(**self.parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise UserError(f"launcher=submitit: {str(error).splitlines()[0]}") from error
        if self.cluster is None and self.executor.cluster != "slurm":
            raise UserError(
                "launcher=submitit: there is no SLURM here (no srun); launcher=joblib uses this "
                "machine, launcher.cluster=local tries submitit without SLURM"
            )

    def overrides(self) -> list[str]:
        """A job's cores are its own."""
        return []

    def environment(self, slot: int) -> dict[str, str]:
        """SLURM has set what is needed."""
        return {}

    def submit(self, job: Job) -> Running:
        """Queue it."""
        return self.executor.submit(job)

    def close(self) -> None:
        """Nothing is held."""


class Ray:
    """Tasks of a Ray cluster; run folders lie where all its machines see them.

    Args:
        address: of the cluster; None: one that is made on this machine.
        jobs: submitted at once; Ray runs as many as its resources allow.
        num_cpus: of each trial.
        num_gpus: of each trial.

    Raises:
        UserError: Ray is missing.
    """

    def __init__(
        self, address: str | None = None, jobs: int = 100, num_cpus: float = 2, num_gpus: float = 1
    ):
        try:
            import ray
        except ImportError as error:
            raise missing("ray") from error
        self.ray, self.address, self.slots = ray, address, jobs
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def start(self, folder: Path) -> None:
        """Join the cluster.

        Raises:
            UserError: there is none at the address.
        """
        try:
            self.ray.init(address=self.address, log_to_driver=False, ignore_reinit_error=True)
        except Exception as error:  # half a dozen types of grpc, redis and its own
            raise UserError(f"launcher.address={self.address}: {error}") from error

    def overrides(self) -> list[str]:
        """Ray shares out the cores by count, not by affinity."""
        return [f"num_workers={max(0, int(self.resources['num_cpus']) - 1)}"]

    def environment(self, slot: int) -> dict[str, str]:
        """Ray sets the GPUs."""
        return {"OMP_NUM_THREADS": str(max(1, int(self.resources["num_cpus"])))}

    def submit(self, job: Job) -> Running:
        """A task."""
        return self.ray.remote(**self.resources)(run).remote(job).future()

    def close(self) -> None:
        """Leave the cluster."""
        with suppress(Exception):
            self.ray.shutdown()


def run(job: Job) -> int:
    """As a function, which Ray wants."""
    return job()


def missing(extra: str) -> UserError:
    """What to install."""
    return UserError(f"launcher={extra} needs {extra}: pip install 'ssl-xcit[{extra}]'")
