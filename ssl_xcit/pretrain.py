"""The command `pretrain`: from a configuration to a run folder with weights, metrics and final
numbers.
"""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from ssl_xcit.data.identity import indices_of
from ssl_xcit.data.loader import default_workers
from ssl_xcit.data.module import MultiCropData, check_images, check_labelled
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import write_json
from ssl_xcit.hardware import check_compiler, precision_for
from ssl_xcit.models.weights import Training, checkpoints_of, load_backbone, model_name
from ssl_xcit.plan import Plan, check_numbers, check_switches, make_plan
from ssl_xcit.run_folder import (
    DataRecord,
    about_run,
    check_same_data,
    check_same_run,
    disk_trouble,
    is_begun,
    last_row,
    locked,
    moved_paths,
    moved_run,
    run_id_of,
    versions,
    write_settings,
)
from ssl_xcit.run_name import run_name
from ssl_xcit.starting import in_words, read_start, start_backbone, start_head
from ssl_xcit.table import print_table
from ssl_xcit.terminal import say
from ssl_xcit.trainer import kill_children, make_trainer, runs_on_cpu, watched_child
from ssl_xcit.training.checkpoint import newest_valid
from ssl_xcit.training.health import HEALTHY, Health
from ssl_xcit.training.loggers import Tolerant
from ssl_xcit.training.module import DINO, Schedules, make_networks
from ssl_xcit.training.preemption import Stopped, requeue
from ssl_xcit.training.schedules import Cosine, LinearByEpoch, Release

log = logging.getLogger(__name__)
NO_LABELS = "no labelled images, so no k-NN: name some with eval_data.root=DIR"


def make_module(
    cfg: DictConfig, plan: Plan, how: Preprocess, start: Training | None = None
) -> DINO:
    """Student, teacher, schedules; fresh weights by `seed`, but for those to start from."""
    torch.manual_seed(cfg.seed)
    backbone = instantiate(cfg.model)
    head = instantiate(cfg.objective.head)(backbone.embed_dim, plan.num_prototypes)
    in_chans = backbone.architecture["in_chans"]
    if in_chans != how.channels:
        raise UserError(
            f"model.in_chans={in_chans} and preprocess.channels={how.channels}: set model.in_chans "
            "alone, the other follows"
        )
    if start is not None:
        start_backbone(backbone, start, how, cfg.init.ckpt)
        if cfg.init.head == "kept":
            start_head(head, start, cfg.init.ckpt)
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
            backbone=Release(plan.backbone_freeze_steps, plan.warmup_steps)
            if plan.backbone_freeze_steps
            else None,
        ),
        instantiate(optim.optimizer),
        student_temp=cfg.objective.student_temp,
        center_momentum=cfg.objective.center_momentum,
        clip_norm=cfg.objective.clip_norm,
        freeze_steps=plan.freeze_steps,
        seed=cfg.seed,
        accumulate=cfg.trainer.accumulate,
        max_skipped=cfg.max_skipped,
    )
    if start is not None and cfg.init.head == "kept" and start.center is not None:
        module.center.center.copy_(start.center)
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:  # torch's own words on its arguments
        raise UserError(f"optim.optimizer: {error}") from error
    return module


def main(cfg: DictConfig) -> None:
    """`ssl-xcit pretrain`: whatever can be wrong is found before the run folder is made."""
    if "accumulate" not in cfg.trainer:
        raise UserError("trainer.accumulate is missing: begin the yaml with defaults: [auto]")
    check_numbers(cfg)
    check_switches(cfg)
    if cfg.resume.data not in ("same", "changed"):
        raise UserError(f"resume.data={cfg.resume.data}: same or changed")
    cfg.trainer.precision = precision_for(str(cfg.trainer.precision), runs_on_cpu(cfg))
    if cfg.compile:
        check_compiler(runs_on_cpu(cfg))
    hydra = HydraConfig.get()
    name = cfg.name or run_name(hydra.runtime.choices["data"], hydra.overrides.task)
    run_dir = Path(str(cfg.out)) / str(name)
    start = read_start(cfg, run_dir)
    check_same_run(cfg, run_dir)
    if not moved_paths(cfg, run_dir) and is_finished(run_dir):
        return
    source: Source = instantiate(cfg.data.source)
    pair: LabelledPair | None = instantiate(cfg.eval_data) if cfg.get("eval_data") else None
    augment = instantiate(cfg.augment)
    how = instantiate(cfg.preprocess)
    how.statistics()
    indices = indices_of(source, pair)
    moved = moved_run(cfg, indices) if not cfg.name and not is_begun(run_dir) else None
    if moved is not None:
        run_dir, start = moved, read_start(cfg, moved)
    elsewhere = moved_paths(cfg, run_dir)
    record = check_same_data(run_dir, indices, how, elsewhere, cfg.resume.data == "changed")
    if not record.changed and is_begun(run_dir) and elsewhere:
        say(f"{run_dir}: {', '.join(elsewhere)}: the same images, elsewhere")
    if is_finished(run_dir):
        return
    cfg.run_id = cfg.run_id or run_id_of(run_dir)
    note = augment.check(how.channels)
    trainer, stop = make_trainer(cfg, run_dir)
    begun = about_run(run_dir).get("plan") if is_begun(run_dir) else None
    plan = make_plan(cfg, len(source), trainer.world_size, begun)
    check_images(source, augment.global_size, how)
    if pair is not None:
        check_labelled(pair, how)
    module = make_module(cfg, plan, how, start)
    if cfg.compile:  # SyncBatchNorm, which several GPUs have, breaks a program in two
        for network in (module.student, module.teacher):
            network.compile_backbone(fullgraph=trainer.world_size == 1)
    evaluate = instantiate(cfg.evaluation)
    if note is not None and trainer.is_global_zero:
        log.warning("%s", note)
    with locked(run_dir, wanted=trainer.is_global_zero):
        if trainer.is_global_zero and is_finished(run_dir):  # meanwhile
            return
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
        try:
            stop.install()
            seconds = train(cfg, trainer, module, data, plan, run_dir, record)
            stop.after_training()
            if trainer.is_global_zero:
                conclude(cfg, trainer, module, data, plan, evaluate, run_dir, seconds)
        except Stopped as stopped:
            if trainer.is_global_zero:
                say_stopped(stopped, run_dir)
                if stopped.signal == signal.SIGUSR1:
                    requeue()
            sys.exit(0 if watched_child(trainer) else stopped.exit_code)
        finally:
            if not stop.stopping:  # else they stay: a scheduler may ask twice
                stop.restore()


def train(
    cfg: DictConfig,
    trainer: lightning.Trainer,
    module: DINO,
    data: MultiCropData,
    plan: Plan,
    run_dir: Path,
    record: DataRecord,
) -> float:
    """From the newest valid checkpoint, or the start, to the last step; seconds that it took."""
    resume = newest_valid(run_dir, may_rename=trainer.is_global_zero)
    if trainer.is_global_zero:
        with disk_trouble(run_dir):
            resumed_at = None if resume is None else int(resume.stem.removeprefix("step-"))
            write_settings(cfg, asdict(plan), run_dir, resumed_at, record)
        announce(cfg, plan, module, data.eval_data, run_dir)
        if resume is not None:
            taken = int(resume.stem.removeprefix("step-"))
            left = "" if taken < plan.total_steps else ", which leaves no step to take"
            say(f"going on from {resume}{left}")
    trainer.fit_loop.epoch_loop.max_steps = plan.total_steps
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except RuntimeError as error:
        kill_children(trainer)
        if trainer.world_size > 1 and re.search("gloo|nccl", str(error), re.I):
            raise RunFailed(
                f"rank {trainer.global_rank}: another rank has ended, or has not answered for "
                f"{cfg.collective_timeout:g} s (collective_timeout); the same command goes on from "
                "the newest checkpoint"
            ) from error
        raise
    except Stopped as stopped:
        if stopped.step is None:  # asked before the ranks could agree
            kill_children(trainer)
        raise
    except BaseException:
        kill_children(trainer)
        raise
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant):
                logger.finish()
    return time.perf_counter() - started


def is_finished(run_dir: Path) -> bool:
    """If so, say it and show the final numbers again."""
    path = run_dir / "summary.json"
    if not path.is_file():
        return False
    say(f"{run_dir} is finished; to train again, choose another name=... or remove the folder", "")
    finish(run_dir, json.loads(path.read_text()))
    page = run_dir / "report.html"
    say(f"report: {page if page.is_file() else f'ssl-xcit report run={run_dir}'}")
    return True


def conclude(
    cfg: DictConfig,
    trainer: lightning.Trainer,
    module: DINO,
    data: MultiCropData,
    plan: Plan,
    evaluate: Callable[..., Any],
    run_dir: Path,
    seconds: float,
) -> None:
    """Measure the frozen features, and write `summary.json`: with it the run is finished."""
    pair = data.eval_data
    measured: dict[str, Any] = {"results": {}, "intervals": {}}
    if pair is not None:
        found = evaluate(
            load_backbone(run_dir),
            pair,
            num_workers=cfg.num_workers,
            device=str(trainer.strategy.root_device),
            max_pixels=data.dataset.how.max_pixels,
        )
        measured = {"results": found.results, "intervals": found.intervals}
        for missing in found.left_out.values():
            for name, why in missing.items():
                log.warning("%s is left out: %s", name, why)
    health = [c.verdict for c in trainer.callbacks if isinstance(c, Health)]  # type: ignore[attr-defined]
    summary = {
        **measured,
        "data": pair.name if pair else None,
        "model": model_name(module.student.backbone.architecture),
        "last": last_row(run_dir),
        "health": health[0] if health else None,
        "seconds": round(seconds, 1),
        "plan": asdict(plan),
        "versions": versions(),
    }
    with disk_trouble(run_dir):
        write_json(summary, run_dir / "summary.json")
    finish(run_dir, summary)
    leave_report(cfg, run_dir, str(trainer.strategy.root_device))


def leave_report(cfg: DictConfig, run_dir: Path, device: str) -> None:
    """A page about the finished run, by what `report` names; trouble with it is none of the
    run's.
    """
    if cfg.get("report") is None:
        return
    try:
        page = instantiate(cfg.report)(run_dir, device=device, num_workers=cfg.num_workers)
        say(f"report: {page}; open it in a browser")
    except Exception as error:
        log.warning(
            "no report was written (%s: %s); ssl-xcit report run=%s tries again",
            type(error).__name__, error, run_dir,
        )  # fmt: skip


def say_stopped(stopped: Stopped, run_dir: Path) -> None:
    """Where the same command goes on, and what shows how far it has come."""
    found = checkpoints_of(run_dir)
    where = f"goes on from {found[-1].stem}" if found else "starts again"
    if (run_dir / "summary.json").is_file():  # stopped while the report was made
        where = "finds it finished"
    unsaved = "" if stopped.saved or stopped.step is None else "; this step could not be saved"
    say(
        f"{stopped}{unsaved}; {run_dir}: the same command {where}",
        f"report: ssl-xcit report run={run_dir}",
    )


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The final numbers, where things are, and what to type next."""
    last = summary["last"]
    if last:
        say(f"{last['step']:.0f} steps, {last['epoch']:.1f} epochs, loss {last['loss']:.3f}")
    if summary.get("health") not in (None, HEALTHY):
        say(f"not healthy: {summary['health']}; see metrics.csv")
    if summary["results"]:
        title = f"{summary['model']} on {summary['data']}"
        print_table(summary["results"], title, summary.get("intervals"))
        follow_up = f"ssl-xcit eval ckpt={run_dir}"
    else:
        say(NO_LABELS)
        follow_up = f"ssl-xcit eval ckpt={run_dir} eval_data.root=DIR"
    say(f"{run_dir}: config.yaml, metrics.csv, checkpoints/, summary.json")
    with suppress(OSError, ValueError, KeyError, TypeError):  # of online evaluation, if there was
        best = json.loads((run_dir / "checkpoints" / "best.json").read_text())
        say(
            f"{run_dir}/checkpoints/best.ckpt: step {best['step']}, with {best['value']:.1f} the "
            f"highest {best['metric']} of online evaluation"
        )
    say(f"next: {follow_up}")


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
    say(f"{run_dir}")
    say(
        f"  {plan.num_images:,} images, batch {cfg.batch_size}, {plan.total_steps:,} steps "
        f"({cfg.epochs:g} epochs)"
    )
    say(
        f"  {model_name(backbone.architecture)}, {millions:.1f} M parameters, "
        f"{plan.num_prototypes:,} prototypes, {cfg.trainer.precision}"
    )
    if cfg.init.ckpt is not None:
        say(f"  {in_words(cfg, plan.backbone_freeze_steps)}")
    if cfg.compile:
        say("  the first step compiles both backbones, which takes minutes")
    say(
        f"  lr {plan.lr:.2e} after {plan.warmup_steps} steps, teacher temperature "
        f"{plan.teacher_temp_start:g} to {plan.teacher_temp:g}, EMA from {plan.ema:g}"
    )
    say(f"  evaluated on {pair.name}" if pair else f"  {NO_LABELS}")
