"""The command `pretrain`: a configuration to a run folder of weights, metrics, final numbers."""

import json
import logging
import math
import shutil
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
    Speed,
    measure_speed,
    online_share,
    parse_budget,
    steps_within,
)
from ssl_xcit.training.budget import check_one_device as budget_on_one_device
from ssl_xcit.training.build import make_module, make_schedules
from ssl_xcit.training.checkpoint import SaveCheckpoints
from ssl_xcit.training.datamodule import TrainingData, multi_crop_data
from ssl_xcit.training.health import HEALTHY
from ssl_xcit.training.init_weights import described_start, read_start
from ssl_xcit.training.lr_range import FEWEST_STEPS, MOST_STEPS, check_one_device, range_test
from ssl_xcit.training.memory import remedies
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.plan import Plan, check_batch, make_plan, scaled_rate
from ssl_xcit.training.run_dir import (
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
)
from ssl_xcit.training.run_name import run_name
from ssl_xcit.training.session import (
    is_finished,
    leave_report,
    run_to_the_end,
    submits,
    submitted,
    train,
)
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.step_memory import (
    StepMemory,
    checkpoint_bytes,
    step_memory,
    view_shapes,
)
from ssl_xcit.training.trainer import make_trainer, runs_on_cpu
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import (
    check_compiler,
    default_workers,
    memory_of,
    precision_for,
    resident_bytes,
)
from ssl_xcit.utils.tables import print_table
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import as_plain, flat

log = logging.getLogger(__name__)
BASELINES = "baselines.json"  # of a run whose budget is a time: measured before it
BUDGET_PLAN = "with budget={} as many as fit: measured at the start, here as an example"
RANDOM = "random weights"  # the baseline that takes as long as the backbone
NO_LABELS = "no labelled images, so no k-NN: name some with eval_data.root=DIR"


def main(settings: PretrainSettings) -> Path:
    """`ssl-xcit pretrain`: whatever can be wrong is found before the run folder is made, which is
    returned.
    """
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
        submitted(settings, run_dir)
        return run_dir
    trainer, stop = make_trainer(settings, run_dir, str(settings.run_id))
    begun = about_run(run_dir).get("plan") if is_begun(run_dir) else None
    plan = make_plan(settings, len(source), trainer.world_size, begun)
    if math.isnan(plan.lr):
        check_one_device(trainer.world_size)
    unplanned = settings.budget is not None and not (begun or {}).get("total_steps")
    if settings.budget is not None:
        parse_budget(str(settings.budget))
    if unplanned:
        budget_on_one_device(trainer.world_size)
    check_images(source, augment.global_size, preprocess)
    if pair is not None:
        check_labelled(pair, preprocess)

    def networks(plan: Plan) -> Pretraining:
        made = make_module(settings, plan, preprocess, start)
        if settings.compile:  # SharedBatchNorm, which several ranks have, breaks a program in two
            for network in (made.student, made.teacher):
                network.compile_backbone(plan.objective.takes_patches, trainer.world_size == 1)
        return made

    if settings.plan:
        if trainer.is_global_zero:
            module = make_module(settings, plan, preprocess, start)
            show_plan(settings, trainer, plan, module, augment, pair, run_dir)
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
                plan = replace(plan, lr=found_rate(settings, trial, preprocess, start, run_dir))
                module.schedules = make_schedules(settings.optim, plan)
            return train(
                settings, trainer, module, data, plan, run_dir, record,
                lambda: announce(settings, plan, module, data, run_dir),
            )  # fmt: skip

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


def steps_in_budget(
    settings: PretrainSettings,
    module: Pretraining,
    data: TrainingData[Crops],
    evaluate: Callable[..., Any],
    pair: LabelledPair | None,
    run_dir: Path,
    device: str,
    made_with: Mapping[str, Any],
) -> int:
    """Measure what a step and an evaluation take; the baselines, which do not change, are evaluated
    for that and kept in `RUN/baselines.json`.
    """
    evaluation_seconds = 0.0
    if pair is not None:
        options = {
            "num_workers": settings.num_workers,
            "device": device,
            "max_pixels": data.dataset.preprocess.max_pixels,
        }
        first = evaluate(module.teacher.backbone, pair, baselines_only=True, **options)
        if RANDOM not in first.seconds:  # no baseline is a network
            first = evaluate(module.teacher.backbone, pair, baselines=None, **options)
        row = RANDOM if RANDOM in first.seconds else next(iter(first.seconds), None)
        evaluation_seconds = sum(first.seconds[row].values()) if row else 0.0
        kept = {"results": first.results, "intervals": first.intervals, "chosen": first.chosen}
        with disk_trouble(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json({**made_with, **(kept if row == RANDOM else {})}, run_dir / BASELINES)
    step_seconds = measure_speed(
        settings.trainer, module, data, run_dir, parse_budget(str(settings.budget))
    )
    speed = Speed(step_seconds, evaluation_seconds)
    online = settings.callbacks.get("online") if pair is not None else None
    first_steps = MOST_STEPS if settings.optim.lr == "auto" else 0  # of the range test
    steps = steps_within(str(settings.budget), speed, 0.0, first_steps)
    steps = steps_within(str(settings.budget), speed, online_share(online, steps), first_steps)
    say(
        f"budget={settings.budget}: {step_seconds:.2g} s a step, {evaluation_seconds:.0f} s for "
        f"the evaluation: {steps:,} steps"
    )
    return steps


def show_plan(
    settings: PretrainSettings,
    trainer: lightning.Trainer,
    plan: Plan,
    module: Pretraining,
    augment: Any,
    pair: LabelledPair | None,
    run_dir: Path,
) -> None:
    """What the run would do and need."""
    device, batch = trainer.strategy.root_device, plan.per_device_batch
    parts = settings.trainer.accumulate
    at_once = "" if parts == 1 else f", computed in {parts} parts"
    lr = "found by a range test" if math.isnan(plan.lr) else f"{plan.lr:.2e}"
    student, teacher = (
        [sum(p.numel() for p in part.parameters()) / 1e6 for part in (n.backbone, n.head)]
        for n in (module.student, module.teacher)
    )
    numbers = flat(plan.objective.derived())
    derived = ", ".join(f"{key} {value}" for key, value in numbers if key != "ema")
    shapes = view_shapes(augment, batch, module.student.backbone.architecture["in_chans"])
    crops = " + ".join(f"{shape[0]} x {shape[-1]}" for shape in shapes)
    say(
        f"{run_dir}: a plan, nothing is started",
        f"  data         {HydraConfig.get().runtime.choices['data']}, {plan.num_images:,} images; "
        + (f"evaluated on {pair.name}" if pair else NO_LABELS),
        f"  steps        {plan.total_steps:,} of {settings.batch_size} images, "
        f"{plan.steps_per_epoch:.1f} an epoch, {epochs_of(settings, plan):.4g} epochs",
        *(["               " + BUDGET_PLAN.format(settings.budget)] if settings.budget else []),
        f"  lr           {lr} after {plan.warmup_steps:,} steps of warm-up",
        f"  devices      {trainer.world_size} x {device.type}, {batch} images each{at_once}; "
        f"{settings.trainer.precision}",
        f"  crops        {crops} pixels",
        f"  objective    {type(plan.objective).__name__}: {plan.objective.described()}",
        *([f"               {derived}"] if derived else []),
        f"  parameters   {model_name(module.student.backbone.architecture)} {student[0]:.1f} M, "
        f"head {student[1]:.1f} M; teacher {teacher[0]:.1f} M, {teacher[1]:.1f} M",
    )
    try:
        memory = step_memory(
            module, shapes, device, str(settings.trainer.precision), trainer.world_size
        )
    except Exception as error:  # of an objective that has no fake tensors
        log.warning("memory cannot be computed for this step: %s: %s", type(error).__name__, error)
    else:
        show_memory(settings, trainer, memory, batch)
        show_disk(trainer, plan, checkpoint_bytes(module, memory), run_dir)
    say("to start it: the same command without plan=true")


def show_memory(
    settings: PretrainSettings, trainer: lightning.Trainer, memory: StepMemory, batch: int
) -> None:
    """What a step needs, and whether the device has it."""
    device = trainer.strategy.root_device
    on_cpu = device.type == "cpu"
    names = ("networks", "optimizer", "batch", "gradients and activations")
    words = ", ".join(f"{n} {b / 1e9:.2f}" for n, b in zip(names, memory, strict=True))
    uncompiled = ", not compiled" if settings.compile else ""
    needed, total = memory.total, memory_of(device)
    say(f"  memory       {memory.total / 1e9:.2f} GB a step{uncompiled}: {words}")
    if on_cpu:  # all ranks share it, and the process is in it as well
        needed = trainer.world_size * (memory.total + resident_bytes())
        beside = f"with the process itself {needed / 1e9:.2f} GB"
    else:
        beside = "CUDA's context comes to it"
    verdict = "fits" if needed < total else "does not fit"
    say(f"               {beside}; {total / 1e9:.1f} GB of this device: {verdict}")
    if needed >= total:
        advice = remedies(batch, settings.trainer.accumulate, "augment.global_size")
        log.warning("a step does not fit: %s", advice)


def show_disk(trainer: lightning.Trainer, plan: Plan, checkpoint: int, run_dir: Path) -> None:
    """What the checkpoints of the whole run take."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saving = next(c for c in callbacks if isinstance(c, SaveCheckpoints))
    kept = min(saving.keep_last, -(-plan.total_steps // saving.every_steps))
    kept += sum(getattr(callback, "best", None) is not None for callback in callbacks)
    if saving.milestone_every is not None:
        kept += plan.total_steps // saving.milestone_every
    place = next(path for path in run_dir.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    say(
        f"  disk         {checkpoint / 1e6:.0f} MB a checkpoint, {kept} stay: "
        f"{kept * checkpoint / 1e6:,.0f} MB, and one more while it is written; "
        f"{free / 1e9:.1f} GB free in {place}"
    )


def epochs_of(settings: PretrainSettings, plan: Plan) -> float:
    """Passes over the images, as given or as the steps come to."""
    given = settings.budget is None and settings.max_steps is None
    return settings.epochs if given else plan.total_steps / plan.steps_per_epoch


def baselines_made_with(settings: PretrainSettings, digests: Mapping[str, str]) -> dict[str, Any]:
    """What decides what the baselines have."""
    made_with = {"evaluation": settings.evaluation, "data_sha256": dict(digests)}
    plain: dict[str, Any] = json.loads(json.dumps({"made_with": made_with}, default=str))
    return plain


def baselines_before(settings: PretrainSettings, run_dir: Path) -> dict[str, Any]:
    """Numbers of the baselines that were measured before the run, with the same evaluation."""
    if settings.budget is None:
        return {}
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        before = json.loads((run_dir / BASELINES).read_text())
    now = baselines_made_with(settings, about_run(run_dir).get("data_sha256") or {})
    same = before.pop("made_with", None) == now["made_with"]
    return before if same and before.get("results") else {}


def check_queued(settings: PretrainSettings, num_images: int) -> None:
    """Check what can be checked before a run is queued: batch and budget on so many devices."""
    devices = settings.trainer.devices
    ranks = settings.trainer.num_nodes * (devices if isinstance(devices, int) else 1)
    check_batch(settings, num_images, ranks)
    if settings.budget is not None:
        parse_budget(str(settings.budget))
        budget_on_one_device(ranks)


def found_rate(
    settings: PretrainSettings,
    data: TrainingData[Crops],
    preprocess: Preprocess,
    start: TrainingWeights | None,
    run_dir: Path,
) -> float:
    """The peak learning rate that `optim.lr=auto` stands for, by networks of their own."""
    num_images, optim = len(data.dataset.source), settings.optim
    module = make_module(settings, make_plan(settings, num_images, 1), preprocess, start)
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
        f"({epochs_of(settings, plan):.4g} epochs)"
    )
    say(
        f"  {model_name(backbone.architecture)}, {millions:.1f} M parameters, "
        f"{settings.trainer.precision}"
    )
    if settings.init.ckpt is not None:
        say(f"  {described_start(settings.init, plan.backbone_freeze_steps)}")
    if settings.compile:
        say("  the first step compiles both backbones, which takes minutes")
    say(f"  lr {plan.lr:.2e} after {plan.warmup_steps} steps, {plan.objective.described()}")
    if isinstance(augment, Recipe) and augment.stages:
        say(f"  crops: {augment.described(plan.total_steps)}")
    say(f"  evaluated on {pair.name}" if pair else f"  {NO_LABELS}")
