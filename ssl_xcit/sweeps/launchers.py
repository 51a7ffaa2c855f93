"""Launchers, which run jobs on this machine, a Ray cluster or SLURM and return futures. Trials are
processes of their own everywhere (`job.py`); a launcher only waits for them. `conf/launcher/` says
what each setting means; `folder` is the sweep's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.job import Job
from ssl_xcit.utils.hardware import usable_cores
from ssl_xcit.utils.validation import Count, NonNegative, Positive


@dataclass(frozen=True)
class Launcher:
    """Runs jobs.

    Args:
        slots: number of jobs at once.
        submit: starts one; returns its future, with `done()` and `result()`, the exit code.
        close: releases resources after the last job.
        overrides: settings for every trial that do not change its results.
        environment: variables of a job in a slot.
    """

    slots: int
    submit: Callable[[Job], Any]
    close: Callable[[], object] = lambda: None
    overrides: Sequence[str] = ()
    environment: Callable[[int], Mapping[str, str]] = lambda slot: {}


def local(
    folder: Path | None = None,
    n_jobs: Count | None = 1,
    gpus: Sequence[int] | Literal["auto"] = "auto",
    gpus_per_trial: Count = 1,
) -> Launcher:
    """Processes of this machine: several at once divide its GPUs and cores among them, for with a
    thread a core each they would slow each other down many times over.

    Raises:
        UserError: fewer GPUs than the trials need.
    """
    names = [str(gpu) for gpu in gpus] if gpus != "auto" else visible_gpus() if n_jobs != 1 else []
    fitting = len(names) // gpus_per_trial
    if names and fitting < (n_jobs or 1):
        raise UserError(
            f"launcher: {n_jobs or 1} trials at once need {gpus_per_trial} GPUs each, and there"
            f" are {len(names)} (launcher.gpus={gpus}): set launcher.n_jobs={fitting or 1} "
            "or launcher.gpus_per_trial"
        )
    slots = n_jobs or max(1, fitting)
    cores = usable_cores() // slots
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores)))}

    def environment(slot: int) -> Mapping[str, str]:
        seen = ",".join(names[slot * gpus_per_trial :][:gpus_per_trial])
        return ({"CUDA_VISIBLE_DEVICES": seen} if names else {}) | (threads if slots > 1 else {})

    pool = ThreadPoolExecutor(slots)
    overrides = [f"num_workers={max(0, cores - 1)}"] if slots > 1 else []
    return Launcher(slots, pool.submit, pool.shutdown, overrides, environment)


def visible_gpus() -> list[str]:
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def slurm(
    folder: Path,
    cluster: Literal["slurm", "local"] | None = None,
    jobs: Count = 100,
    parameters: Mapping[str, Any] | None = None,
) -> Launcher:
    """Jobs of SLURM by submitit, or processes of this machine in their place.

    Raises:
        UserError: submitit or SLURM is missing, or a parameter unknown.
    """
    try:
        import submitit

        executor = submitit.AutoExecutor(folder / ".submitit", cluster=cluster)
        executor.update_parameters(**{k: v for k, v in (parameters or {}).items() if v is not None})
    except ImportError as error:
        raise missing("submitit") from error
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"launcher=submitit: {str(error).splitlines()[0]}") from error
    if cluster is None and executor.cluster != "slurm":
        raise UserError(
            "launcher=submitit: there is no SLURM here (no srun); launcher=local uses this "
            "machine, launcher.cluster=local tries submitit without SLURM"
        )
    return Launcher(jobs, executor.submit)


def ray_cluster(
    folder: Path | None = None,
    address: str | None = None,
    jobs: Count = 100,
    num_cpus: Positive = 2,
    num_gpus: NonNegative = 1,
) -> Launcher:
    """Tasks of a Ray cluster, whose machines share the run folders. Ray sets a task's GPUs, but not
    its number of threads.

    Raises:
        UserError: Ray is missing, or there is no cluster at the address.
    """
    try:
        import ray

        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except ImportError as error:
        raise missing("ray") from error
    except Exception as error:  # half a dozen types of grpc, redis and its own
        raise UserError(f"launcher.address={address}: {error}") from error
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(Job.__call__)
    return Launcher(
        jobs,
        lambda job: task.remote(job).future(),
        ray.shutdown,
        [f"num_workers={max(0, int(num_cpus) - 1)}"],
        lambda slot: {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))},
    )


def missing(extra: str) -> UserError:
    """An error with the command that installs the library."""
    return UserError(f"launcher={extra} needs {extra}: pip install 'ssl-xcit[{extra}]'")
