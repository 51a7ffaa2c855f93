"""One step of pretraining, top to bottom: a student, its momentum teacher and an objective."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_xcit.data.order import depth_seed, step_seed
from ssl_xcit.errors import RunFailed
from ssl_xcit.models.layers import computing
from ssl_xcit.models.shared_batch_norm import share_batch_norm
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.objective import Embedded, Objective, PatchMask, Signs, concatenated
from ssl_xcit.training.memory import advice, is_out_of_memory
from ssl_xcit.training.optim import (
    clip_all_,
    clip_each_,
    copy_buffers_,
    ema_update_,
    parameter_groups,
)
from ssl_xcit.training.pace import Timeline
from ssl_xcit.training.step_guard import Diagnosis, StepGuard, seed_step
from ssl_xcit.utils.ranks import BatchPart
from ssl_xcit.utils.validation import BatchNormScope

Schedule = Callable[[float], float]
MOST_PROGRAMS = 64  # of a compiled backbone, one a shape


@dataclass(frozen=True)
class Schedules:
    """What changes with the optimizer step, each a pure function of it."""

    lr: Schedule
    weight_decay: Schedule
    ema: Schedule
    backbone: Schedule | None = None  # share of the learning rate that it gets; at 0 it stays


class Network(nn.Module):
    """Backbone (B, in_chans, H, W) -> (B, C), and the head that the objective made for it."""

    def __init__(self, backbone: XCiT, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.compiled: Callable[[Tensor], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy runs its own backbone, not compiled."""
        return {**self.__dict__, "compiled": None}

    def compile_backbone(self, patches: bool = False, fullgraph: bool = True) -> None:
        """Run the backbone's training passes, with or without patch tokens, as compiled programs,
        one a resolution; evaluation, with its many batch sizes, takes the backbone as it is.
        """
        run = self.backbone.forward_features if patches else self.backbone.forward
        config: Any = torch._dynamo.config  # stages of crops and uneven parts of a batch have many
        config.recompile_limit = max(config.recompile_limit, MOST_PROGRAMS)
        self.compiled = torch.compile(run, dynamic=False, fullgraph=fullgraph)

    def embedded(
        self,
        views: list[Float[Tensor, "_ B ..."]],
        patches: bool = False,
        mask: PatchMask | None = None,
        mask_token: Float[Tensor, " C"] | None = None,
    ) -> Embedded:
        """What the backbone makes of all views: one pass a resolution. Of the global views, which
        are the first, patches may be masked.
        """
        counts = [v.shape[:2] for v in views]
        if not patches:
            run = self.compiled or self.backbone
            made = [
                run(v.flatten(0, 1)).unflatten(0, n) for v, n in zip(views, counts, strict=True)
            ]
            return Embedded(concatenated(made, dim=0))
        run = self.compiled or self.backbone.forward_features
        masks: list[tuple[Any, ...]] = [() for _ in views]
        if mask is not None:
            masks[0] = (mask.masked.flatten(0, 1), mask_token, mask.exclude)
        features = [run(v.flatten(0, 1), *m) for v, m in zip(views, masks, strict=True)]
        return Embedded(
            concatenated([f.cls.unflatten(0, n) for f, n in zip(features, counts, strict=True)], 0),
            tuple(f.patches.unflatten(0, n) for f, n in zip(features, counts, strict=True)),
        )


class StepOutput(NamedTuple):
    """What a training step leaves for callbacks, in `Pretraining.output`."""

    loss: Float[Tensor, ""]  # mean over ranks
    grad_norm: Float[Tensor, ""]  # over all trainable tensors, before clipping
    grad_norms: Float[Tensor, " P"]  # of each
    losses: Mapping[str, Float[Tensor, ""]]  # parts of the loss, where it has some
    signs: Signs
    features: Float[Tensor, "G B C"]  # of the teacher's backbone, or else the student's


class HealthMonitor(Protocol):
    """What judges a run; `training.health.Health` puts itself into `Pretraining.health`."""

    verdict: str

    def report(self, module: Any, step: int) -> dict[str, float]:
        """Values for the log, by name."""
        ...


class MicrobatchOutput(NamedTuple):
    """What forward and backward of a part of the batch leave."""

    loss: Float[Tensor, ""]  # times the part's share
    losses: Mapping[str, Float[Tensor, ""]]  # its parts, likewise
    targets: Any  # of the objective
    features: Float[Tensor, "G B C"]  # of the teacher's backbone, or else the student's


class Pretraining(lightning.LightningModule):
    """A student and its momentum teacher.

    Args:
        student: the network that is trained; its backbone may drop paths.
        teacher: the same shape without drop path; takes the student's weights at the start.
        objective: what is learnt.
        schedules: learning rate, weight decay and EMA momentum by step.
        optimizer: makes the optimizer of parameter groups.
        seed: of stochastic depth.
        accumulate: parts of the batch that are computed one after another: less memory, the same
            gradient but for what compares images: BatchNorm, and losses between images.
        max_skipped: steps in a row with a loss or gradient that is not finite that end the run.
        batch_norm: whose images its statistics are of, see `share_batch_norm`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        objective: Objective,
        schedules: Schedules,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        seed: int = 0,
        accumulate: int = 1,
        max_skipped: int = 5,
        batch_norm: BatchNormScope = "global",
    ):
        super().__init__()
        self.automatic_optimization = False  # the step is written out below
        self.student = student
        self.teacher = teacher
        self.teacher.load_state_dict(student.state_dict())
        self.teacher.requires_grad_(False)
        self.objective = objective
        self.schedules = schedules
        self.timeline: Timeline | None = None  # of a run whose length is revised
        self.make_optimizer = optimizer
        self.seed = seed
        self.accumulate = accumulate
        self.batch_norm: BatchNormScope = batch_norm
        self.guard = StepGuard(self, (student, teacher), max_skipped)
        self.output: StepOutput | None = None
        self.health: HealthMonitor | None = None

    def setup(self, stage: str) -> None:
        """Share BatchNorm's statistics between ranks, before the strategy wraps the module."""
        if self.trainer.world_size > 1:
            share_batch_norm(self, self.batch_norm, self.trainer.num_devices)

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
        place = self.place(step)
        lr, weight_decay = self.schedules.lr(place), self.schedules.weight_decay(place)
        released = 1.0 if self.schedules.backbone is None else self.schedules.backbone(step)
        shares = (1.0, 1.0) if self.schedules.backbone is None else (released, released, 1.0, 1.0)
        decays = (weight_decay, 0.0) * (len(shares) // 2)
        for group, share, decay in zip(optimizer.param_groups, shares, decays, strict=True):
            group["lr"] = lr * share
            group["weight_decay"] = decay
        self.guard.keep()

        optimizer.zero_grad()
        parts = list(zip(*(v.tensor_split(self.accumulate, dim=1) for v in views), strict=True))
        images, made = views[0].shape[1], []
        first = self.global_rank * images
        for n, part in enumerate(parts, start=1):
            count = part[0].shape[1]
            of_batch = BatchPart(first, count, images * self.trainer.world_size)
            with self.guard.no_sync_if(n < len(parts)):
                made.append(self.forward_backward(list(part), step, of_batch, released == 0.0))
            first += count
        losses = {k: torch.stack([p.losses[k] for p in made]).sum() for k in made[0].losses}
        self.guard.own_loss = torch.stack([part.loss for part in made]).sum()
        losses = self.guard.mean_losses({"": self.guard.own_loss, **losses})
        loss = losses.pop("")
        targets = [part.targets for part in made]
        features = concatenated([part.features for part in made])
        if released == 0.0:  # no gradient, so no moments and no decay either
            self.student.backbone.zero_grad(set_to_none=True)
        grad_norms = self.clip_()
        signs = self.objective.signs(targets)
        output = StepOutput(loss, grad_norms.norm(), grad_norms, losses, signs, features)
        if not self.guard.is_finite(output):
            values = {"weight_decay": weight_decay, **self.objective.scheduled(step)}
            self.guard.skip(step, optimizer, output, Diagnosis(self.student, lr, values))
            return output

        for module in self.objective.frozen(self.student.head, step):
            module.zero_grad(set_to_none=True)
        optimizer.step()
        self.objective.update_(targets)
        ema_update_(self.teacher, self.student, self.schedules.ema(place))
        if not self.objective.takes_teacher:  # no forward pass moves its running statistics
            copy_buffers_(self.teacher, self.student)
        return output

    def place(self, step: int) -> float:
        """Where rate, decay and EMA are in their schedules: at the step, unless a budget has
        changed the length of the run.
        """
        return step if self.timeline is None else self.timeline.place(step)

    def forward_backward(
        self,
        views: list[Tensor],
        step: int,
        of_batch: BatchPart,
        frozen: bool = False,
    ) -> MicrobatchOutput:
        """Forward and backward of a part of the batch; not through a frozen backbone, unless ranks
        exchange all gradients.
        """
        share = of_batch.size * self.trainer.world_size / of_batch.total  # of this rank's
        objective, patches = self.objective, self.objective.takes_patches
        seed_step(step_seed(self.seed, 0, step), self.device)
        with torch.no_grad():
            inputs = objective.inputs(views, self.student.backbone.patch_size, step, of_batch)
            of_all, of_global = inputs.views, inputs.views[:1]
            seen = self.teacher.embedded(of_global, patches) if objective.takes_teacher else None
            targets = objective.targets(self.teacher.head, seen, inputs, step)
        seed_step(depth_seed(self.seed, step), self.device)
        with computing(self.student.backbone, of_batch, self.device):
            with torch.set_grad_enabled(not frozen or self.trainer.world_size > 1):
                token = objective.mask_token(self.student.head)
                embedded = self.student.embedded(of_all, patches, inputs.mask, token)
            loss, losses = objective.loss(self.student.head, embedded, targets, step)
            self.manual_backward(share * loss)
        parts = {name: share * part.detach() for name, part in losses.items()}
        features = seen.cls if seen is not None else embedded.cls[: len(views[0])].detach()
        return MicrobatchOutput(share * loss.detach(), parts, targets, features)

    def clip_(self) -> Float[Tensor, " P"]:
        """Limit the gradients as the objective says; their norms before."""
        limit = self.objective.clip_norm
        if self.objective.clip == "tensor":
            return clip_each_(self.student.parameters(), limit)
        head = self.student.head
        heads = head.values() if isinstance(head, nn.ModuleDict) else (head,)  # of a sum
        parts = (self.student.backbone, *heads)
        return torch.cat([clip_all_(part.parameters(), limit) for part in parts])

    def report(self, step: int) -> dict[str, float]:
        """Values for the log after so many steps."""
        place = self.place(step - 1)
        return {
            **(self.health.report(self, step) if self.health else {}),
            "lr": self.schedules.lr(place),
            "weight_decay": self.schedules.weight_decay(place),
            "ema": self.schedules.ema(place),
            **self.objective.scheduled(step - 1),
            **self.loss_parts(),
        }

    def loss_parts(self) -> dict[str, float]:
        """Parts of the last step's loss, where it has some."""
        losses = self.output.losses if self.output is not None else {}
        return {f"loss_{name}": value.item() for name, value in losses.items()}

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
    backbone: XCiT, head: nn.Module, teacher_backbone: XCiT
) -> tuple[Network, Network]:
    """(student, teacher); the teacher's head is a copy."""
    return Network(backbone, head), Network(teacher_backbone, deepcopy(head))
