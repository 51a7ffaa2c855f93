"""Lightning's Trainer as our runs need it, and the other ranks that it starts."""

import os
import signal
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ssl_xcit.data.identity import DataIndex
from ssl_xcit.errors import UserError
from ssl_xcit.training.checkpoint import CheckpointFiles, SaveCheckpoints
from ssl_xcit.training.loggers import FailsafeLogger
from ssl_xcit.training.metrics import CSVMetrics, LogMetrics
from ssl_xcit.training.preemption import StopOnSignal
from ssl_xcit.training.same_ranks import SameRanks
from ssl_xcit.training.settings import RunSettings, TrainerSettings
from ssl_xcit.utils.validation import Node, as_plain


def runs_on_cpu(trainer: TrainerSettings) -> bool:
    """Whether the trainer will find no GPU, or was told to leave it."""
    return trainer.accelerator == "cpu" or not torch.cuda.is_available()


def make_trainer(
    settings: RunSettings, run_dir: Path, run_id: str, indices: Mapping[str, DataIndex]
) -> tuple[lightning.Trainer, StopOnSignal]:
    """Lightning's Trainer with our callbacks and loggers, and what listens to signals; all ranks
    must have the images of `indices`.

    Raises:
        UserError: more devices than there are, or a precision that the step is not written for.
    """
    for key, ours in (
        ("gradient_clip_val", "objective.clip_norm"),
        ("accumulate_grad_batches", "trainer.accumulate"),
    ):
        if settings.trainer.options.get(key):
            raise UserError(f"trainer.{key} is not supported with manual optimisation; set {ours}")
    devices, on_cpu = settings.trainer.devices, runs_on_cpu(settings.trainer)
    cores = os.cpu_count() or 1
    if on_cpu and isinstance(devices, int) and devices > cores:
        raise UserError(
            f"trainer.devices={devices}: this machine has {cores} CPU cores and no GPU; "
            "set trainer.devices=1"
        )
    if on_cpu and settings.trainer.gradient_exchange == "bfloat16":
        raise UserError(
            "trainer.gradient_exchange=bfloat16 is for GPUs (NCCL): leave it at float32"
        )
    callbacks = [c for c in instantiate(settings.callbacks).values() if c is not None]
    checkpoints = next((c for c in callbacks if isinstance(c, SaveCheckpoints)), None)
    if checkpoints is None or not any(isinstance(c, LogMetrics) for c in callbacks):
        raise UserError(
            "callbacks.checkpoints and callbacks.metrics are required callbacks: do not remove them"
        )
    stop = StopOnSignal(checkpoints)
    loggers = [
        make_logger(name, node, run_dir, run_id, as_plain(settings))
        for name, node in (settings.logger or {}).items()
    ]
    try:
        trainer = instantiate(
            of_lightning(settings.trainer),
            # what is done at a step is done before the step is saved
            callbacks=[
                SameRanks(as_plain(settings), indices),
                *(c for c in callbacks if c is not checkpoints),
                checkpoints,
                stop,
            ],
            plugins=plugins(),
            logger=[CSVMetrics(run_dir), *loggers],
            default_root_dir=str(run_dir),
            max_epochs=-1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
    except Exception as error:  # Hydra wraps what the Trainer raises
        cause = error.__cause__ or error
        if isinstance(cause, MisconfigurationException | ValueError):
            raise UserError(f"trainer: {str(cause).strip().splitlines()[0]}") from error
        raise
    leave_signals(trainer)
    if isinstance(trainer.strategy, DDPStrategy):
        timeout = timedelta(seconds=settings.collective_timeout)
        trainer.strategy._timeout = timeout
        exchange_gradients(trainer.strategy, settings.trainer)
        meet_again(trainer, timeout)
    return trainer, stop


def of_lightning(settings: TrainerSettings) -> dict[str, Any]:
    """The settings that are Lightning's own."""
    ours = ("accumulate", "batch_norm", "gradient_exchange", "submit")
    return {key: value for key, value in as_plain(settings).items() if key not in ours}


def trial_trainer(
    settings: TrainerSettings, callbacks: list[lightning.Callback], max_steps: int, run_dir: Path
) -> lightning.Trainer:
    """A trainer of networks that are thrown away, before a run."""
    trainer: lightning.Trainer = instantiate(
        of_lightning(settings), callbacks=callbacks, plugins=plugins(), logger=False,
        max_epochs=-1, max_steps=max_steps, num_sanity_val_steps=0,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=str(run_dir),
    )  # fmt: skip
    leave_signals(trainer)
    return trainer


def exchange_gradients(strategy: DDPStrategy, settings: TrainerSettings) -> None:
    """Let gradients lie in the memory that is exchanged, and send buffers at each step only where
    BatchNorm's differ.
    """
    own = {"gradient_as_bucket_view": True, "broadcast_buffers": settings.batch_norm != "global"}
    strategy._ddp_kwargs = own | strategy._ddp_kwargs
    if settings.gradient_exchange == "bfloat16":
        strategy._ddp_comm_hook = bf16_compress_hook


def meet_again(trainer: lightning.Trainer, timeout: timedelta) -> None:
    """Let ranks that torchrun has started again on one machine find each other, and not the ports
    of those that were killed, which the store that torchrun (2.14) shares with them still holds.
    On several machines each counts its own restarts (docs/cluster.md).
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, trainer.world_size, False, timeout)
    dist.init_process_group(
        "gloo" if trainer.strategy.root_device.type == "cpu" else "nccl",
        store=dist.PrefixStore(f"restart-{restart}", store),
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        timeout=timeout,
    )


def plugins() -> list[Any]:
    """Our checkpoint files; under SLURM we queue a job again ourselves."""
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [CheckpointFiles(), *slurm]


def leave_signals(trainer: lightning.Trainer) -> None:
    """Lightning's handler talks to other ranks from wherever it interrupts; it takes none."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def make_logger(
    name: str, node: Node, run_dir: Path, run_id: str, settings: Mapping[str, Any]
) -> FailsafeLogger:
    """A logger of the settings; one that knows `offline` goes there when it reaches nobody."""
    node = dict(node)
    if node.get("id", "") is None:  # a run that goes on is the same run there
        node["id"] = run_id
    if node.get("offline") and "WANDB_SWEEP_ID" in os.environ:
        node["offline"] = False  # wandb's agent has started it and waits for its numbers

    def make(**changed: Any) -> Logger:
        logger = instantiate(node, save_dir=str(run_dir), **changed)
        if hasattr(logger, "describe"):
            logger.describe(run_dir.name, tags(), settings)
        return logger

    ways: list[Callable[[], Logger]] = [make]
    if node.get("offline") is False:
        # wandb remembers the first mode and is still trying the first id
        ways.append(partial(make, offline=True, mode="offline", id=f"{node['id']}-offline"))
    return FailsafeLogger(name, ways)


def tags() -> list[str]:
    """What runs are found by: the command, and the options of its groups that tell most."""
    hydra = HydraConfig.get()
    groups = ("data", "model", "objective", "transfer")
    chosen = (hydra.runtime.choices.get(group) for group in groups)
    return [str(hydra.job.name), *(option for option in chosen if option)]


def watched_child(trainer: lightning.Trainer) -> bool:
    """A rank that Lightning has started: when one ends with anything but 0, Lightning kills all."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return not trainer.is_global_zero and isinstance(environment, LightningEnvironment)


def kill_children(trainer: lightning.Trainer) -> None:
    """Ranks that this process has started must not wait for it."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
