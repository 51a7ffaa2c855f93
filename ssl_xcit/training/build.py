"""Build student, teacher and schedules of a run (learning rate, weight decay, EMA)."""

from typing import Literal

import torch
from hydra.utils import instantiate

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.models.devices import prepare_cpu
from ssl_xcit.models.weights import TrainingWeights
from ssl_xcit.training.init_weights import start_backbone, start_head, start_state
from ssl_xcit.training.module import Pretraining, Schedules, make_networks
from ssl_xcit.training.plan import Plan
from ssl_xcit.training.schedules import BackboneUnfreezeSchedule, Cosine
from ssl_xcit.training.settings import OptimSettings, PretrainSettings
from ssl_xcit.training.step_memory import networks_of


def make_module(
    settings: PretrainSettings,
    plan: Plan,
    preprocess: Preprocess,
    start: TrainingWeights | None = None,
) -> Pretraining:
    """Student, teacher, schedules; fresh weights by `seed`, but for those to start from."""
    torch.manual_seed(settings.seed)
    backbone = instantiate(settings.model)
    head = plan.objective.make_head(backbone.embed_dim)
    in_chans = backbone.architecture["in_chans"]
    if in_chans != preprocess.channels:
        raise UserError(
            f"model.in_chans={in_chans} and preprocess.channels={preprocess.channels}: set "
            "model.in_chans alone, the other follows"
        )
    if start is not None:
        start_backbone(backbone, start, preprocess, str(settings.init.ckpt))
        if settings.init.head == "kept":
            start_head(head, start, str(settings.init.ckpt))
    student, teacher = make_networks(backbone, head, instantiate(settings.model, drop_path=0.0))
    for network in (student, teacher):
        network.backbone.preprocess = preprocess.of_weights()
        network.backbone.checkpoint_blocks = settings.checkpoint_blocks
    module = Pretraining(
        student,
        teacher,
        plan.objective,
        make_schedules(settings.optim, plan),
        instantiate(settings.optim.optimizer),
        seed=settings.seed,
        accumulate=settings.trainer.accumulate,
        max_skipped=settings.max_skipped,
        batch_norm=settings.trainer.batch_norm,
    )
    if start is not None and settings.init.head == "kept":
        start_state(plan.objective, start)
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:  # torch's own words on its arguments
        raise UserError(f"optim.optimizer: {error}") from error
    return module


def accelerate_(
    module: Pretraining,
    compiled: bool | Literal["auto"],
    num_ranks: int = 1,
    kernels: bool | None = None,
) -> None:
    """Let networks run by the kernels of this machine's CPU (`auto`; `kernels`: see `prepare_cpu`),
    as programs of `torch.compile` (True), or as they are. SharedBatchNorm, which several ranks
    have, breaks a program in two.
    """
    if compiled == "auto":
        for network in networks_of(module):
            prepare_cpu(network, kernels)
    elif compiled:
        for network in (module.student, module.teacher):
            network.compile_backbone(module.objective.takes_patches, num_ranks == 1)


def make_schedules(optim: OptimSettings, plan: Plan) -> Schedules:
    """What changes with the step, over the whole run. A rate that was found may lie below the ends
    that were set.
    """
    ends = (optim.min_lr, optim.warmup_start)
    last, first = (min(end, plan.lr) if optim.lr == "auto" else end for end in ends)
    return Schedules(
        lr=Cosine(plan.lr, last, plan.total_steps, plan.warmup_steps, first),
        weight_decay=Cosine(optim.weight_decay, optim.weight_decay_end, plan.total_steps),
        ema=Cosine(plan.objective.ema, 1.0, plan.total_steps),
        backbone=BackboneUnfreezeSchedule(plan.backbone_freeze_steps, plan.warmup_steps)
        if plan.backbone_freeze_steps
        else None,
    )
