"""One DINO training step, top to bottom (arXiv:2104.14294, algorithm 1)."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_xcit.data.order import step_seed
from ssl_xcit.errors import UserError
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.dino import Center, prototype_loss
from ssl_xcit.training.ema import ema_update_
from ssl_xcit.training.optim import clip_each_, parameter_groups

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Schedules:
    """What changes with the optimizer step, each a pure function of it."""

    lr: Schedule
    weight_decay: Schedule
    ema: Schedule
    teacher_temp: Schedule


class Network(nn.Module):
    """A backbone (B, in_chans, H, W) -> (B, C) and a projection head (..., C) -> (..., D), whose
    prototypes take D to K logits.
    """

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

    def forward(self, views: list[Float[Tensor, "_ B ..."]]) -> Float[Tensor, "V B D"]:
        """What the prototypes are compared with, for all views: one pass of the backbone a
        resolution, one of the head over all.
        """
        run = self.compiled or self.backbone
        embeddings = [run(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for v in views]
        return self.head.embed(torch.cat(embeddings))


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

    def training_step(self, views: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step on `views`: a (V, B, in_chans, h, w) tensor a resolution, the global
        views first.
        """
        step = self.global_step
        optimizer: Any = self.optimizers()
        lr, weight_decay = self.schedules.lr(step), self.schedules.weight_decay(step)
        for group, decayed in zip(optimizer.param_groups, (True, False), strict=True):
            group["lr"] = lr
            group["weight_decay"] = weight_decay if decayed else 0.0
        seed_stochastic_depth(step_seed(self.seed, self.global_rank, step), self.device)

        with torch.no_grad():
            teacher_logits = self.teacher.head.last_layer(self.teacher(views[:1]))  # (2, B, K)
        targets = self.center.targets(teacher_logits, self.schedules.teacher_temp(step))
        prototypes = self.student.head.last_layer
        loss = prototype_loss(
            self.student(views),
            prototypes.weight_v,
            prototypes.weight_g,
            targets,
            self.student_temp,
        )
        bad = not torch.isfinite(loss)
        if self.trainer.world_size > 1:  # one rank alone must not leave the others waiting
            bad = self.trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: lower optim.lr (now {lr:.2e}), "
                "or train "
                "in float32 (trainer.precision=32-true)"
            )

        optimizer.zero_grad()
        self.manual_backward(loss)
        grad_norm = clip_each_(self.student.parameters(), self.clip_norm)
        if step < self.freeze_steps:
            prototypes.zero_grad(set_to_none=True)
        optimizer.step()
        self.center.update_(teacher_logits)
        ema_update_(self.teacher, self.student, self.schedules.ema(step))
        return {"loss": loss.detach(), "grad_norm": grad_norm, "targets": targets}

    def configure_optimizers(self) -> Optimizer:
        """Biases and one-dimensional parameters are not decayed; lr and decay are set each step."""
        return self.make_optimizer(parameter_groups(self.student))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Enough to build the backbone again and to feed it, as plain data."""
        checkpoint["architecture"] = dict(self.student.backbone.architecture)
        checkpoint["preprocess"] = dict(self.student.backbone.preprocess)


def make_networks(
    backbone: XCiT, head: DINOHead, teacher_backbone: XCiT
) -> tuple[Network, Network]:
    """(student, teacher); the teacher's head is a copy."""
    return Network(backbone, head), Network(teacher_backbone, deepcopy(head))


def seed_stochastic_depth(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from on this device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
