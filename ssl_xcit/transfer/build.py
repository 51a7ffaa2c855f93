"""Build a task in training from settings, images and weights to start from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.init_weights import warn_read_otherwise
from ssl_xcit.training.plan import RunPlan, check_batch
from ssl_xcit.training.settings import FinetuneSettings
from ssl_xcit.transfer.backbone import with_layers
from ssl_xcit.transfer.dataset import part_sizes
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.module import Transfer
from ssl_xcit.transfer.param_groups import freeze, transfer_groups
from ssl_xcit.transfer.task import AnnotatedSource, Augment, Task


def make_transfer_plan(settings: FinetuneSettings, num_images: int, world_size: int) -> RunPlan:
    """Steps and learning rate of a run on so many images.

    Raises:
        UserError: a batch larger than the data, or that the devices do not divide.
    """
    check_batch(settings, num_images, world_size)
    optim, batch_size = settings.optim, settings.batch_size
    steps_per_epoch = num_images / batch_size
    total_steps = max(1, int(settings.epochs * steps_per_epoch))
    scale = batch_size / optim.reference_batch if optim.reference_batch else 1.0
    warmup = min(optim.warmup_epochs * steps_per_epoch, optim.max_warmup * total_steps)
    return RunPlan(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        per_device_batch=batch_size // world_size,
        lr=optim.lr * scale,
        warmup_steps=round(warmup),
    )


def make_task(
    settings: FinetuneSettings,
    start: XCiT | None,
    train: AnnotatedSource,
    preprocess: Preprocess,
    recorded: Mapping[str, Any] | None = None,
) -> Task:
    """A backbone, from `start` or fresh by `seed`, with the head of the task.

    Args:
        settings: name the task and the model.
        start: weights to start from.
        train: names the classes; its labels may be counted.
        preprocess: of the images.
        recorded: what the checkpoint of a run that goes on says of its task.

    Raises:
        UserError: weights of another architecture than the model or of other channels.
    """
    torch.manual_seed(settings.seed)
    if start is None:
        if settings.model is None:
            raise UserError(
                "ckpt=null trains from scratch, and then model=NAME is needed, such as "
                "model=xcit_tiny_12_p16"
            )
        start = instantiate(settings.model)
    elif settings.model is not None:
        check_architecture(start, instantiate(settings.model), str(settings.ckpt))
    in_chans = start.architecture["in_chans"]
    if in_chans != preprocess.channels:
        raise UserError(
            f"the backbone takes images of {in_chans} channels, and preprocess.channels="
            f"{preprocess.channels}: set preprocess.channels={in_chans}"
        )
    pyramid = KINDS[settings.transfer].pyramid
    backbone = with_layers(
        start,
        pyramid=pyramid,
        num_classes=0 if pyramid else len(train.class_names),
        drop_path=settings.drop_path,
    )
    if pyramid:  # what the pyramid does not use is not trained
        for unused in (backbone.cls_attn_blocks, backbone.norm):
            unused.requires_grad_(False)
        backbone.cls_token.requires_grad_(False)
    if settings.ckpt is not None and recorded is None:
        warn_read_otherwise(f"ckpt={settings.ckpt}", start, preprocess)
    backbone.preprocess = preprocess.of_weights()
    backbone.checkpoint_blocks = settings.checkpoint_blocks
    task: Any = instantiate(settings.task)(backbone, tuple(train.class_names))
    if recorded is not None and list(task.class_names) != recorded["class_names"]:
        raise UserError(
            f"the run was begun with the classes {', '.join(recorded['class_names'][:5])}, ...; "
            f"these images have {', '.join(task.class_names[:5])}, ...: take another name=..."
        )
    begin: Callable[[AnnotatedSource], None] | None = getattr(task, "before_training", None)
    if begin is not None:
        task.settings |= {
            k: v for k, v in (recorded or {}).get("settings", {}).items() if k.endswith("sha256")
        }
        begin(train)
    return task


def make_augment(settings: FinetuneSettings, preprocess: Preprocess) -> Augment:
    """The augmentation of training images that are read like this.

    Raises:
        UserError: it does not take such images.
    """
    augment: Augment = instantiate(settings.augment)
    fitted: Callable[[Preprocess], Augment] | None = getattr(augment, "fitted_to", None)
    return augment if fitted is None else fitted(preprocess)


def check_architecture(start: XCiT, model: XCiT, ckpt: str) -> None:
    """Raise UserError where the weights are not of the model that is named beside them."""
    own = ("layer_scale", "num_classes", "pyramid")
    there, here = (
        {k: v for k, v in x.architecture.items() if k not in own} for x in (start, model)
    )
    if there != here:
        raise UserError(
            f"ckpt={ckpt} holds {model_name(start.architecture)}, and the model is "
            f"{model_name(model.architecture)}: drop model=... to take what the file holds"
        )


def lowest(schedule: Mapping[str, Any], peak: float) -> dict[str, float]:
    """The end of a schedule that has one, at most the peak."""
    return {"end": min(float(schedule["end"]), peak)} if "end" in schedule else {}


def make_transfer(settings: FinetuneSettings, plan: RunPlan, task: Task) -> Transfer:
    """The task in training.

    Raises:
        UserError: the optimizer does not take its settings, or a part of the batch has fewer images
            than the task needs.
    """
    check: Callable[[int], None] | None = getattr(task, "check_batch", None)
    if check is not None:
        check(part_sizes(plan.per_device_batch, settings.trainer.accumulate)[-1])
    optim = settings.optim
    optimizer = instantiate(optim.optimizer)
    frozen: list[nn.Module] = freeze(task, settings.freeze)
    decay = float(optim.optimizer.get("weight_decay", 0.0))
    module = Transfer(
        task,
        transfer_groups(task, decay, optim.layer_decay, optim.no_decay),
        instantiate(optim.schedule, **lowest(optim.schedule, plan.lr))(
            start=plan.lr,
            total_steps=plan.total_steps,
            warmup_steps=plan.warmup_steps,
            warmup_start=optim.warmup_start,
        ),
        optimizer,
        frozen,
        optim.clip_norm,
        settings.ema,
        settings.seed,
        settings.trainer.accumulate,
        settings.max_skipped,
        settings.trainer.batch_norm,
    )
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:  # torch's own words on its arguments
        raise UserError(f"optim.optimizer: {error}") from error
    return module
