"""One DINO training step, top to bottom (arXiv:2104.14294, algorithm 1)."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_xcit.data.order import step_seed
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.dino import Center, prototype_loss
from ssl_xcit.training.memory import advice, is_out_of_memory
from ssl_xcit.training.optim import clip_each_, ema_update_, parameter_groups
from ssl_xcit.training.step_guard import Diagnosis, StepGuard, seed_step

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Schedules:
    """What changes with the optimizer step, each a pure function of it."""

    lr: Schedule
    weight_decay: Schedule
    ema: Schedule
    teacher_temp: Schedule
    backbone: Schedule | None = None  # share of the learning rate that it gets; at 0 it stays


class Network(nn.Module):
    """Backbone (B, in_chans, H, W) -> (B, C) and head (..., C) -> (..., D); prototypes: D to K."""

    def __init__(self, backbone: XCiT, head: DINOHead):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.compiled: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy runs its own backbone, not compiled."""
        return {**self.__dict__, "compiled": None}

    def compile_backbone(self, fullgraph: bool = True) -> None:
        """Run the backbone's training passes as compiled programs, one a resolution; evaluation,
        with its many batch sizes, takes the backbone as it is.
        """
        self.compiled = torch.compile(self.backbone.forward, dynamic=False, fullgraph=fullgraph)

    def features(self, views: list[Float[Tensor, "_ B ..."]]) -> Float[Tensor, "V B C"]:
        """Of the backbone, for all views: one pass a resolution."""
        run = self.compiled or self.backbone
        return concatenated([run(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for v in views], dim=0)

    def forward(self, views: list[Float[Tensor, "_ B ..."]]) -> Float[Tensor, "V B D"]:
        """What the prototypes are compared with, for all views: one pass of the head over all."""
        return self.head.embed(self.features(views))


class StepOutput(NamedTuple):
    """What a training step leaves for callbacks, in `DINO.output`."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]  # over all trainable tensors, before clipping
    grad_norms: Float[Tensor, " P"]  # of each
    targets: Float[Tensor, "G B K"]
    features: Float[Tensor, "G B C"]  # of the teacher's backbone


class HealthMonitor(Protocol):
    """What judges a run; `training.health.Health` puts itself into `DINO.health`."""

    verdict: str

    def report(self, module: Any, step: int) -> dict[str, float]:
        """Values for the log, by name."""
        ...


class MicrobatchOutput(NamedTuple):
    """What forward and backward of a part of the batch leave."""

    loss: Float[Tensor, ""]  # times the part's share
    teacher_logits: Float[Tensor, "G B K"]
    targets: Float[Tensor, "G B K"]
    features: Float[Tensor, "G B C"]  # of the teacher's backbone


def concatenated(parts: list[Tensor], dim: int = 1) -> Tensor:
    """Concatenated; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class DINO(lightning.LightningModule):
    """A student and its momentum teacher.

    Args:
        student: the network that is trained; its backbone may drop paths.
        teacher: the same shape without drop path; takes the student's weights at the start.
        num_prototypes: K.
        schedules: learning rate, weight decay, EMA momentum and teacher temperature by step.
        optimizer: makes the optimizer of parameter groups.
        student_temp: the student's softmax temperature.
        center_momentum: see `Center`.
        clip_norm: largest L2 norm of each parameter's gradient.
        freeze_steps: first steps in which the prototypes keep their place.
        seed: of stochastic depth.
        accumulate: parts of the batch that are computed one after another: less memory, the same
            gradient but for BatchNorm, which sees a part at a time.
        max_skipped: steps in a row with a loss or gradient that is not finite that end the run.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        num_prototypes: int,
        schedules: Schedules,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        clip_norm: float = 3.0,
        freeze_steps: int = 0,
        seed: int = 0,
        accumulate: int = 1,
        max_skipped: int = 5,
    ):
        super().__init__()
        if not student_temp > 0.0:
            raise UserError(f"student_temp={student_temp}: above 0; the paper has 0.1")
        self.automatic_optimization = False  # the step is written out below
        self.student = student
        self.teacher = teacher
        self.teacher.load_state_dict(student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = Center(num_prototypes, center_momentum)
        self.schedules = schedules
        self.make_optimizer = optimizer
        self.student_temp = student_temp
        self.clip_norm = clip_norm
        self.freeze_steps = freeze_steps
        self.seed = seed
        self.accumulate = accumulate
        self.guard = StepGuard(self, (student, teacher), max_skipped)
        self.output: StepOutput | None = None
        self.health: HealthMonitor | None = None

    def on_train_start(self) -> None:
        """Take the buffers of the networks where they are trained."""
        self.guard.begin()

    def training_step(self, views: list[Tensor], batch_idx: int) -> None:
        """Take one optimizer step on `views`: a (V, B, in_chans, h, w) tensor a resolution, the
        global views first. What it leaves is in `output`.

        Raises:
            RunFailed: memory has run out; says what to change.
        """
        self.output = None
        try:
            self.output = self.step(views)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = "augment.global_size"
            raise RunFailed(advice(views[0].shape[1], self.accumulate, size)) from error

    def step(self, views: list[Tensor]) -> StepOutput:
        """Take a step; where loss or gradient of any rank is not finite only the counts move."""
        step = self.global_step
        optimizer: Any = self.optimizers()
        lr, weight_decay = self.schedules.lr(step), self.schedules.weight_decay(step)
        released = 1.0 if self.schedules.backbone is None else self.schedules.backbone(step)
        shares = (1.0, 1.0) if self.schedules.backbone is None else (released, released, 1.0, 1.0)
        decays = (weight_decay, 0.0) * (len(shares) // 2)
        for group, share, decay in zip(optimizer.param_groups, shares, decays, strict=True):
            group["lr"] = lr * share
            group["weight_decay"] = decay
        seed_step(step_seed(self.seed, self.global_rank, step), self.device)
        self.guard.keep()

        optimizer.zero_grad()
        parts = list(zip(*(v.chunk(self.accumulate, dim=1) for v in views), strict=True))
        outputs = []
        for n, part in enumerate(parts, start=1):
            share = part[0].shape[1] / views[0].shape[1]
            with self.guard.no_sync_if(n < len(parts)):
                outputs.append(self.forward_backward(list(part), step, share, released == 0.0))
        loss = torch.stack([part.loss for part in outputs]).sum()
        teacher_logits = concatenated([part.teacher_logits for part in outputs])
        targets = concatenated([part.targets for part in outputs])
        features = concatenated([part.features for part in outputs])
        if released == 0.0:  # no gradient, so no moments and no decay either
            self.student.backbone.zero_grad(set_to_none=True)
        grad_norms = clip_each_(self.student.parameters(), self.clip_norm)
        output = StepOutput(loss, grad_norms.norm(), grad_norms, targets, features)
        if not self.guard.is_finite(output):
            values = {
                "weight_decay": weight_decay,
                "teacher_temp": self.schedules.teacher_temp(step),
            }
            self.guard.skip(step, optimizer, output, Diagnosis(self.student, lr, values))
            return output

        if step < self.freeze_steps:
            self.student.head.last_layer.zero_grad(set_to_none=True)
        optimizer.step()
        self.center.update_(teacher_logits)
        ema_update_(self.teacher, self.student, self.schedules.ema(step))
        return output

    def forward_backward(
        self, views: list[Tensor], step: int, share: float, frozen: bool = False
    ) -> MicrobatchOutput:
        """Forward and backward of a part of the batch, `share` of it; not through a frozen
        backbone, unless ranks exchange all gradients.
        """
        with torch.no_grad():
            features = self.teacher.features(views[:1])  # (2, B, C)
            teacher_logits = self.teacher.head(features)  # (2, B, K)
        targets = self.center.targets(teacher_logits, self.schedules.teacher_temp(step))
        prototypes = self.student.head.last_layer
        with torch.set_grad_enabled(not frozen or self.trainer.world_size > 1):
            seen = self.student.features(views)
        loss = share * prototype_loss(
            self.student.head.embed(seen),
            prototypes.weight_v,
            prototypes.weight_g,
            targets,
            self.student_temp,
        )
        self.manual_backward(loss)
        return MicrobatchOutput(loss.detach(), teacher_logits, targets, features)

    def report(self, step: int) -> dict[str, float]:
        """Values for the log after so many steps."""
        return {
            **(self.health.report(self, step) if self.health else {}),
            "lr": self.schedules.lr(step - 1),
            "weight_decay": self.schedules.weight_decay(step - 1),
            "ema": self.schedules.ema(step - 1),
            "teacher_temp": self.schedules.teacher_temp(step - 1),
        }

    def configure_optimizers(self) -> Optimizer:
        """Biases and one-dimensional parameters are not decayed; lr and decay are set each step. A
        backbone that starts from weights has groups of its own.
        """
        if self.schedules.backbone is None:
            return self.make_optimizer(parameter_groups(self.student))
        parts = (self.student.backbone, self.student.head)
        return self.make_optimizer([group for part in parts for group in parameter_groups(part)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Enough to build the backbone again and to feed it, as plain data."""
        checkpoint["architecture"] = dict(self.student.backbone.architecture)
        checkpoint["preprocess"] = dict(self.student.backbone.preprocess)
        self.guard.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts go on; what makes sums come out otherwise is said."""
        self.guard.load(checkpoint)


def make_networks(
    backbone: XCiT, head: DINOHead, teacher_backbone: XCiT
) -> tuple[Network, Network]:
    """(student, teacher); the teacher's head is a copy."""
    return Network(backbone, head), Network(teacher_backbone, deepcopy(head))
