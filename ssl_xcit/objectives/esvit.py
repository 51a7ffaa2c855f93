"""Region-level self-distillation (EsViT, arXiv:2106.09785, section 3.2, equation 2): each patch
learns from the most similar patch of another view, without masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.objective import Embedded, Inputs, Signs, concatenated
from ssl_xcit.objectives.region import region_loss


class RegionTargets(NamedTuple):
    """What the teacher says of the M patches of the global views."""

    logits: Float[Tensor, "G B M K"]
    rows: Float[Tensor, "G B M K"]  # probabilities
    features: Float[Tensor, "G B M C"]  # of the backbone, by which patches are matched


def tokens(patches: Float[Tensor, "v B C h w"]) -> Float[Tensor, "v B N C"]:
    """Patches one after another."""
    return patches.flatten(-2).transpose(-1, -2)


class Region(DINO):
    """DINO's loss of patches instead of class tokens, with settings of the same names, of which
    `koleo` is for class tokens only. To be used beside the loss of class tokens (`WeightedSum`).
    """

    takes_patches = True
    of_patches = True

    def targets(self, head: nn.Module, teacher: Embedded | None, inputs: Inputs, step: int) -> Any:
        """Probabilities and features of the patches of the global views."""
        assert teacher is not None
        features = tokens(teacher.patches[0])
        logits = head(features)
        rows = self.probabilities(logits.flatten(1, 2), step).unflatten(1, logits.shape[1:3])
        return RegionTargets(logits, rows, features)

    def make_head(self, embed_dim: int) -> nn.Module:
        """A projection with K prototypes.

        Raises:
            UserError: KoLeo, which is for class tokens.
        """
        if self.koleo:
            key = self.length.key
            raise UserError(f"{key}.koleo={self.koleo:g}: it is for class tokens: set it to 0")
        return super().make_head(embed_dim)

    def loss(
        self, head: Any, student: Embedded, targets: Any, step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """Mean over patches, images, and pairs of different views."""
        features = [tokens(patches) for patches in student.patches]
        logits = [head(of_one) for of_one in features]
        loss = region_loss(logits, features, targets.rows, targets.features, self.student_temp)
        return loss, {}

    def signs(self, parts: Sequence[Any]) -> Signs:
        """The teacher's probabilities, the middle patch standing for each image."""
        middle = concatenated([p.rows[:, :, p.rows.shape[2] // 2] for p in parts])
        return Signs(patch_rows=middle.flatten(0, 1))
