"""Launchers, which run jobs on this machine, a Ray cluster or SLURM and return futures. Trials are
processes of their own everywhere (`job.py`); a launcher's processes only wait for them.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.job import Job
from ssl_xcit.utils.hardware import usable_cores
from ssl_xcit.utils.validation import Count, NonNegative, Positive


@runtime_checkable
class RunningJob(Protocol):
    """A job that was started, such as a future."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> int:
        """Its exit code; raises the launcher's errors."""
        ...


class Launcher:
    """Runs jobs.

    Attributes:
        slots: number of jobs at once.
    """

    slots = 1

    def start(self, folder: Path) -> None:
        """Prepare for the first job; `folder` is the sweep's."""

    def overrides(self) -> list[str]:
        """Settings for every trial that do not change its results."""
        return []

    def environment(self, slot: int) -> dict[str, str]:
        """Environment variables of a job in this slot."""
        return {}

    def submit(self, job: Job) -> RunningJob:
        """Start a job."""
        raise NotImplementedError

    def close(self) -> None:
        """Release resources after the last job."""


class Local(Launcher):
    """Base of launchers on this machine: GPUs and cores are divided among the slots.

    Args:
        n_jobs: trials at once; None: one for each `gpus_per_trial` GPUs, without GPUs one.
        gpus: their numbers; `auto`: all.
        gpus_per_trial: number of GPUs that each trial sees.

    Raises:
        UserError: fewer GPUs than the trials need.
    """

    def __init__(
        self,
        n_jobs: Count | None = None,
        gpus: Sequence[int] | Literal["auto"] = "auto",
        gpus_per_trial: Count = 1,
    ):
        self.gpus = visible_gpus() if gpus == "auto" else [str(gpu) for gpu in gpus]
        self.gpus_per_trial = gpus_per_trial
        fitting = len(self.gpus) // gpus_per_trial
        if self.gpus and fitting < (n_jobs or 1):
            raise UserError(
                f"launcher: {n_jobs or 1} trials at once need {gpus_per_trial} GPUs each, and there"
                f" are {len(self.gpus)} (launcher.gpus={gpus}): set launcher.n_jobs={fitting or 1} "
                "or launcher.gpus_per_trial"
            )
        self.slots = n_jobs or max(1, fitting)
        self.pool: Any = None

    def start(self, folder: Path) -> None:
        """Start threads that wait for trials."""
        self.pool = ThreadPoolExecutor(self.slots)

    def overrides(self) -> list[str]:
        """Fewer loader processes when several trials share the cores."""
        if self.slots == 1:
            return []
        return [f"num_workers={max(0, usable_cores() // self.slots - 1)}"]

    def environment(self, slot: int) -> dict[str, str]:
        """GPUs and the share of the cores of a slot: several trials with a thread a core each would
        slow each other down many times over.
        """
        variables = {}
        if self.gpus:
            gpus = self.gpus[slot * self.gpus_per_trial :][: self.gpus_per_trial]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if self.slots > 1 and "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // self.slots))
        return variables

    def submit(self, job: Job) -> RunningJob:
        """Run a job, which a thread waits for."""
        return self.pool.submit(job)

    def close(self) -> None:
        """Wait for all jobs."""
        if self.pool is not None:
            self.pool.shutdown()


class Basic(Local):
    """One trial after another, each with all GPUs and cores."""

    def __init__(self) -> None:
        super().__init__(1, [])


class Joblib(Local):
    """Several trials at once on this machine, in joblib's processes."""

    def start(self, folder: Path) -> None:
        """Start processes that wait for trials; joblib comes with scikit-learn."""
        from joblib.externals.loky import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(self.slots, initializer=prepare_process)


def prepare_process() -> None:
    """Leave Ctrl-C to the sweep, which stops its trials, and end with it."""
    import signal

    from ssl_xcit.sweeps.job import end_with

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(os.getppid(), signal.SIGKILL)


def visible_gpus() -> list[str]:
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class Submitit(Launcher):
    """Jobs of SLURM by submitit, or processes of this machine in their place.

    Args:
        cluster: slurm, or local for processes of this machine; None: slurm, and no other.
        jobs: in the queue at once.
        parameters: of submitit's `AutoExecutor.update_parameters`.

    Raises:
        UserError: submitit is missing.
    """

    def __init__(
        self,
        cluster: Literal["slurm", "local"] | None = None,
        jobs: Count = 100,
        parameters: Mapping[str, Any] | None = None,
    ):
        try:
            import submitit
        except ImportError as error:
            raise missing("submitit") from error
        self.submitit, self.cluster = submitit, cluster
        self.slots = jobs
        self.parameters = {k: v for k, v in (parameters or {}).items() if v is not None}
        self.executor: Any = None

    def start(self, folder: Path) -> None:
        """Make an executor, with submitit's files in the sweep's folder.

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

    def submit(self, job: Job) -> RunningJob:
        """Queue a job."""
        return self.executor.submit(job)


class Ray(Launcher):
    """Tasks of a Ray cluster, whose machines share the run folders.

    Args:
        address: of the cluster; None: start one on this machine.
        jobs: submitted at once; Ray runs as many as its resources allow.
        num_cpus: of each trial.
        num_gpus: of each trial.

    Raises:
        UserError: Ray is missing.
    """

    def __init__(
        self,
        address: str | None = None,
        jobs: Count = 100,
        num_cpus: Positive = 2,
        num_gpus: NonNegative = 1,
    ):
        try:
            import ray
        except ImportError as error:
            raise missing("ray") from error
        self.ray, self.address, self.slots = ray, address, jobs
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def start(self, folder: Path) -> None:
        """Connect to the cluster.

        Raises:
            UserError: there is none at the address.
        """
        try:
            self.ray.init(address=self.address, log_to_driver=False, ignore_reinit_error=True)
        except Exception as error:  # half a dozen types of grpc, redis and its own
            raise UserError(f"launcher.address={self.address}: {error}") from error

    def overrides(self) -> list[str]:
        """Loader processes by the number of cores, for Ray does not set their affinity."""
        return [f"num_workers={max(0, int(self.resources['num_cpus']) - 1)}"]

    def environment(self, slot: int) -> dict[str, str]:
        """Threads; Ray sets the GPUs."""
        return {"OMP_NUM_THREADS": str(max(1, int(self.resources["num_cpus"])))}

    def submit(self, job: Job) -> RunningJob:
        """Submit a task."""
        return self.ray.remote(**self.resources)(run_job).remote(job).future()

    def close(self) -> None:
        """Disconnect from the cluster."""
        with suppress(Exception):
            self.ray.shutdown()


def run_job(job: Job) -> int:
    """Run a job; Ray needs a function."""
    return job()


def missing(extra: str) -> UserError:
    """An error with the command that installs the library."""
    return UserError(f"launcher={extra} needs {extra}: pip install 'ssl-xcit[{extra}]'")
