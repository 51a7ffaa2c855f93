"""The command `pretrain`: a configuration to a run folder of weights, metrics, final numbers."""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from ssl_xcit.data.crop_dataset import check_images, check_labelled
from ssl_xcit.data.identity import indices_of
from ssl_xcit.data.loader import default_workers
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import RunFailed
from ssl_xcit.models.weights import checkpoints_of, load_backbone, model_name
from ssl_xcit.training.build import make_module
from ssl_xcit.training.checkpoint import newest_valid
from ssl_xcit.training.datamodule import MultiCropData
from ssl_xcit.training.health import HEALTHY
from ssl_xcit.training.init_weights import described_start, read_start
from ssl_xcit.training.loggers import FailsafeLogger
from ssl_xcit.training.module import DINO
from ssl_xcit.training.plan import Plan, make_plan
from ssl_xcit.training.preemption import Stopped, requeue
from ssl_xcit.training.run_dir import (
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
from ssl_xcit.training.run_name import run_name
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.trainer import kill_children, make_trainer, runs_on_cpu, watched_child
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import check_compiler, precision_for
from ssl_xcit.utils.tables import print_table
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import as_plain

log = logging.getLogger(__name__)
NO_LABELS = "no labelled images, so no k-NN: name some with eval_data.root=DIR"


def main(settings: PretrainSettings) -> None:
    """`ssl-xcit pretrain`: whatever can be wrong is found before the run folder is made."""
    on_cpu = runs_on_cpu(settings.trainer)
    precision = precision_for(str(settings.trainer.precision), on_cpu)
    settings = replace(settings, trainer=replace(settings.trainer, precision=precision))
    if settings.compile:
        check_compiler(on_cpu)
    hydra = HydraConfig.get()
    name = settings.name or run_name(hydra.runtime.choices["data"], hydra.overrides.task)
    run_dir = Path(str(settings.out)) / str(name)
    given = settings
    settings, start = read_start(given, run_dir)
    plain = as_plain(settings)
    check_same_run(plain, run_dir)
    if not moved_paths(plain, run_dir) and is_finished(run_dir):
        return
    source: Source = instantiate(settings.data.source)
    pair: LabelledPair | None = instantiate(settings.eval_data) if settings.eval_data else None
    augment = instantiate(settings.augment)
    preprocess = instantiate(settings.preprocess)
    preprocess.statistics()
    indices = indices_of(source, pair)
    moved = moved_run(plain, indices) if not settings.name and not is_begun(run_dir) else None
    if moved is not None:
        run_dir = moved
        settings, start = read_start(given, moved)
    elsewhere = moved_paths(plain, run_dir)
    go_on = settings.resume.data == "changed"
    record = check_same_data(run_dir, indices, preprocess, go_on)
    if not record.changed and is_begun(run_dir) and elsewhere:
        say(f"{run_dir}: {', '.join(elsewhere)}: the same images, elsewhere")
    if is_finished(run_dir):
        return
    settings = replace(settings, run_id=settings.run_id or run_id_of(run_dir))
    note = augment.check(preprocess.channels)
    trainer, stop = make_trainer(settings, run_dir, str(settings.run_id))
    begun = about_run(run_dir).get("plan") if is_begun(run_dir) else None
    plan = make_plan(settings, len(source), trainer.world_size, begun)
    check_images(source, augment.global_size, preprocess)
    if pair is not None:
        check_labelled(pair, preprocess)
    module = make_module(settings, plan, preprocess, start)
    if settings.compile:  # SyncBatchNorm, which several GPUs have, breaks a program in two
        for network in (module.student, module.teacher):
            network.compile_backbone(fullgraph=trainer.world_size == 1)
    evaluate = instantiate(settings.evaluation)
    if note is not None and trainer.is_global_zero:
        log.warning("%s", note)
    num_workers = settings.num_workers
    with locked(run_dir, wanted=trainer.is_global_zero):
        if trainer.is_global_zero and is_finished(run_dir):  # meanwhile
            return
        data = MultiCropData(
            source,
            augment,
            plan.per_device_batch,
            plan.total_steps,
            settings.seed,
            preprocess,
            default_workers(trainer.num_devices) if num_workers is None else num_workers,
            pair,
            run_dir,
            settings.data.max_bad_fraction,
            settings.worker_timeout,
        )
        try:
            stop.install()
            seconds = train(settings, trainer, module, data, plan, run_dir, record)
            stop.after_training()
            if trainer.is_global_zero:
                conclude(settings, trainer, module, data, plan, evaluate, run_dir, seconds)
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
    settings: PretrainSettings,
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
            write_settings(as_plain(settings), asdict(plan), run_dir, resumed_at, record)
        announce(settings, plan, module, data.eval_data, run_dir)
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
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, FailsafeLogger):
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
    settings: PretrainSettings,
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
        evaluation = evaluate(
            load_backbone(run_dir),
            pair,
            num_workers=settings.num_workers,
            device=str(trainer.strategy.root_device),
            max_pixels=data.dataset.preprocess.max_pixels,
        )
        measured = {"results": evaluation.results, "intervals": evaluation.intervals}
        for missing in evaluation.left_out.values():
            for name, why in missing.items():
                log.warning("%s is left out: %s", name, why)
    summary = {
        **measured,
        "data": pair.name if pair else None,
        "model": model_name(module.student.backbone.architecture),
        "last": last_row(run_dir),
        "health": module.health.verdict if module.health is not None else None,
        "seconds": round(seconds, 1),
        "plan": asdict(plan),
        "versions": versions(),
    }
    with disk_trouble(run_dir):
        write_json(summary, run_dir / "summary.json")
    finish(run_dir, summary)
    leave_report(settings, run_dir, str(trainer.strategy.root_device))


def leave_report(settings: PretrainSettings, run_dir: Path, device: str) -> None:
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
    settings: PretrainSettings, plan: Plan, module: DINO, pair: LabelledPair | None, run_dir: Path
) -> None:
    """What is about to happen, with the numbers that were derived."""
    backbone = module.student.backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    say(f"{run_dir}")
    say(
        f"  {plan.num_images:,} images, batch {settings.batch_size}, {plan.total_steps:,} steps "
        f"({settings.epochs:g} epochs)"
    )
    say(
        f"  {model_name(backbone.architecture)}, {millions:.1f} M parameters, "
        f"{plan.num_prototypes:,} prototypes, {settings.trainer.precision}"
    )
    if settings.init.ckpt is not None:
        say(f"  {described_start(settings.init, plan.backbone_freeze_steps)}")
    if settings.compile:
        say("  the first step compiles both backbones, which takes minutes")
    say(
        f"  lr {plan.lr:.2e} after {plan.warmup_steps} steps, teacher temperature "
        f"{plan.teacher_temp_start:g} to {plan.teacher_temp:g}, EMA from {plan.ema:g}"
    )
    say(f"  evaluated on {pair.name}" if pair else f"  {NO_LABELS}")
