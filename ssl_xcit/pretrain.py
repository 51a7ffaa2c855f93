"""The command `pretrain`: from a configuration to a run folder with weights, metrics and final
numbers.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ssl_xcit.data.loader import default_workers
from ssl_xcit.data.module import MultiCropData, check_images, check_labelled
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.hardware import check_compiler, precision_for
from ssl_xcit.models.weights import checkpoints_of, load_backbone, model_name, read_checkpoint
from ssl_xcit.plan import Plan, check_numbers, check_switches, make_plan
from ssl_xcit.run_folder import (
    check_same_run,
    last_row,
    run_name,
    versions,
    write_settings,
)
from ssl_xcit.table import print_table, write_json
from ssl_xcit.training.checkpoint import SaveCheckpoints
from ssl_xcit.training.metrics import CSVMetrics, LogMetrics
from ssl_xcit.training.module import DINO, Schedules, make_networks
from ssl_xcit.training.preemption import StopOnSignal, Stopped
from ssl_xcit.training.schedules import Cosine, LinearByEpoch

log = logging.getLogger(__name__)
NO_LABELS = "no labelled images, so no k-NN: name some with eval_data=folder eval_data.root=DIR"


def make_module(cfg: DictConfig, plan: Plan, how: Preprocess) -> DINO:
    """Student, teacher, schedules; fresh weights by `seed`."""
    torch.manual_seed(cfg.seed)
    backbone = instantiate(cfg.model)
    head = instantiate(cfg.objective.head)(backbone.embed_dim, plan.num_prototypes)
    in_chans = backbone.architecture["in_chans"]
    if in_chans != how.channels:
        raise UserError(
            f"model.in_chans={in_chans} and preprocess.channels={how.channels}: set model.in_chans "
            "alone, the other follows"
        )
    student, teacher = make_networks(backbone, head, instantiate(cfg.model, drop_path=0.0))
    for network in (student, teacher):
        network.backbone.preprocess = how.of_weights()
        network.backbone.checkpoint_blocks = cfg.checkpoint_blocks
    optim = cfg.optim
    module = DINO(
        student,
        teacher,
        plan.num_prototypes,
        Schedules(
            lr=Cosine(
                plan.lr, optim.min_lr, plan.total_steps, plan.warmup_steps, optim.warmup_start
            ),
            weight_decay=Cosine(optim.weight_decay, optim.weight_decay_end, plan.total_steps),
            ema=Cosine(plan.ema, 1.0, plan.total_steps),
            teacher_temp=LinearByEpoch(
                plan.teacher_temp_start,
                plan.teacher_temp,
                plan.teacher_temp_epochs,
                plan.steps_per_epoch,
            ),
        ),
        instantiate(optim.optimizer),
        student_temp=cfg.objective.student_temp,
        center_momentum=cfg.objective.center_momentum,
        clip_norm=cfg.objective.clip_norm,
        freeze_steps=plan.freeze_steps,
        seed=cfg.seed,
    )
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:  # torch's own words on its arguments
        raise UserError(f"optim.optimizer: {error}") from error
    return module


def newest_readable(run_dir: Path) -> Path | None:
    """The checkpoint to go on from; a damaged one is put aside as `.corrupt` for the one before.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    found = checkpoints_of(run_dir)
    for path in reversed(found):
        try:
            read_checkpoint(path)
        except UserError as error:
            log.warning("%s; put aside", error)
            path.rename(path.with_suffix(".corrupt"))
        else:
            return path
    if found:
        raise UserError(f"no checkpoint of {run_dir} can be read: remove the folder to start again")
    return None


def runs_on_cpu(cfg: DictConfig) -> bool:
    """Whether the trainer will find no GPU, or was told to leave it."""
    return cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()


def make_trainer(cfg: DictConfig, run_dir: Path) -> lightning.Trainer:
    """Lightning's Trainer with our callbacks and loggers.

    Raises:
        UserError: more devices than there are, or a precision that the step is not written for.
    """
    trainer = cfg.trainer
    for key in ("gradient_clip_val", "accumulate_grad_batches"):
        if trainer.get(key):
            raise UserError(f"trainer.{key}: the step clips by itself, see objective.clip_norm")
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
    loggers = [instantiate(one, save_dir=str(run_dir)) for one in (cfg.logger or {}).values()]
    try:
        return instantiate(
            trainer,
            callbacks=[*callbacks, StopOnSignal(checkpoints)],
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


def main(cfg: DictConfig) -> None:
    """`ssl-xcit pretrain`: whatever can be wrong is found before the run folder is made."""
    check_numbers(cfg)
    check_switches(cfg)
    cfg.trainer.precision = precision_for(str(cfg.trainer.precision), runs_on_cpu(cfg))
    if cfg.compile:
        check_compiler(runs_on_cpu(cfg))
    hydra = HydraConfig.get()
    name = cfg.name or run_name(hydra.runtime.choices["data"], hydra.overrides.task)
    run_dir = Path(str(cfg.out)) / str(name)
    check_same_run(cfg, run_dir)
    if (run_dir / "summary.json").is_file():
        print(
            f"{run_dir} is finished; to train again, choose another name=... or remove the folder\n"
        )
        finish(run_dir, json.loads((run_dir / "summary.json").read_text()))
        return
    source: Source = instantiate(cfg.data.source)
    pair: LabelledPair | None = instantiate(cfg.eval_data) if cfg.get("eval_data") else None
    evaluate = instantiate(cfg.evaluation)
    augment = instantiate(cfg.augment)
    how = instantiate(cfg.preprocess)
    how.statistics()
    note = augment.check(how.channels)
    trainer = make_trainer(cfg, run_dir)
    plan = make_plan(cfg, len(source), trainer.world_size)
    check_images(source, augment.global_size, how)
    if pair is not None:
        check_labelled(pair, how)
    module = make_module(cfg, plan, how)
    if cfg.compile:  # SyncBatchNorm, which several GPUs have, breaks a program in two
        for network in (module.student, module.teacher):
            network.compile_backbone(fullgraph=trainer.world_size == 1)
    if note is not None and trainer.is_global_zero:
        log.warning("%s", note)
    resume = newest_readable(run_dir)
    data = MultiCropData(
        source,
        augment,
        plan.per_device_batch,
        plan.total_steps,
        cfg.seed,
        how,
        default_workers(trainer.num_devices) if cfg.num_workers is None else cfg.num_workers,
        pair,
        run_dir,
        cfg.data.max_bad_fraction,
        cfg.worker_timeout,
    )
    if trainer.is_global_zero:
        write_settings(cfg, asdict(plan), run_dir)
        announce(cfg, plan, module, pair, run_dir)

    trainer.fit_loop.epoch_loop.max_steps = plan.total_steps
    if resume is not None and trainer.is_global_zero:
        print(f"going on from {resume}")
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except Stopped as stop:
        if trainer.is_global_zero:
            print(f"{stop}; saved in {run_dir}, the same command goes on from there")
        sys.exit(stop.exit_code)
    except RuntimeError as error:
        if trainer.world_size > 1 and re.search("gloo|nccl", str(error), re.I):
            raise RunFailed(f"rank {trainer.global_rank}: another rank has ended") from error
        raise
    finally:
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "finish"):  # wandb's run ends here, not with the process
                experiment.finish()
    seconds = time.perf_counter() - started

    def measure() -> Mapping[str, Any]:
        return evaluate(
            load_backbone(run_dir),
            pair,
            num_workers=cfg.num_workers,
            device=str(module.device),
            max_pixels=how.max_pixels,
        )

    if trainer.is_global_zero:
        summary = {
            "results": measure() if pair else {},
            "data": pair.name if pair else None,
            "model": model_name(module.student.backbone.architecture),
            "last": last_row(run_dir),
            "seconds": round(seconds, 1),
            "plan": asdict(plan),
            "versions": versions(),
        }
        write_json(summary, run_dir / "summary.json")
        finish(run_dir, summary)


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The final numbers, where things are, and what to type next."""
    last = summary["last"]
    print(f"{last['step']:.0f} steps, {last['epoch']:.1f} epochs, loss {last['loss']:.3f}")
    if summary["results"]:
        print_table(summary["results"], f"{summary['model']} on {summary['data']}")
        follow_up = f"ssl-xcit eval ckpt={run_dir}"
    else:
        print(NO_LABELS)
        follow_up = f"ssl-xcit eval ckpt={run_dir} eval_data=folder eval_data.root=DIR"
    print(f"{run_dir}: config.yaml, metrics.csv, checkpoints/, summary.json")
    print(f"next: {follow_up}")


def announce(
    cfg: DictConfig,
    plan: Plan,
    module: DINO,
    pair: LabelledPair | None,
    run_dir: Path,
) -> None:
    """What is about to happen, with the numbers that were derived."""
    backbone = module.student.backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    print(f"{run_dir}")
    print(
        f"  {plan.num_images:,} images, batch {cfg.batch_size}, {plan.total_steps:,} steps "
        f"({cfg.epochs:g} epochs)"
    )
    print(
        f"  {model_name(backbone.architecture)}, {millions:.1f} M parameters, "
        f"{plan.num_prototypes:,} prototypes, {cfg.trainer.precision}"
    )
    if cfg.compile:
        print("  the first step compiles both backbones, which takes minutes")
    print(
        f"  lr {plan.lr:.2e} after {plan.warmup_steps} steps, teacher temperature "
        f"{plan.teacher_temp_start:g} to {plan.teacher_temp:g}, EMA from {plan.ema:g}"
    )
    print(f"  evaluated on {pair.name}" if pair else f"  {NO_LABELS}")
