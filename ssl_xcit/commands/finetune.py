"""The command `finetune`: labelled images and a backbone to a classifier, segmenter or detector."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from ssl_xcit.models.devices import prepare_cpu
from ssl_xcit.models.weights import model_name
from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.plan import RunPlan
from ssl_xcit.training.run_dir import (
    check_same_data,
    check_same_run,
    disk_trouble,
    is_begun,
    kernels_of,
    last_row,
    locked,
    moved_run,
    run_id_of,
    versions,
)
from ssl_xcit.training.run_name import SMALL_MODEL, run_name
from ssl_xcit.training.session import (
    is_finished,
    leave_report,
    run_to_the_end,
    submit_run,
    submits,
    train,
)
from ssl_xcit.training.settings import FinetuneSettings
from ssl_xcit.training.trainer import make_trainer, runs_on_cpu
from ssl_xcit.transfer.build import make_augment, make_task, make_transfer, make_transfer_plan
from ssl_xcit.transfer.checks import check_transfer
from ssl_xcit.transfer.dataset import TransferDataset, collate, transfer_indices, with_fraction
from ssl_xcit.transfer.evaluate import bad_images_words, evaluate
from ssl_xcit.transfer.init_weights import read_start
from ssl_xcit.transfer.module import Transfer
from ssl_xcit.transfer.task import TransferData
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import default_workers, precision_for
from ssl_xcit.utils.tables import print_table, shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import as_plain

DETAILS = "evaluation.json"


def main(settings: FinetuneSettings) -> Path:
    """`ssl-xcit finetune`: whatever can be wrong is found before the run folder is made, which is
    returned.
    """
    precision = precision_for(str(settings.trainer.precision), runs_on_cpu(settings.trainer))
    settings = replace(settings, trainer=replace(settings.trainer, precision=precision))
    goes_without_saying = ("transfer=", "experiment=builtin_", f"model={SMALL_MODEL}")
    words = [w for w in HydraConfig.get().overrides.task if not w.startswith(goes_without_saying)]
    run_dir = Path(str(settings.out)) / str(settings.name or run_name(settings.transfer, words))
    settings, start, recorded = read_start(settings, run_dir)
    if not submits(settings):  # where it is queued, precision=auto may mean another one
        check_same_run(as_plain(settings), run_dir)
    data: TransferData = instantiate(settings.data.source)
    preprocess = instantiate(settings.preprocess)
    preprocess.statistics()
    indices = transfer_indices(data)
    moved = None
    if not settings.name and not is_begun(run_dir):
        moved = moved_run(as_plain(settings), indices)
    if moved is not None:
        run_dir = moved
        settings, start, recorded = read_start(settings, moved)
    go_on = settings.resume.data == "changed"
    record = check_same_data(run_dir, indices, preprocess, go_on)
    if is_finished(run_dir, finish):
        return run_dir
    settings = replace(settings, run_id=settings.run_id or run_id_of(run_dir))
    check_transfer(data, preprocess)
    augment = make_augment(settings, preprocess)
    chosen = with_fraction(data.train, settings.label_fraction, settings.seed)
    if submits(settings):
        submit_run(settings, run_dir)
        return run_dir
    trainer, stop = make_trainer(settings, run_dir, str(settings.run_id), indices)
    plan = make_transfer_plan(settings, len(chosen.images), trainer.world_size)
    task = make_task(settings, start, chosen, preprocess, recorded)
    task.measure()  # needs libraries of its own, which are missed now or after training
    module = make_transfer(settings, plan, task)
    if runs_on_cpu(settings.trainer):
        prepare_cpu(module, kernels_of(run_dir))
    workers = settings.num_workers
    with locked(run_dir, wanted=trainer.is_global_zero):
        if trainer.is_global_zero and is_finished(run_dir, finish):  # meanwhile
            return run_dir
        batches = TrainingData(
            TransferDataset(chosen, augment, settings.seed, preprocess, settings.repeats),
            collate,
            lambda batch: batch,
            plan.per_device_batch,
            plan.total_steps,
            default_workers(trainer.num_devices) if workers is None else workers,
            data.test,
            run_dir,
            settings.data.max_bad_fraction,
            settings.worker_timeout,
        )
        run_to_the_end(
            trainer,
            stop,
            run_dir,
            lambda: train(
                settings, trainer, module, batches, plan, run_dir, record,
                lambda: announce(settings, plan, module, data, run_dir),
            ),
            lambda seconds: conclude(settings, trainer, module, data, plan, run_dir, seconds),
        )  # fmt: skip
    return run_dir


def announce(
    settings: FinetuneSettings, plan: RunPlan, module: Transfer, data: TransferData, run_dir: Path
) -> None:
    """What is about to happen, with the numbers that were derived."""
    backbone = module.task.backbone
    millions, trained = (
        sum(p.numel() for p in module.task.parameters() if p.requires_grad or every) / 1e6
        for every in (True, False)
    )
    frozen = "" if trained == millions else f", {trained:.1f} M of them trained"
    say(f"{run_dir}")
    say(
        f"  {settings.transfer} on {data.name}: {plan.num_images:,} training images, "
        f"{len(data.test.images):,} test images, {len(data.train.class_names)} classes"
    )
    say(
        f"  batch {settings.batch_size}, {plan.total_steps:,} steps ({settings.epochs:g} epochs), "
        f"lr {plan.lr:.2e} after {plan.warmup_steps} steps"
    )
    say(
        f"  {model_name(backbone.architecture)} with its head, {millions:.1f} M parameters{frozen},"
        f" {settings.trainer.precision}"
    )
    start = "starts from scratch"
    if settings.ckpt is not None:
        start = f"starts from {settings.ckpt} ({settings.which})"
    say(f"  {start}")


def conclude(
    settings: FinetuneSettings,
    trainer: lightning.Trainer,
    module: Transfer,
    data: TransferData,
    plan: RunPlan,
    run_dir: Path,
    seconds: float,
) -> None:
    """Measure on all test images, and write `summary.json`: with it the run is finished."""
    measured = evaluate(
        module.evaluated(),
        data.test,
        num_workers=settings.num_workers,
        device=trainer.strategy.root_device,
        max_pixels=settings.preprocess.get("max_pixels"),
        show="testing" if shown_in_terminal() else None,
    )
    summary = {
        "results": {settings.transfer: measured.results},
        "intervals": {settings.transfer: {k: list(v) for k, v in measured.intervals.items()}},
        "data": data.name,
        "model": model_name(module.task.backbone.architecture),
        "transfer": settings.transfer,
        "left_out": measured.details["left_out"],
        "last": last_row(run_dir),
        "seconds": round(seconds, 1),
        "plan": plan.record(),
        "versions": versions(),
    }
    with disk_trouble(run_dir):
        write_json(measured.details, run_dir / DETAILS)
        write_json(summary, run_dir / "summary.json")
    finish(run_dir, summary)
    leave_report(settings, run_dir, str(trainer.strategy.root_device))


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The final numbers, where things are, and what to type next."""
    last = summary["last"]
    if last:
        say(f"{last['step']:.0f} steps, {last['epoch']:.1f} epochs, loss {last['loss']:.3f}")
    title = f"{summary['model']} on {summary['data']}"
    print_table(summary["results"], title, summary.get("intervals"))
    if words := bad_images_words(summary.get("left_out")):
        say(f"{words}; see {DETAILS}")
    say(f"{run_dir}: config.yaml, metrics.csv, checkpoints/, summary.json, {DETAILS}")
    say(f"next: ssl-xcit predict ckpt={run_dir} images=DIR")
