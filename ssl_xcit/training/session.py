"""The course of a run, whatever it trains: resumed, trained, concluded, reported."""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch import nn

from ssl_xcit.errors import RunFailed
from ssl_xcit.models.checkpoint_files import checkpoints_of
from ssl_xcit.training.checkpoint import newest_valid
from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.loggers import FailsafeLogger
from ssl_xcit.training.plan import RunPlan
from ssl_xcit.training.preemption import StopOnSignal, Stopped, requeue
from ssl_xcit.training.run_dir import DataRecord, disk_trouble, kernels_noted, write_settings
from ssl_xcit.training.settings import RunSettings
from ssl_xcit.training.slurm import in_job
from ssl_xcit.training.trainer import kill_children, runs_on_cpu, watched_child
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import as_plain

log = logging.getLogger(__name__)


def submits(settings: RunSettings) -> bool:
    """Whether this process only queues the run."""
    return settings.trainer.submit is not None and not in_job()


def submit_run(settings: RunSettings, run_dir: Path) -> None:
    """Give the run to a cluster, as `trainer.submit` says."""
    hydra = HydraConfig.get()
    typed = sys.argv[1:2] == [hydra.job.name]  # else called from Python
    words = sys.argv[1:] if typed else [str(hydra.job.name), *hydra.overrides.task]
    if not settings.name:
        words.append(f"name='{run_dir.name}'")
    instantiate(settings.trainer.submit)(run_dir, [sys.executable, "-m", "ssl_xcit", *words])


def run_to_the_end(
    trainer: lightning.Trainer,
    stop: StopOnSignal,
    run_dir: Path,
    train: Callable[[], float],
    conclude: Callable[[float], None],
) -> None:
    """Train and conclude (with the seconds that training took); ends the process with the exit code
    of a signal that stopped it.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, FailsafeLogger)]
    code = 1
    try:
        stop.install()
        seconds = train()
        stop.after_training()
        if trainer.is_global_zero:
            conclude(seconds)
            for logger in loggers:
                logger.conclude(run_dir)
        code = 0
    except Stopped as stopped:
        if trainer.is_global_zero:
            say_stopped(stopped, run_dir)
            if stopped.signal == signal.SIGUSR1:
                requeue()
        sys.exit(0 if watched_child(trainer) else stopped.exit_code)
    finally:
        stop.checkpoints.leave()
        for logger in loggers:  # which may wait for their servers
            logger.finish(code)
        if not stop.stopping:  # else they stay: a scheduler may ask twice
            stop.restore()


def kernels_taken(settings: RunSettings, network: nn.Module) -> bool | None:
    """Whether a network takes this CPU's kernels; None: no choice of ours, or on a GPU."""
    if not runs_on_cpu(settings.trainer) or getattr(settings, "compile", "auto") != "auto":
        return None
    return any(getattr(part, "fused", False) for part in network.modules())


def train(
    settings: RunSettings,
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    data: TrainingData[Any],
    plan: RunPlan,
    run_dir: Path,
    record: DataRecord,
    announce: Callable[[], None],
    last_step: int | None = None,
) -> float:
    """From the newest valid checkpoint, or the start, to the last step, as planned where there is
    no other; seconds that it took.
    """
    steps = (
        {} if last_step is None else {"planned_steps": plan.total_steps, "total_steps": last_step}
    )
    last_step = plan.total_steps if last_step is None else last_step
    resume = newest_valid(run_dir, may_rename=trainer.is_global_zero)
    if trainer.is_global_zero:
        begun, kernels = kernels_noted(run_dir), kernels_taken(settings, module)
        if begun and kernels is False:
            log.warning(
                "%s was begun with kernels and goes on without them, so its numbers change within "
                "rounding: install a C++ compiler, or name another in CXX%s",
                run_dir, ", or set compile=false" if hasattr(settings, "compile") else "",
            )  # fmt: skip
        with disk_trouble(run_dir):
            resumed_at = None if resume is None else int(resume.stem.removeprefix("step-"))
            about_plan = plan.record() | steps
            kernels = kernels if begun is None else begun
            write_settings(as_plain(settings), about_plan, run_dir, resumed_at, record, kernels)
        announce()
        if resume is not None:
            taken = int(resume.stem.removeprefix("step-"))
            left = "" if taken < last_step else ", which leaves no step to take"
            say(f"going on from {resume}{left}")
    trainer.fit_loop.epoch_loop.max_steps = last_step
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except RuntimeError as error:
        kill_children(trainer)
        if isinstance(error, dist.DistStoreError | dist.DistNetworkError):
            environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            place = f"{environment.main_address}:{environment.main_port}"
            reason = str(error).splitlines()[0]
            raise RunFailed(
                f"rank {trainer.global_rank}: the {trainer.world_size} ranks did not meet at "
                f"{place} within {settings.collective_timeout:g} s (collective_timeout): were all "
                f"of them started, and can each machine reach that address? ({reason})"
            ) from error
        if trainer.world_size > 1 and re.search("gloo|nccl", str(error), re.I):
            raise RunFailed(
                f"rank {trainer.global_rank}: another rank has ended, or has not answered for "
                f"{settings.collective_timeout:g} s (collective_timeout); the same command goes on "
                "from the newest checkpoint"
            ) from error
        raise
    except Stopped as stopped:
        if stopped.step is None:  # asked before the ranks could agree
            kill_children(trainer)
        raise
    except BaseException:
        kill_children(trainer)
        raise
    return time.perf_counter() - started


def is_finished(run_dir: Path, show: Callable[[Path, Mapping[str, Any]], None]) -> bool:
    """If so, say it and show the final numbers again."""
    path = run_dir / "summary.json"
    if not path.is_file():
        return False
    say(f"{run_dir} is finished; to train again, choose another name=... or remove the folder", "")
    show(run_dir, json.loads(path.read_text()))
    page = run_dir / "report.html"
    say(f"report: {page if page.is_file() else f'ssl-xcit report run={run_dir}'}")
    return True


def leave_report(settings: RunSettings, run_dir: Path, device: str) -> None:
    """A page about the finished run, by what `report` names; trouble with it is not the run's."""
    if settings.report is None:
        return
    try:
        page = instantiate(settings.report)(
            run_dir, device=device, num_workers=settings.num_workers
        )
        say(f"report: {page}; open it in a browser")
    except Exception as error:
        log.warning(
            "no report was written (%s: %s); ssl-xcit report run=%s tries again",
            type(error).__name__, error, run_dir,
        )  # fmt: skip


def say_stopped(stopped: Stopped, run_dir: Path) -> None:
    """Where the same command goes on, and what shows how far it has come."""
    checkpoints = checkpoints_of(run_dir)
    where = f"goes on from {checkpoints[-1].stem}" if checkpoints else "starts again"
    if (run_dir / "summary.json").is_file():  # stopped while the report was made
        where = "finds it finished"
    unsaved = "" if stopped.saved or stopped.step is None else "; this step could not be saved"
    say(
        f"{stopped}{unsaved}; {run_dir}: the same command {where}",
        f"report: ssl-xcit report run={run_dir}",
    )
