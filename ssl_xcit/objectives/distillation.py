"""Distillation from a frozen teacher: its similarities to other images, and of patches to each
other, are what the student is to have too (similarity distillation with a queue, SEED,
arXiv:2101.04731, section 3.2; dense, as lightly-train's third version describes it).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import torch
from annotated_types import Ge
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.objective import (
    Clip,
    Embedded,
    Inputs,
    Objective,
    RunLength,
    Table,
    chosen_by_length,
)
from ssl_xcit.objectives.queue import EmbeddingQueue, check_queue
from ssl_xcit.objectives.similarity import patch_similarity_loss, queue_similarity_loss
from ssl_xcit.utils.ranks import BatchPart, gathered
from ssl_xcit.utils.validation import PLACE, NonNegative, Positive, Share, Text


@runtime_checkable
class FrozenTeacher(Protocol):
    """A network that is not trained, and is in no checkpoint of the run."""

    width: int  # of its embeddings

    def sha256(self) -> str:
        """A digest of its weights."""
        ...

    def __call__(
        self, images: Float[Tensor, "B channels H W"], patches: bool
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B h w D"] | None]:
        """Embeddings of images as the student sees them, and those of their patches if asked."""
        ...


class TeacherTargets(NamedTuple):
    """What the teacher makes of the global views."""

    embeddings: Float[Tensor, "G B D"]
    patches: Float[Tensor, "G B h w D"] | None


class Distillation(Objective):
    """Give the student the teacher's similarities.

    Args:
        length: of the run.
        head: makes a projection of a width to the teacher's.
        load_teacher: makes the teacher of its name and weights.
        teacher: its name: `timm/NAME`, a run, a checkpoint or a released file.
        teacher_ckpt: weights of a teacher of timm; None: timm's own.
        temperature: of both softmaxes.
        queue: embeddings of earlier images that similarities are to; at least a batch.
        local_weight: weight of the similarities of patches (0: none).
        mixup: mix images of a batch in pairs, with shares from 0 to 1; for long runs.
        ema: of the student, see `Objective`; the average is what is evaluated. Null: from the
            table.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.

    Raises:
        UserError: no teacher, or a queue smaller than the batch.
    """

    takes_teacher = False
    teacher_sha256: Tensor

    def __init__(
        self,
        length: RunLength,
        head: Callable[..., nn.Module],
        load_teacher: Callable[..., FrozenTeacher],
        teacher: Annotated[Text | None, PLACE] = None,  # a digest tells which it is
        teacher_ckpt: Annotated[Text | None, PLACE] = None,
        temperature: Positive = 0.07,
        queue: Annotated[int, Ge(1)] = 4096,
        local_weight: NonNegative = 1.0,
        mixup: bool = False,
        ema: Share | None = None,
        by_steps_and_images: Table = (),
        clip_norm: Positive = 3.0,
        clip: Clip = "module",
    ):
        if teacher is None:
            raise UserError(
                f"{length.key}.teacher is needed: timm/NAME, a run folder or a checkpoint, such as "
                f"{length.key}.teacher=timm/vit_small_patch14_dinov2.lvd142m"
            )
        table = f"{length.key}.by_steps_and_images"
        chosen = chosen_by_length({"ema": ema}, by_steps_and_images, table, length)
        super().__init__(length, chosen["ema"], clip_norm, clip)
        check_queue(queue, length.batch_size, length.key)
        with_patches = local_weight > 0
        self.frozen_teacher = load_teacher(str(teacher), teacher_ckpt, patches=with_patches)
        self.new_head = head
        self.temperature = temperature
        self.local_weight = local_weight
        self.takes_patches = with_patches
        self.mixes = mixup
        self.queue = EmbeddingQueue(queue, self.frozen_teacher.width)
        self.register_buffer("teacher_sha256", digest_of(self.frozen_teacher))
        self.register_load_state_dict_pre_hook(require_same_teacher)

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection to the teacher's width."""
        return self.new_head(embed_dim, self.frozen_teacher.width)

    def inputs(self, views: list[Tensor], patch_size: int, step: int, part: BatchPart) -> Inputs:
        """Views mixed with those of the other image of each pair, in all resolutions alike (mixup,
        arXiv:1710.09412). Pairs are neighbours in the batch, whose order is random; an image whose
        neighbour is in another part stays as it is.
        """
        if not self.mixes:
            return Inputs(views)
        others = (torch.arange(part.start, part.start + part.size) ^ 1) - part.start
        alone = (others < 0) | (others >= part.size)
        others = torch.where(alone, torch.arange(part.size), others)
        others = others.to(views[0].device, non_blocking=True)
        share = float(torch.rand(()))
        return Inputs([view.lerp(view[:, others], share) for view in views])

    def targets(
        self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> TeacherTargets:
        """The frozen teacher's embeddings of the global views."""
        images = inputs.views[0]
        embeddings, patches = self.frozen_teacher(images.flatten(0, 1), self.takes_patches)
        counts = images.shape[:2]
        return TeacherTargets(
            embeddings.unflatten(0, counts),
            None if patches is None else patches.unflatten(0, counts),
        )

    def loss(
        self, head: nn.Module, student: Embedded, targets: TeacherTargets, step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Of each global view with its own target; local views have those of all global ones."""
        G = len(targets.embeddings)
        bank = torch.cat((self.queue.filled(), gathered(targets.embeddings[0])))
        ours = head(student.cls)
        pairs = [(v, v) for v in range(G)]
        pairs += [(v, g) for v in range(G, len(ours)) for g in range(G)]
        of_pairs = [
            queue_similarity_loss(ours[v], targets.embeddings[g], bank, self.temperature)
            for v, g in pairs
        ]
        losses = {"global": torch.stack(of_pairs).mean()}
        if targets.patches is not None:
            patches = head(student.patches[0].movedim(2, -1))
            losses["local"] = patch_similarity_loss(
                patches.flatten(0, 1), targets.patches.flatten(0, 1), self.temperature
            )
        local = losses.get("local", losses["global"].new_zeros(()))
        return losses["global"] + self.local_weight * local, losses

    def update_(self, parts: Sequence[Any]) -> None:
        """Put the first view of each image into the queue."""
        for part in parts:
            self.queue.push_(part.embeddings[0])

    def described(self) -> str:
        """The teacher's width and the queue."""
        return f"a frozen teacher of width {self.frozen_teacher.width}, {super().described()}"


def digest_of(teacher: FrozenTeacher) -> UInt8[Tensor, "32"]:
    """A digest of its weights, as a tensor for checkpoints."""
    return torch.tensor(list(bytes.fromhex(teacher.sha256())), dtype=torch.uint8)


def require_same_teacher(
    module: Distillation, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Raise UserError where a checkpoint was made with a teacher of other weights."""
    before = state.get(f"{prefix}teacher_sha256")
    if before is not None and not torch.equal(before.cpu(), module.teacher_sha256.cpu()):
        key = module.length.key
        raise UserError(
            f"the run was begun with other weights of {key}.teacher: name the file that it was "
            "begun with, or start a new run with another name=..."
        )
