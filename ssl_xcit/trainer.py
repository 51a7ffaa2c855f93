"""Lightning's Trainer as our runs need it, and the other ranks that it starts."""

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.training.checkpoint import CheckpointFiles, SaveCheckpoints
from ssl_xcit.training.loggers import Tolerant
from ssl_xcit.training.metrics import CSVMetrics, LogMetrics
from ssl_xcit.training.preemption import StopOnSignal


def runs_on_cpu(cfg: DictConfig) -> bool:
    """Whether the trainer will find no GPU, or was told to leave it."""
    return cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()


def make_trainer(cfg: DictConfig, run_dir: Path) -> tuple[lightning.Trainer, StopOnSignal]:
    """Lightning's Trainer with our callbacks and loggers, and what listens to signals.

    Raises:
        UserError: more devices than there are, or a precision that the step is not written for.
    """
    trainer = cfg.trainer
    for key, ours in (
        ("gradient_clip_val", "objective.clip_norm"),
        ("accumulate_grad_batches", "trainer.accumulate"),
    ):
        if trainer.get(key):
            raise UserError(f"trainer.{key}: the step does that by itself, see {ours}")
    on_cpu = runs_on_cpu(cfg)
    cores = os.cpu_count() or 1
    if on_cpu and isinstance(trainer.devices, int) and trainer.devices > cores:
        raise UserError(
            f"trainer.devices={trainer.devices}: this machine has {cores} CPU cores and no GPU; "
            "set trainer.devices=1"
        )
    callbacks = [c for c in instantiate(cfg.callbacks).values() if c is not None]
    checkpoints = next((c for c in callbacks if isinstance(c, SaveCheckpoints)), None)
    if checkpoints is None or not any(isinstance(c, LogMetrics) for c in callbacks):
        raise UserError(
            "callbacks.checkpoints and callbacks.metrics are what a run is for: keep them"
        )
    stop = StopOnSignal(checkpoints)
    settings = OmegaConf.masked_copy(trainer, [str(k) for k in trainer if k != "accumulate"])
    plugins: list[Any] = [CheckpointFiles()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    loggers = [make_logger(str(name), one, run_dir) for name, one in (cfg.logger or {}).items()]
    try:
        made = instantiate(
            settings,
            # what is done at a step is done before the step is saved
            callbacks=[*(c for c in callbacks if c is not checkpoints), checkpoints, stop],
            plugins=plugins,
            logger=[CSVMetrics(run_dir), *loggers],
            default_root_dir=str(run_dir),
            max_epochs=-1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            sync_batchnorm=not on_cpu,  # torch has it for GPUs; without several it does nothing
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
    except Exception as error:  # Hydra wraps what the Trainer raises
        cause = error.__cause__ or error
        if isinstance(cause, MisconfigurationException | ValueError):
            raise UserError(f"trainer: {str(cause).strip().splitlines()[0]}") from error
        raise
    # Lightning's handler talks to other ranks from wherever it interrupts
    made._signal_connector.register_signal_handlers = lambda: None
    if isinstance(made.strategy, DDPStrategy):
        made.strategy._timeout = timedelta(seconds=cfg.collective_timeout)
    return made, stop


def make_logger(name: str, cfg: DictConfig, run_dir: Path) -> Tolerant:
    """A logger of the settings; one that knows `offline` goes there when it reaches nobody."""
    ways = [partial(instantiate, cfg, save_dir=str(run_dir))]
    if cfg.get("offline") is False:
        # wandb remembers the first mode and is still trying the first id
        off = {"offline": True, "mode": "offline", "id": f"{cfg.id}-offline"}
        ways.append(partial(instantiate, cfg, save_dir=str(run_dir), **off))
    return Tolerant(name, ways)


def watched_child(trainer: lightning.Trainer) -> bool:
    """A rank that Lightning has started: when one ends with anything but 0, Lightning kills all."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return not trainer.is_global_zero and isinstance(environment, LightningEnvironment)


def kill_children(trainer: lightning.Trainer) -> None:
    """Ranks that this process has started must not wait for it."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
