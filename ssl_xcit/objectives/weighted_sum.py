"""Several objectives at once, each with a head and a weight (such as DINOv2, arXiv:2304.07193)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.objective import (
    Clip,
    Embedded,
    Inputs,
    Objective,
    RunLength,
    Signs,
    Table,
    chosen_by_length,
)
from ssl_xcit.utils.ranks import BatchPart
from ssl_xcit.utils.validation import NonNegative, Positive, Share


class WeightedSum(Objective):
    """The weighted sum of the losses of its terms. What judges a run looks at images, patches and
    embeddings, each of the first term that has them.

    Args:
        length: of the run.
        terms: by name what makes each of them for a run; their own `ema` and clipping count for
            nothing.
        weights: by name; a term of weight 0 is left out.
        ema: see `Objective`; null: from the table.
        by_steps_and_images: see `chosen_by_length`.
        clip_norm: see `Objective`.
        clip: likewise.

    Raises:
        UserError: terms and weights have other names, or no term has a weight, or one of several
            mixes images.
    """

    def __init__(
        self,
        length: RunLength,
        terms: Mapping[str, Callable[[RunLength], Objective]],
        weights: Mapping[str, NonNegative],
        ema: Share | None = None,
        by_steps_and_images: Table = (),
        clip_norm: Positive = 3.0,
        clip: Clip = "tensor",
    ):
        table = f"{length.key}.by_steps_and_images"
        chosen = chosen_by_length({"ema": ema}, by_steps_and_images, table, length)
        super().__init__(length, chosen["ema"], clip_norm, clip)
        if odd := sorted(terms.keys() ^ weights.keys()):
            raise UserError(
                f"{length.key}.terms and {length.key}.weights must have the same names: "
                f"{', '.join(odd)} is in only one of them"
            )
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if not self.weights:
            raise UserError(f"{length.key}.weights: all are 0; set at least one above 0")
        made = {
            name: terms[name](
                length._replace(key=f"{length.key}.terms.{name}", begun=length.begun.get(name, {}))
            )
            for name in self.weights
        }
        if mixing := [name for name in made if made[name].mixes and len(made) > 1]:
            raise UserError(
                f"{length.key}.terms.{mixing[0]} mixes the images of all terms: set "
                f"{length.key}.terms.{mixing[0]}.mixup=false"
            )
        self.terms: Any = nn.ModuleDict(made)
        self.takes_patches = any(term.takes_patches for term in made.values())
        self.takes_teacher = any(term.takes_teacher for term in made.values())
        self.advice = {k: v for term in reversed(made.values()) for k, v in term.advice.items()}

    def make_head(self, embed_dim: int) -> nn.Module:
        """The heads of all terms, by name.

        Raises:
            UserError: two terms mask patches.
        """
        heads = {k: term.make_head(embed_dim) for k, term in self.terms.items()}
        masking = [k for k, t in self.terms.items() if t.mask_token(heads[k]) is not None]
        if len(masking) > 1:
            raise UserError(
                f"{self.length.key}.terms: {' and '.join(masking)} both mask patches, and only one "
                f"term can: set {self.length.key}.weights.{masking[-1]}=0"
            )
        return nn.ModuleDict(heads)

    def inputs(self, views: list[Tensor], patch_size: int, step: int, part: BatchPart) -> Inputs:
        """As all terms want them, one after another; the mask of the one that has one."""
        mask = None
        for term in self.terms.values():
            views, of_term = term.inputs(views, patch_size, step, part)
            mask = of_term or mask
        return Inputs(views, mask)

    def mask_token(self, head: Any) -> Float[Tensor, " C"] | None:
        """That of the term that has one."""
        tokens = (term.mask_token(head[name]) for name, term in self.terms.items())
        return next((token for token in tokens if token is not None), None)

    def targets(
        self, head: Any, teacher: Embedded | None, inputs: Inputs, step: int
    ) -> dict[str, Any]:
        """Of all terms, by name."""
        return {k: term.targets(head[k], teacher, inputs, step) for k, term in self.terms.items()}

    def loss(
        self, head: Any, student: Embedded, targets: Mapping[str, Any], step: int
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """The weighted sum, and by name each term without its weight."""
        total, losses = student.cls.new_zeros(()), dict[str, Tensor]()
        for name, term in self.terms.items():
            losses[name], parts = term.loss(head[name], student, targets[name], step)
            losses |= {f"{name}_{part}": value for part, value in parts.items()}
            total = total + self.weights[name] * losses[name]
        return total, losses

    def update_(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Move the state of all terms."""
        for name, term in self.terms.items():
            term.update_([part[name] for part in parts])

    def frozen(self, head: Any, step: int) -> Iterable[nn.Module]:
        """Yield what any term wants to stay."""
        for name, term in self.terms.items():
            yield from term.frozen(head[name], step)

    def scheduled(self, step: int) -> Mapping[str, float]:
        """Of all terms; equal names are those of the first that has one."""
        values: dict[str, float] = {}
        for term in reversed(self.terms.values()):
            values |= term.scheduled(step)
        return values

    def derived(self) -> dict[str, Any]:
        """Of each term by name."""
        of_terms = {name: term.derived() for name, term in self.terms.items()}
        return super().derived() | {
            name: {k: v for k, v in derived.items() if k != "ema"}
            for name, derived in of_terms.items()
        }

    def described(self) -> str:
        """The terms with their weights."""
        words = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"{words}, {super().described()}"

    def signs(self, parts: Sequence[Mapping[str, Any]]) -> Signs:
        """Those of the terms together; of equal ones those of the first."""
        found = [term.signs([part[k] for part in parts]) for k, term in self.terms.items()]
        return Signs(
            *(next((s for s in kind if s is not None), None) for kind in zip(*found, strict=True))
        )

    def watched(self) -> Mapping[str, float]:
        """Of all terms, like `scheduled`."""
        values: dict[str, float] = {}
        for term in reversed(self.terms.values()):
            values |= term.watched()
        return values
