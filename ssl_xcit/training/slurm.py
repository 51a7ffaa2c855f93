"""Submit a run to SLURM: `trainer=slurm` writes a batch script into the run folder and queues it.

The script is what a person would write (docs/cluster.md): srun starts a rank a GPU with the same
command, which trains because it finds itself in a job. submitit, which starts the trials of sweeps,
would pickle a function of this process instead.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import writable_folder
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count

SCRIPT = "job.sh"  # in the run folder


def in_job() -> bool:
    """Whether this process belongs to a SLURM job already."""
    return "SLURM_JOB_ID" in os.environ


def submit(
    run_dir: Path,
    words: Sequence[str],
    nodes: Count,
    gpus_per_node: Count,
    cpus_per_task: Count = 8,
    time: str = "24:00:00",
    seconds_to_save: Annotated[int, Ge(30)] = 900,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write the batch script and queue it. Jobs of one run wait for each other.

    Args:
        run_dir: of the run.
        words: the command line of a rank.
        nodes: machines.
        gpus_per_node: ranks on each.
        cpus_per_task: cores of each rank.
        time: limit of a job, as sbatch reads it.
        seconds_to_save: before the limit, when the run is saved and queued again.
        options: more of sbatch's long options, by name; null leaves one out.

    Raises:
        UserError: there is no sbatch here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "trainer=slurm: there is no sbatch here: type the command on a machine that submits "
            "jobs; trainer=ddp trains on the GPUs of this one"
        )
    name = f"ssl-xcit-{re.sub(r'[^A-Za-z0-9._-]', '-', run_dir.name)}"
    directives = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": gpus_per_node,
        "gpus-per-node": gpus_per_node,
        "cpus-per-task": cpus_per_task,
        "time": time,
        "signal": f"USR1@{seconds_to_save}",
        "output": f"{run_dir.absolute()}/job-%j.txt",
        "open-mode": "append",
        "dependency": "singleton",
        **(options or {}),
    }
    given = {key: value for key, value in directives.items() if value is not None}
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in given.items()]
    command = shlex.join(["srun", f"--cpus-per-task={cpus_per_task}", *words])
    writable_folder(run_dir)
    script = run_dir / SCRIPT
    script.write_text("\n".join(["#!/bin/sh", *lines, "#SBATCH --requeue", f"exec {command}", ""]))
    asked = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        why = (asked.stderr.strip() or asked.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"trainer=slurm: sbatch refuses {script}: {why}")
    job = asked.stdout.strip().partition(";")[0]
    say(
        f"{run_dir}: job {job} is queued, {nodes} x {gpus_per_node} GPUs, {time} at a time\n"
        f"  its output: {run_dir}/job-{job}.txt; its state: squeue --job={job}; "
        f"save and end it: scancel --signal=TERM {job}"
    )
