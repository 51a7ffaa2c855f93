"""One step of training a task on labelled images, top to bottom."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ssl_xcit.data.order import step_seed
from ssl_xcit.errors import RunFailed
from ssl_xcit.models.shared_batch_norm import share_batch_norm
from ssl_xcit.training.memory import advice, is_out_of_memory
from ssl_xcit.training.optim import clip_all_
from ssl_xcit.training.step_guard import Diagnosis, StepGuard, seed_step
from ssl_xcit.transfer.dataset import TransferBatch
from ssl_xcit.transfer.task import Task
from ssl_xcit.transfer.weights_ema import weights_ema
from ssl_xcit.utils.validation import BatchNormScope

Schedule = Callable[[int], float]


class TransferOutput(NamedTuple):
    """What a training step leaves for callbacks, in `Transfer.output`."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]  # over all trainable tensors, before clipping
    grad_norms: Float[Tensor, " P"]  # of each
    losses: Mapping[str, Float[Tensor, ""]]  # whose sum the loss is


class Transfer(lightning.LightningModule):
    """A task in training.

    Args:
        task: what is trained.
        groups: its trainable parameters for the optimizer, each group with its `lr_scale`.
        lr: learning rate by step.
        optimizer: makes the optimizer of parameter groups.
        frozen: modules that stay in eval mode: their running statistics do not move.
        clip_norm: largest L2 norm of all gradients together; None: any.
        ema: momentum of an average of the weights, which is `teacher`; None: there is none.
        seed: of stochastic depth, dropout, mixing and sampling.
        accumulate: parts of the batch that are computed one after another: less memory, the same
            gradient but for BatchNorm and for losses that count objects.
        max_skipped: steps in a row with a loss or gradient that is not finite that end the run.
        batch_norm: whose images its statistics are of, see `share_batch_norm`.
    """

    def __init__(
        self,
        task: Task,
        groups: list[dict[str, Any]],
        lr: Schedule,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        frozen: Iterable[nn.Module] = (),
        clip_norm: float | None = None,
        ema: float | None = None,
        seed: int = 0,
        accumulate: int = 1,
        max_skipped: int = 5,
        batch_norm: BatchNormScope = "global",
    ):
        super().__init__()
        assert isinstance(task, nn.Module)
        self.automatic_optimization = False  # the step is written out below
        self.task: Any = task
        self.teacher: AveragedModel | None = None if ema is None else weights_ema(task, ema)
        self.groups = groups
        self.lr = lr
        self.make_optimizer = optimizer
        self.frozen = list(frozen)
        self.clip_norm = clip_norm
        self.seed = seed
        self.accumulate = accumulate
        self.batch_norm: BatchNormScope = batch_norm
        self.guard = StepGuard(self, (task,), max_skipped)
        self.output: TransferOutput | None = None

    def setup(self, stage: str) -> None:
        """Share BatchNorm's statistics between ranks, before the strategy wraps the module."""
        if self.trainer.world_size > 1:
            share_batch_norm(self, self.batch_norm, self.trainer.num_devices)

    def on_train_start(self) -> None:
        """Take the buffers of the network where it is trained; frozen parts do not train."""
        self.guard.begin()
        self.set_modes()

    def set_modes(self) -> None:
        """Train mode, but for what is frozen and for the average."""
        self.task.train()
        for module in (*self.frozen, *([self.teacher] if self.teacher is not None else [])):
            module.eval()

    def training_step(self, batch: TransferBatch, batch_idx: int) -> None:
        """Take one optimizer step. What it leaves is in `output`.

        Raises:
            RunFailed: memory has run out, or BatchNorm has too little; says what to change.
        """
        self.output = None
        try:
            self.output = self.step(batch)
        except Exception as error:
            if "Expected more than 1 value per channel" in str(error):
                raise RunFailed(
                    "BatchNorm needs more than one value a channel, and a part of the batch is too "
                    "small: as a new run, with a larger batch_size, a smaller trainer.accumulate "
                    "or larger images (augment)"
                ) from error
            if not is_out_of_memory(error):
                raise
            size = "smaller images (augment)"
            raise RunFailed(advice(len(batch.images), self.accumulate, size)) from error

    def step(self, batch: TransferBatch) -> TransferOutput:
        """Take a step; where loss or gradient of any rank is not finite only the counts move."""
        step = self.global_step
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step) * group["lr_scale"]
        seed_step(step_seed(self.seed, self.global_rank, step), self.device)
        self.guard.keep()

        optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        parts = batch.parts(self.accumulate)
        for n, (images, targets) in enumerate(parts, start=1):
            share = len(images) / len(batch.images)
            with self.guard.no_sync_if(n < len(parts)):
                of_part = self.task.losses(images, targets)
                self.manual_backward(share * torch.stack(list(of_part.values())).sum())
            for name, value in of_part.items():
                losses[name] = losses.get(name, 0.0) + share * value.detach()
        self.guard.own_loss = torch.stack(list(losses.values())).sum()
        losses = self.guard.mean_losses(losses)
        grad_norms = clip_all_(self.task.parameters(), self.clip_norm)
        loss = torch.stack(list(losses.values())).sum()
        output = TransferOutput(loss, grad_norms.norm(), grad_norms, losses)
        if not self.guard.is_finite(output):
            self.guard.skip(step, optimizer, output, Diagnosis(self.task, self.lr(step), {}))
            return output

        optimizer.step()
        if self.teacher is not None:
            self.teacher.update_parameters(self.task)
        return output

    def evaluated(self) -> Task:
        """The average where there is one, else the task."""
        task: Any = self.task if self.teacher is None else self.teacher.module
        return cast(Task, task)

    def report(self, step: int) -> dict[str, float]:
        """Values for the log after so many steps."""
        assert self.output is not None
        losses = {
            f"loss_{name.removeprefix('loss_')}": loss.item()
            for name, loss in self.output.losses.items()
        }
        return {**(losses if len(losses) > 1 else {}), "lr": self.lr(step - 1)}

    def configure_optimizers(self) -> Optimizer:
        """The learning rate is set each step."""
        return self.make_optimizer(self.groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Enough to build the task again and to feed it, as plain data."""
        checkpoint["architecture"] = dict(self.task.backbone.architecture)
        checkpoint["preprocess"] = dict(self.task.backbone.preprocess)
        checkpoint["transfer"] = {
            "kind": self.task.kind,
            "class_names": list(self.task.class_names),
            "settings": dict(self.task.settings),
        }
        self.guard.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts go on; what makes sums come out otherwise is said."""
        self.guard.load(checkpoint)
