"""The command `pretrain`: a configuration to a run folder of weights, metrics, final numbers."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from ssl_xcit.data.crop_dataset import check_images, check_labelled
from ssl_xcit.data.identity import indices_of
from ssl_xcit.data.multicrop import Crops, MultiCrop, Recipe, crops_at
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.models.weights import TrainingWeights, load_backbone, model_name
from ssl_xcit.training.budget import (
    MOST,
    baselines_before,
    baselines_made_with,
    parse_budget,
    steps_in_budget,
)
from ssl_xcit.training.build import accelerate_, make_module, make_schedules
from ssl_xcit.training.datamodule import TrainingData, multi_crop_data
from ssl_xcit.training.health import HEALTHY
from ssl_xcit.training.init_weights import described_start, read_start
from ssl_xcit.training.lr_range import FEWEST_STEPS, MOST_STEPS, range_test
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.pace import GROWTH, Pace
from ssl_xcit.training.plan import Plan, check_batch, check_one_device, make_plan, scaled_rate
from ssl_xcit.training.plan_preview import show_plan
from ssl_xcit.training.run_dir import (
    about_run,
    check_same_data,
    check_same_run,
    disk_trouble,
    is_begun,
    kernels_of,
    last_row,
    locked,
    moved_paths,
    moved_run,
    run_id_of,
    versions,
)
from ssl_xcit.training.run_name import run_name
from ssl_xcit.training.session import (
    is_finished,
    leave_report,
    run_to_the_end,
    submit_run,
    submits,
    train,
)
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.trainer import make_trainer, runs_on_cpu
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import (
    check_compiler,
    compiles_on_gpu,
    default_workers,
    precision_for,
)
from ssl_xcit.utils.tables import print_table
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import as_plain

log = logging.getLogger(__name__)
LR_INSTEAD = "see with trainer.devices=1 which optim.lr=... it finds, and give that number"
BUDGET_INSTEAD = "give epochs or max_steps"
NO_LABELS = "no labelled images, so no k-NN: name some with eval_data.root=DIR"


def main(settings: PretrainSettings) -> Path:
    """`ssl-xcit pretrain`: whatever can be wrong is found before the run folder is made, which is
    returned.
    """
    on_cpu = runs_on_cpu(settings.trainer)
    precision = precision_for(str(settings.trainer.precision), on_cpu)
    settings = replace(settings, trainer=replace(settings.trainer, precision=precision))
    if settings.compile == "auto" and not on_cpu:
        compiles = compiles_on_gpu() and not settings.checkpoint_blocks
        settings = replace(settings, compile=compiles)
    if settings.compile is True:
        check_compiler(on_cpu)
    hydra = HydraConfig.get()
    name = settings.name or run_name(hydra.runtime.choices["data"], hydra.overrides.task)
    run_dir = Path(str(settings.out)) / str(name)
    given = settings
    settings, start = read_start(given, run_dir)
    plain = as_plain(settings)
    if not submits(settings):  # where it is queued, precision=auto may mean another one
        check_same_run(plain, run_dir)
    if not moved_paths(plain, run_dir) and is_finished(run_dir, finish):
        return run_dir
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
    if is_finished(run_dir, finish):
        return run_dir
    settings = replace(settings, run_id=settings.run_id or run_id_of(run_dir))
    note = augment.check(preprocess.channels)
    if settings.plan:
        settings = replace(settings, logger=None)
    elif submits(settings):
        check_queued(settings, len(source))
        check_images(source, augment.global_size, preprocess)
        submit_run(settings, run_dir)
        return run_dir
    trainer, stop = make_trainer(settings, run_dir, str(settings.run_id), indices)
    begun = about_run(run_dir).get("plan") if is_begun(run_dir) else None
    plan = make_plan(settings, len(source), trainer.world_size, begun)
    if math.isnan(plan.lr):
        check_one_device(trainer.world_size, "optim.lr=auto", LR_INSTEAD)
    unplanned = settings.budget is not None and not (begun or {}).get("total_steps")
    if settings.budget is not None:
        parse_budget(str(settings.budget))
    if unplanned:
        check_one_device(trainer.world_size, "budget", BUDGET_INSTEAD)
    check_images(source, augment.global_size, preprocess)
    if pair is not None:
        check_labelled(pair, preprocess)

    def networks(plan: Plan) -> Pretraining:
        made = make_module(settings, plan, preprocess, start)
        accelerate_(made, settings.compile, trainer.world_size, kernels_of(run_dir))
        return made

    if settings.plan:
        if trainer.is_global_zero:
            module = networks(plan)
            evaluated = f"evaluated on {pair.name}" if pair else NO_LABELS
            show_plan(settings, trainer, plan, module, augment, evaluated, run_dir)
        return run_dir
    module = networks(plan)
    evaluate = instantiate(settings.evaluation)
    if note is not None and trainer.is_global_zero:
        log.warning("%s", note)
    num_workers = settings.num_workers
    with locked(run_dir, wanted=trainer.is_global_zero):
        if trainer.is_global_zero and is_finished(run_dir, finish):  # meanwhile
            return run_dir

        def crops(augment: MultiCrop, total_steps: int) -> TrainingData[Crops]:
            return multi_crop_data(
                source,
                augment,
                plan.per_device_batch,
                total_steps,
                settings.seed,
                preprocess,
                default_workers(trainer.num_devices) if num_workers is None else num_workers,
                pair,
                run_dir,
                settings.data.max_bad_fraction,
                settings.worker_timeout,
                trainer.world_size,
            )

        data = crops(augment, plan.total_steps)

        def training() -> float:
            nonlocal plan, module, data
            if unplanned:
                trial = crops(crops_at(augment, 0.0), MOST)
                device = str(trainer.strategy.root_device)
                made_with = baselines_made_with(
                    settings, {k: v.digest() for k, v in indices.items()}
                )
                steps = steps_in_budget(
                    settings, module, trial, evaluate, pair, run_dir, device, made_with
                )
                plan = make_plan(settings, len(source), trainer.world_size, begun, steps)
                module, data = networks(plan), crops(augment, plan.total_steps)
            if math.isnan(plan.lr):
                steps = max(FEWEST_STEPS, min(MOST_STEPS, plan.total_steps))
                trial = crops(crops_at(augment, 0.0), steps)
                budgeted = plan.total_steps if settings.budget is not None else None
                rate = found_rate(settings, trial, preprocess, start, run_dir, budgeted)
                plan = replace(plan, lr=rate)
                module.schedules = make_schedules(settings.optim, plan)
            pace = None
            if settings.budget is not None and not getattr(augment, "stages", ()):
                pace = Pace(run_dir, parse_budget(str(settings.budget)), plan.total_steps)
                callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
                callbacks.insert(0, pace)  # before what acts at the last step
                data.total_steps *= GROWTH
            last_step = pace.timeline.last if pace else None
            announced = replace(plan, total_steps=last_step or plan.total_steps)
            seconds = train(
                settings, trainer, module, data, plan, run_dir, record,
                lambda: announce(settings, announced, module, data, run_dir), last_step,
            )  # fmt: skip
            plan = replace(plan, total_steps=trainer.max_steps)
            return seconds

        run_to_the_end(
            trainer,
            stop,
            run_dir,
            training,
            lambda seconds: conclude(
                settings, trainer, module, data, plan, evaluate, run_dir, seconds
            ),
        )
    return run_dir


def check_queued(settings: PretrainSettings, num_images: int) -> None:
    """Check what can be checked before a run is queued: batch and budget on so many devices."""
    devices = settings.trainer.devices
    ranks = settings.trainer.num_nodes * (devices if isinstance(devices, int) else 1)
    check_batch(settings, num_images, ranks)
    if settings.budget is not None:
        parse_budget(str(settings.budget))
        check_one_device(ranks, "budget", BUDGET_INSTEAD)


def found_rate(
    settings: PretrainSettings,
    data: TrainingData[Crops],
    preprocess: Preprocess,
    start: TrainingWeights | None,
    run_dir: Path,
    budgeted: int | None,
) -> float:
    """The peak learning rate that `optim.lr=auto` stands for, by networks of their own; of the
    steps that a budget allows.
    """
    num_images, optim = len(data.dataset.source), settings.optim
    plan = make_plan(settings, num_images, 1, steps=budgeted)
    module = make_module(settings, plan, preprocess, start)
    found = range_test(settings.trainer, module, data, run_dir)
    as_given = found / scaled_rate(settings.batch_size, optim.lr_scaling)
    say(f"lr=auto: {found:.2e}, as if optim.lr={as_given:.2e} had been given")
    return found


def conclude(
    settings: PretrainSettings,
    trainer: lightning.Trainer,
    module: Pretraining,
    data: TrainingData[Crops],
    plan: Plan,
    evaluate: Callable[..., Any],
    run_dir: Path,
    seconds: float,
) -> None:
    """Measure the frozen features, and write `summary.json`: with it the run is finished."""
    pair = data.eval_data
    measured: dict[str, Any] = {"results": {}, "intervals": {}}
    if pair is not None:
        before = baselines_before(settings, run_dir)
        evaluation = evaluate(
            load_backbone(run_dir),
            pair,
            **({"baselines": None} if before else {}),
            num_workers=settings.num_workers,
            device=str(trainer.strategy.root_device),
            max_pixels=data.dataset.preprocess.max_pixels,
        )
        measured = {
            "results": evaluation.results,
            "intervals": evaluation.intervals,
            "chosen": evaluation.chosen,
        }
        measured = {key: {**before.get(key, {}), **rows} for key, rows in measured.items()}
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
        "plan": plan.record(),
        "versions": versions(),
    }
    with disk_trouble(run_dir):
        write_json(summary, run_dir / "summary.json")
    finish(run_dir, summary)
    leave_report(settings, run_dir, str(trainer.strategy.root_device))


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The final numbers, where things are, and what to type next."""
    last = summary["last"]
    if last:
        say(f"{last['step']:.0f} steps, {last['epoch']:.1f} epochs, loss {last['loss']:.3f}")
    if summary.get("health") not in (None, HEALTHY):
        say(f"not healthy: {summary['health']}; see metrics.csv")
    if summary["results"]:
        title = f"{summary['model']} on {summary['data']}"
        own = list(summary["results"])[-1]  # behind the baselines
        chosen = {own: (summary.get("chosen") or {}).get(own, {})}
        print_table(summary["results"], title, summary.get("intervals"), chosen)
        choices = about_run(run_dir).get("choices") or {}
        protocol = str(choices.get("evaluation", "standard"))
        follow_up = f"ssl-xcit eval ckpt={run_dir}" + f" evaluation={protocol}" * (
            protocol != "standard"
        )
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
    settings: PretrainSettings,
    plan: Plan,
    module: Pretraining,
    data: TrainingData[Crops],
    run_dir: Path,
) -> None:
    """What is about to happen, with the numbers that were derived."""
    pair, augment = data.eval_data, getattr(data.dataset, "augment", None)
    backbone = module.student.backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    say(f"{run_dir}")
    say(
        f"  {plan.num_images:,} images, batch {settings.batch_size}, {plan.total_steps:,} steps "
        f"({plan.epochs(settings):.4g} epochs)"
    )
    say(
        f"  {model_name(backbone.architecture)}, {millions:.1f} M parameters, "
        f"{settings.trainer.precision}"
    )
    if settings.init.ckpt is not None:
        say(f"  {described_start(settings.init, plan.backbone_freeze_steps)}")
    if settings.compile is True:
        say("  the first step compiles both backbones, which takes minutes")
    say(f"  lr {plan.lr:.2e} after {plan.warmup_steps} steps, {plan.objective.described()}")
    if isinstance(augment, Recipe) and augment.stages:
        say(f"  crops: {augment.described(plan.total_steps)}")
    say(f"  evaluated on {pair.name}" if pair else f"  {NO_LABELS}")
