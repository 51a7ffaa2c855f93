"""Self-distillation with no labels: centering and sharpening (DINO, arXiv:2104.14294, section 3.1,
algorithm 1), or a balanced assignment to prototypes instead (SwAV, arXiv:2006.09882; DINOv2,
arXiv:2304.07193).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.koleo import koleo_loss
from ssl_xcit.objectives.objective import (
    GLOBAL_VIEWS,
    ONE_PROTOTYPE,
    ONE_PROTOTYPE_OF_PATCHES,
    UNIFORM,
    UNIFORM_PATCHES,
    Clip,
    Embedded,
    Inputs,
    NumPrototypes,
    Objective,
    RunLength,
    Signs,
    Table,
    chosen_by_length,
    concatenated,
)
from ssl_xcit.objectives.prototype_loss import prototype_loss
from ssl_xcit.objectives.sinkhorn import check_prototypes, sinkhorn_knopp
from ssl_xcit.objectives.temperature import LinearInStairs
from ssl_xcit.utils.ranks import LateSum, world_size
from ssl_xcit.utils.validation import NonNegative, Positive, Share


class Center(nn.Module):
    """Running mean of the teacher's logits, subtracted before its softmax so that no prototype
    dominates.

    center <- momentum * center + (1 - momentum) * mean over views, images and ranks (equation 4);
    zeros at first. It is a buffer: a checkpoint carries it. Ranks exchange their sums while they
    train; who reads `center` calls `settle_` first, as reading the state does.

    Args:
        num_prototypes: K.
        momentum: of the running mean (paper: 0.9).
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: Annotated[float, Ge(0), Lt(1)] = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.moving: LateSum | None = None  # of a step's logits and their number
        self.register_state_dict_pre_hook(settle)
        self.register_load_state_dict_pre_hook(settle)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no exchange of its own."""
        self.settle_()
        return self.__dict__

    def targets(self, logits: Float[Tensor, "G B K"], temperature: float) -> Float[Tensor, "G B K"]:
        """softmax((logits - center) / temperature), with the center of the steps before."""
        self.settle_()
        return ((logits.to(self.center.dtype) - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update_(self, logits: Float[Tensor, "*rows K"]) -> None:
        """Take a step to the mean of the logits of all ranks, of which one or all may have none."""
        self.settle_()
        rows = logits.to(self.center.dtype).flatten(0, -2)
        total = torch.cat((rows.sum(dim=0), rows.new_full((1,), len(rows))))
        self.moving = LateSum(total)
        if world_size() == 1:
            self.settle_()

    @torch.no_grad()
    def settle_(self) -> None:
        """Wait for what ranks exchange, and take the step."""
        if self.moving is None:
            return
        total, self.moving = self.moving.result(), None
        mean = total[:-1] / total[-1].clamp_min(1.0)
        self.center.lerp_(torch.where(total[-1] > 0, mean, self.center), 1.0 - self.momentum)


def settle(center: Center, *_: object) -> None:
    """Before its state is read or loaded."""
    center.settle_()


class Targets(NamedTuple):
    """What the teacher says of the global views."""

    logits: Float[Tensor, "G B K"]
    rows: Float[Tensor, "G B K"]  # probabilities


class DINO(Objective):
    """Cross-entropy between the student's and the teacher's distributions over K prototypes, of
    different views of an image.

    Args:
        length: of the run.
        head: makes a `DINOHead` of a width and K.
        student_temp: the student's softmax temperature.
        centering: keeps prototypes in use: `mean` subtracts a running mean of the teacher's logits
            (see `Center`); `sinkhorn` gives each prototype the same share of a batch.
        center_momentum: see `Center`.
        koleo: weight of the entropy estimator that spreads the student's class tokens (DINOv2:
            0.1).
        teacher_temp_epochs: epochs in which the teacher's temperature rises from
            `teacher_temp_start` to `teacher_temp`, with each of them; with each step where a share
            of the run is less ...
        freeze_epochs: first epochs in which the prototypes keep their place ...
        max_warmup: ... both at most this share of the run.
        num_prototypes: K; it, `ema` and both temperatures are in the table where they are null.
        ema: see `Objective`.
        teacher_temp_start: the teacher's softmax temperature at first.
        teacher_temp: and at last.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.

    Raises:
        UserError: a table without a row for the run, or one with other names; more prototypes than
            Sinkhorn-Knopp can balance in a batch; KoLeo of single images.
    """

    of_patches = False  # whether patches are assigned to prototypes, more than there are images

    def __init__(
        self,
        length: RunLength,
        head: Callable[[int, int], nn.Module],
        student_temp: Positive = 0.1,
        centering: Literal["mean", "sinkhorn"] = "mean",
        center_momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
        koleo: NonNegative = 0.0,
        teacher_temp_epochs: NonNegative = 30.0,
        freeze_epochs: NonNegative = 1.0,
        max_warmup: Share = 0.3,
        num_prototypes: NumPrototypes | None = None,
        ema: Share | None = None,
        teacher_temp_start: Positive | None = None,
        teacher_temp: Positive | None = None,
        by_steps_and_images: Table = (),
        clip_norm: Positive = 3.0,
        clip: Clip = "tensor",
    ):
        chosen = chosen_by_length(
            {
                "num_prototypes": num_prototypes,
                "ema": ema,
                "teacher_temp_start": teacher_temp_start,
                "teacher_temp": teacher_temp,
            },
            by_steps_and_images,
            f"{length.key}.by_steps_and_images",
            length,
        )
        super().__init__(length, chosen["ema"], clip_norm, clip)
        if not student_temp > 0.0:
            raise UserError(f"student_temp={student_temp}: above 0; the paper has 0.1")
        of_patches = self.of_patches or length.of_patches
        if centering == "sinkhorn" and not of_patches:
            rows = GLOBAL_VIEWS * length.compared
            if num_prototypes is None:  # the table does not know the batch
                chosen["num_prototypes"] = min(chosen["num_prototypes"], rows)
            check_prototypes(chosen["num_prototypes"], rows, length.key)
        if koleo and length.compared < 2:
            raise UserError(
                f"{length.key}.koleo={koleo:g}: a single image that is computed at a time has no "
                "nearest neighbour: raise batch_size, or lower trainer.accumulate"
            )
        first = "optim.lr" if centering == "sinkhorn" else f"{length.key}.center_momentum"
        self.advice = {
            UNIFORM_PATCHES if of_patches else UNIFORM: (
                f"lower {length.key}.teacher_temp first, then optim.lr"
            ),
            ONE_PROTOTYPE_OF_PATCHES if of_patches else ONE_PROTOTYPE: (
                f"lower {first} first, then raise {length.key}.teacher_temp"
            ),
        }
        self.new_head = head
        self.num_prototypes: int = chosen["num_prototypes"]
        self.student_temp = student_temp
        self.centering = centering
        self.koleo = koleo
        warmup = min(teacher_temp_epochs, max_warmup * length.epochs)
        stair = length.steps_per_epoch if warmup == teacher_temp_epochs else 1.0
        if "teacher_temp_epochs" in length.begun:  # runs of earlier versions do not name it
            stair = length.begun.get("teacher_temp_stair", length.steps_per_epoch)
        self.teacher_temp_epochs = warmup
        self.teacher_temp = LinearInStairs(
            chosen["teacher_temp_start"],
            chosen["teacher_temp"],
            warmup * length.steps_per_epoch,
            stair,
        )
        self.freeze_steps = length.steps(freeze_epochs, max_warmup)
        self.center = Center(self.num_prototypes, center_momentum)

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection with K prototypes."""
        return self.new_head(embed_dim, self.num_prototypes)

    def targets(
        self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> Targets:
        """Logits and probabilities of the global views."""
        assert teacher is not None
        logits = head(teacher.cls)  # (G, B, K)
        return Targets(logits, self.probabilities(logits, step))

    def probabilities(self, logits: Float[Tensor, "G B K"], step: int) -> Float[Tensor, "G B K"]:
        """The teacher's rows, centered or balanced."""
        temperature = self.teacher_temp(step)
        if self.centering == "mean":
            return self.center.targets(logits, temperature)
        rows = sinkhorn_knopp(logits.flatten(0, 1), temperature)
        return rows.unflatten(0, logits.shape[:2])

    def loss(
        self, head: Any, student: Embedded, targets: Targets, step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Mean cross-entropy over pairs of different views; `koleo` is summed over global views."""
        prototypes = head.last_layer
        loss = prototype_loss(
            head.embed(student.cls),
            prototypes.weight_v,
            prototypes.weight_g,
            targets.rows,
            self.student_temp,
        )
        if not self.koleo:
            return loss, {}
        views = student.cls[: len(targets.rows)]
        spread = torch.stack([koleo_loss(view) for view in views]).sum()
        return loss + self.koleo * spread, {"dino": loss, "koleo": spread}

    def update_(self, parts: Sequence[Any]) -> None:
        """Move the center by the logits of images, or of more than these."""
        if self.centering == "mean":
            self.center.update_(concatenated([part.logits for part in parts]))

    def frozen(self, head: Any, step: int) -> Iterable[nn.Module]:
        """The prototypes, in the first steps."""
        return (head.last_layer,) if step < self.freeze_steps else ()

    def scheduled(self, step: int) -> Mapping[str, float]:
        """The teacher's temperature."""
        return {"teacher_temp": self.teacher_temp(step)}

    def derived(self) -> dict[str, Any]:
        """What the length of the run decides."""
        return {
            "freeze_steps": self.freeze_steps,
            "teacher_temp_epochs": self.teacher_temp_epochs,
            "teacher_temp_stair": self.teacher_temp.stair_steps,
            "num_prototypes": self.num_prototypes,
            "ema": self.ema,
            "teacher_temp_start": self.teacher_temp.start,
            "teacher_temp": self.teacher_temp.end,
        }

    def described(self) -> str:
        """The numbers to tell before training."""
        temperature = self.teacher_temp
        return (
            f"{self.num_prototypes:,} prototypes, teacher temperature {temperature.start:g} to "
            f"{temperature.end:g}, {super().described()}"
        )

    def signs(self, parts: Sequence[Targets]) -> Signs:
        """The teacher's probabilities."""
        return Signs(rows=concatenated([part.rows for part in parts]))

    def watched(self) -> Mapping[str, float]:
        """The length of the center."""
        self.center.settle_()
        return {"center_norm": self.center.center.norm().item()}
