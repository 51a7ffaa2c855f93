"""What `plan=true` prints: steps, memory and disk of a run that is not started."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig

from ssl_xcit.models.weights import model_name
from ssl_xcit.training.checkpoint import SaveCheckpoints
from ssl_xcit.training.memory import remedies
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.plan import Plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.step_memory import StepMemory, checkpoint_bytes, step_memory, view_shapes
from ssl_xcit.utils.hardware import memory_of, resident_bytes
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import flat

log = logging.getLogger(__name__)
BUDGET_PLAN = "with budget={} as many as fit: measured at the start, here as an example"


def show_plan(
    settings: PretrainSettings,
    trainer: lightning.Trainer,
    plan: Plan,
    module: Pretraining,
    augment: Any,
    evaluated: str,
    run_dir: Path,
) -> None:
    """Print what the run would do and need; `evaluated` says on what."""
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
        f"{evaluated}",
        f"  steps        {plan.total_steps:,} of {settings.batch_size} images, "
        f"{plan.steps_per_epoch:.1f} an epoch, {plan.epochs(settings):.4g} epochs",
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
    uncompiled = ", not compiled" if settings.compile is True else ""
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
