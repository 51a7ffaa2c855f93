"""What an objective is: what a student learns from views, and from what a teacher makes of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.utils.ranks import BatchPart
from ssl_xcit.utils.validation import Positive, Share, allows, as_typed, described

Clip = Literal["tensor", "module"]
Table = Sequence[Mapping[str, float]]
GLOBAL_VIEWS = 2  # of an image
FROM = ("images", "steps")  # of a row of a table
NumPrototypes = Annotated[int, Ge(2)]
TABLE_NUMBERS: Mapping[str, Any] = {
    "num_prototypes": NumPrototypes,
    "ema": Share,
    "teacher_temp_start": Positive,
    "teacher_temp": Positive,
}
# what can be wrong with a run whose numbers are finite
UNIFORM = "the teacher has collapsed to a uniform distribution"
ONE_PROTOTYPE = "one prototype takes all images"
UNIFORM_PATCHES = "the teacher has collapsed to a uniform distribution of patches"
ONE_PROTOTYPE_OF_PATCHES = "one prototype takes all patches"
ALIKE = "the features of all images are nearly the same"
EMBEDDINGS_ALIKE = "the embeddings of all images are nearly the same"
Views = Float[Tensor, "_ B channels _ _"]  # of one resolution, normalised


class RunLength(NamedTuple):
    """What an objective knows of the run that it is for."""

    num_images: int
    batch_size: int  # over all devices
    steps_per_epoch: float
    total_steps: int
    epochs: float
    accumulate: int = 1  # parts that a batch is computed in
    key: str = "objective"  # of the settings, for messages
    begun: Mapping[str, Any] = {}  # what was derived when the run began: it stays
    devices: int = 1
    of_patches: bool = False  # whether a part of an objective is for patches, not for images

    @property
    def compared(self) -> int:
        """Images of all devices that are computed, and may be compared, at once: of the smallest
        part of a batch.
        """
        return self.batch_size // self.devices // self.accumulate * self.devices

    def steps(self, epochs: float, max_share: float) -> int:
        """Steps of so many epochs, at most a share of the run."""
        return round(min(epochs * self.steps_per_epoch, max_share * self.total_steps))


class Embedded(NamedTuple):
    """What a backbone makes of V views of B images, the global ones first."""

    cls: Float[Tensor, "V B C"]
    patches: tuple[Float[Tensor, "_ B C _ _"], ...] = ()  # one a resolution, where they are taken


class PatchMask(NamedTuple):
    """Patches of the global views that the student does not see."""

    masked: Bool[Tensor, "G B h w"]
    places: Int64[Tensor, " M"]  # of the masked ones among all patches, view by view
    weights: Float[Tensor, " M"]  # 1 / (masked patches of its view) of each
    exclude: bool  # leave them out of the statistics of channel attention as well


class Inputs(NamedTuple):
    """What the networks see of a batch."""

    views: list[Views]  # a tensor a resolution, the global views first
    mask: PatchMask | None = None  # of the student


class Signs(NamedTuple):
    """What tells whether training is well, of one step."""

    rows: Float[Tensor, "G B K"] | None = None  # the teacher's probabilities over prototypes
    patch_rows: Float[Tensor, "M K"] | None = None  # and those of patches
    embeddings: Float[Tensor, "B D"] | None = None  # of the first view, where these are compared


class Objective(nn.Module, ABC):
    """Heads, targets, a loss, and state that a checkpoint carries.

    The training step calls `inputs`, `targets`, `loss`, `frozen` and `update_` in this order;
    `head` is what `make_head` made, the student's or the teacher's copy of it, which follows the
    student as the teacher's backbone does. Making an objective draws no random number; its methods
    draw from torch's global generators only, which the step seeds.

    Args:
        length: of the run.
        ema: the teacher's momentum at the start, which rises to 1.
        clip_norm: largest L2 norm of a gradient ...
        clip: ... of each tensor, or of all of a module: the backbone, and the head.

    Attributes:
        takes_patches: whether student and teacher give patch tokens too.
        takes_teacher: whether the momentum teacher sees the global views; otherwise it only follows
            the student.
        mixes: whether images are mixed with each other.
        advice: what to change first in a trouble; others have the usual advice.
    """

    takes_patches: bool = False
    takes_teacher: bool = True
    mixes: bool = False
    advice: Mapping[str, str] = {}

    def __init__(
        self, length: RunLength, ema: Share, clip_norm: Positive = 3.0, clip: Clip = "tensor"
    ):
        super().__init__()
        self.length = length
        self.ema = ema
        self.clip_norm = clip_norm
        self.clip: Clip = clip

    @abstractmethod
    def make_head(self, embed_dim: int) -> nn.Module:
        """Return what is trained beside the backbone, of width `embed_dim`; fresh weights."""

    def inputs(self, views: list[Views], patch_size: int, step: int, part: BatchPart) -> Inputs:
        """What student and teacher see of a part of the batch. All parts of a step begin with the
        same seed: what is drawn for an image must not depend on how the batch is split.
        """
        return Inputs(views)

    def mask_token(self, head: nn.Module) -> Float[Tensor, " C"] | None:
        """What the student has for masked patches."""
        return None

    @abstractmethod
    def targets(self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int) -> Any:
        """Return what the student is to learn, without gradients: from the teacher's embeddings of
        the global views, or from these themselves.
        """

    @abstractmethod
    def loss(
        self, head: nn.Module, student: Embedded, targets: Any, step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Return the loss of all views, and its parts by name where it has some."""

    def update_(self, parts: Sequence[Any]) -> None:
        """Move the state after a step that was taken; `parts` are the targets of its batch."""

    def frozen(self, head: nn.Module, step: int) -> Iterable[nn.Module]:
        """Yield modules of the student's head that keep their weights in this step."""
        return ()

    def scheduled(self, step: int) -> Mapping[str, float]:
        """What else changes with the step, for the log."""
        return {}

    def derived(self) -> dict[str, Any]:
        """Numbers that follow from the length of the run, for its record."""
        return {"ema": self.ema}

    def described(self) -> str:
        """The numbers to tell before training."""
        return f"EMA from {self.ema:g}"

    def signs(self, parts: Sequence[Any]) -> Signs:
        """What to judge a step by; `parts` are the targets of its batch."""
        return Signs()

    def watched(self) -> Mapping[str, float]:
        """Numbers of the state, for the log."""
        return {}


def concatenated(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Concatenated; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def chosen_by_length(
    settings: Mapping[str, Any], table: Table, key: str, length: RunLength
) -> dict[str, Any]:
    """Numbers that are not set, from the last row of a table that the run's images and steps reach;
    of a run that goes on, as they were when it began.

    Args:
        settings: values by name; None: from the table.
        table: rows of the names and, where it is not 0, of the `images` and `steps` to begin at.
        key: of the table, for messages.
        length: of the run.

    Raises:
        UserError: a row without one of the names or with another one, or with a number that is not
            allowed; or none that is reached.
    """
    wanted = {name for name, value in settings.items() if value is None}
    for row in table:
        if wrong := wanted - row.keys() or row.keys() - {*settings, *FROM}:
            raise UserError(
                f"{key}: each row has {', '.join(settings)} and, to begin at, {' or '.join(FROM)}; "
                f"{', '.join(sorted(wrong))} is missing or has no place in {dict(row)}"
            )
        for name, value in row.items():
            if not allows(TABLE_NUMBERS.get(name, float), value):
                words = described(TABLE_NUMBERS.get(name, float))
                raise UserError(f"{key}: {name}={as_typed(value)} must be {words}")
    rows = [
        row
        for row in table
        if row.get("images", 0) <= length.num_images and row.get("steps", 0) <= length.total_steps
    ]
    if wanted and not rows:
        raise UserError(f"{key}: a row without `images` and `steps` is needed, for all other runs")
    kept = {k: v for k in settings if is_number(v := length.begun.get(k))}
    return {k: kept.get(k, rows[-1][k] if v is None else v) for k, v in settings.items()}


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
