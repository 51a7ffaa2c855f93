"""Whether a run is well: non-finite steps are skipped, and collapse is seen and said.

Two collapses are known of self-distillation (DINO, arXiv:2104.14294, section 5.3): the teacher's
rows become uniform (centering wins), or one prototype takes every image (sharpening wins). Both
show in the teacher's targets; that features lose their dimensions shows in RankMe
(arXiv:2210.02885) and in the deviation of normalised features (SimSiam, arXiv:2011.10566,
section 4.1).
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from annotated_types import Ge
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ssl_xcit.errors import RunFailed
from ssl_xcit.objectives.objective import (
    ALIKE,
    EMBEDDINGS_ALIKE,
    ONE_PROTOTYPE,
    ONE_PROTOTYPE_OF_PATCHES,
    UNIFORM,
    UNIFORM_PATCHES,
)
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.ranks import averaged, gathered, rank, summed_
from ssl_xcit.utils.validation import Count

log = logging.getLogger(__name__)
HEALTHY = "healthy"
ADVICE = "lower optim.lr first, then raise objective.ema"
FEW = 16  # patches that tell nothing


class BufferSnapshot:
    """Keep BatchNorm's running statistics before a step, to restore them when it is skipped."""

    def __init__(self, *modules: nn.Module):
        self.buffers = [b for module in modules for b in module.buffers()]
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers."""
        if not self.kept:
            self.kept = [b.clone() for b in self.buffers]
        torch._foreach_copy_(self.kept, self.buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Write back what was kept."""
        torch._foreach_copy_(self.buffers, self.kept)


def dump_step(
    path: Path, module: nn.Module, norms: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """Write facts about a step that failed, and norms of all weights and gradients, as JSON."""
    with torch.no_grad():
        weights = {name: p.norm().item() for name, p in module.named_parameters()}
    content = {**facts, "gradient_norms": dict(norms), "weight_norms": weights}
    write_json(json.loads(json.dumps(content), parse_constant=str), path)


def rankme(features: Float[Tensor, "M C"]) -> Float[Tensor, ""]:
    """Effective rank (RankMe, equation 1): exp of the singular values' entropy, 1 to min(M, C)."""
    # squares of the singular values from the smaller Gram matrix, in double for the small ones
    x = features.double()
    gram = x.mT @ x if x.shape[1] <= x.shape[0] else x @ x.mT
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    return torch.special.entr(share).sum().exp().float()


def feature_std(features: Float[Tensor, "M C"]) -> Float[Tensor, ""]:
    """Mean over channels of the standard deviation of L2-normalised features, times sqrt(C): about
    1 for features in all directions, 0 when they are one.
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    return unit.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1])


def grad_norm_groups(names: Iterable[str]) -> tuple[list[str], list[int]]:
    """Groups of parameters for the log, such as thirds of the depth, and the group of each."""
    names = list(names)
    depth = 1 + max((block_of(n) for n in names), default=-1)

    def group(name: str) -> str:
        if "last_layer" in name:
            return "prototypes"
        if "head." in name:
            return "head"
        if "cls_" in name or name.startswith("backbone.norm."):
            return "class_attention"
        if (block := block_of(name)) >= 0:
            return ("blocks_first", "blocks_middle", "blocks_last")[3 * block // depth]
        return "stem"

    of_each = [group(n) for n in names]
    groups = list(dict.fromkeys(of_each))
    return groups, [groups.index(g) for g in of_each]


def block_of(name: str) -> int:
    """`backbone.blocks.3.` is 3; -1 outside the blocks."""
    _, is_block, rest = name.partition("backbone.blocks.")
    return int(rest.partition(".")[0]) if is_block else -1


def teacher_entropy(targets: Float[Tensor, "G B K"]) -> dict[str, float]:
    """Mean entropy of the teacher's rows on all ranks in nats, and over ln K: 1 is uniform, 0 is
    one-hot.
    """
    own = torch.special.entr(targets).sum(-1).mean()
    entropy = averaged({"": own})[""].item()
    return {
        "teacher_entropy": entropy,
        "teacher_entropy_share": entropy / math.log(targets.shape[-1]),
    }


class Queue:
    """The last M = `size` rows, in memory made once."""

    def __init__(self, size: int):
        self.size = size
        self.rows: Tensor | None = None
        self.count = 0

    def add(self, rows: Shaped[Tensor, "B C"]) -> None:
        """At most M of them."""
        if self.rows is None:
            self.rows = rows.new_zeros(self.size, rows.shape[1])
        self.rows = self.rows.to(rows.device)  # a checkpoint's come on the CPU
        rows = rows[-self.size :]
        start = self.count % self.size
        first = rows[: self.size - start]
        self.rows[start : start + len(first)] = first
        self.rows[: len(rows) - len(first)] = rows[len(first) :]
        self.count += len(rows)

    def filled(self) -> Shaped[Tensor, "M C"]:
        """Those that are there, in any order."""
        assert self.rows is not None
        return self.rows[: self.count]


class Health(lightning.Callback):
    """Features and favourite prototypes of the last images, looked at with each report of the
    metrics; a change of the verdict is logged, with what to change first.

    Args:
        queue: images looked back upon.
        patience: reports in a row with the same trouble before it is said.
        stop_on_collapse: end the run then, with exit code 1.
    """

    def __init__(
        self,
        queue: Annotated[int, Ge(2)] = 1024,
        patience: Count = 3,
        stop_on_collapse: bool = False,
    ):
        self.features = Queue(queue)
        self.favourites = Queue(queue)
        self.embeddings = Queue(queue)
        self.patience = patience
        self.stop_on_collapse = stop_on_collapse
        self.verdict = HEALTHY
        self.trouble = HEALTHY
        self.times = 0
        self.said = True

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        """Let the module know who judges it."""
        module.health = self

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Keep the first global view of each image of all ranks, but not of steps that were
        skipped.
        """
        if not module.guard.in_a_row:
            self.features.add(gathered(module.output.features[0].float()))
            signs = module.output.signs
            if signs.rows is not None:
                self.favourites.add(gathered(signs.rows[0].argmax(-1, keepdim=True)))
            if signs.embeddings is not None:
                self.embeddings.add(gathered(signs.embeddings.float()))

    def report(self, module: Any, step: int) -> dict[str, float]:
        """Values for the log, the same on all ranks, which all ask for them; sets `verdict`. None
        before the first step that was not skipped.
        """
        if self.features.rows is None:
            return {}
        rows, patch_rows = module.output.signs.rows, module.output.signs.patch_rows
        names = [n for n, p in module.student.named_parameters() if p.requires_grad]
        groups, of_each = grad_norm_groups(names)
        norms = module.output.grad_norms
        index = torch.tensor(of_each, device=norms.device)
        by_group = norms.new_zeros(len(groups)).index_add_(0, index, norms.square()).sqrt()
        values = {
            **({} if rows is None else self.of_prototypes(rows)),
            **({} if patch_rows is None else of_patches(patch_rows)),
            **module.objective.watched(),
            **spread("feature_std", "rankme", self.features),
            **spread("embedding_std", "embedding_rankme", self.embeddings),
            **{f"grad_norm_{g}": n for g, n in zip(groups, by_group.tolist(), strict=True)},
        }
        loss = module.output.loss.item()
        warm = step > getattr(module.schedules.lr, "warmup_steps", 0)
        K = None if rows is None else rows.shape[-1]
        of_rows = math.nan if module.output.losses else loss  # a sum is no cross-entropy
        trouble = judge(of_rows, values, K) if warm else HEALTHY
        if not math.isfinite(loss):
            trouble = self.trouble  # a step that was skipped tells nothing
        self.times = self.times + 1 if trouble == self.trouble else 1
        self.trouble = trouble
        if trouble != self.verdict and (trouble == HEALTHY or self.times >= self.patience):
            self.verdict, self.said = trouble, False
        if not self.said:
            self.said = True
            self.say(step, module.objective.advice.get(self.verdict, ADVICE))
        return {**values, "healthy": float(self.verdict == HEALTHY)}

    def of_prototypes(self, rows: Float[Tensor, "G B K"]) -> dict[str, float]:
        """How the teacher's probabilities and the last images spread over the prototypes."""
        favourites = self.favourites.filled()
        counts = favourites.unique(return_counts=True)[1]
        return {
            **teacher_entropy(rows),
            "prototypes_used": len(counts) / min(rows.shape[-1], len(favourites)),
            "prototypes_effective": effective_number(counts),
        }

    def say(self, step: int, advice: str) -> None:
        """The verdict has changed.

        Raises:
            RunFailed: for the worse, and that is to end the run.
        """
        if self.verdict == HEALTHY:
            if rank() == 0:
                log.warning("step %d: the run is healthy again", step)
            return
        text = f"step {step}: {self.verdict}: {advice}"
        if self.stop_on_collapse:
            raise RunFailed(f"{text}; stopped, as callbacks.health.stop_on_collapse asks")
        if rank() == 0:
            log.warning("%s; callbacks.health.stop_on_collapse=true would stop here", text)

    def state_dict(self) -> dict[str, Any]:
        """The queues, so that a run that goes on reports as one that was not stopped."""
        queues = {n: [q.rows, q.count] for n, q in self.queues().items()}
        return {**queues, "verdict": self.verdict, "trouble": self.trouble, "times": self.times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        for name, queue in self.queues().items():
            rows, count = state_dict.get(name, (None, 0))
            if rows is not None and len(rows) == queue.size:
                queue.rows, queue.count = rows.clone(), count
        self.verdict, self.trouble = state_dict["verdict"], state_dict["trouble"]
        self.times = state_dict["times"]
        self.said = self.verdict == HEALTHY  # a sick run that goes on says so again

    def queues(self) -> dict[str, Queue]:
        """By name."""
        return {
            "features": self.features,
            "favourites": self.favourites,
            "embeddings": self.embeddings,
        }


def of_patches(rows: Float[Tensor, "M K"]) -> dict[str, float]:
    """How the teacher's probabilities of the step's patches, of all ranks, spread over the
    prototypes; none of few patches, which ranks may have different numbers of.
    """
    K = rows.shape[-1]
    favourites = rows.argmax(-1).bincount(minlength=K).to(rows.dtype)
    sums = summed_(torch.cat((favourites, torch.special.entr(rows).sum()[None])))
    counts, entropy = sums[:K], sums[K].item()
    number = counts.sum().item()
    if number < FEW:
        return {}
    return {
        "patch_entropy_share": entropy / number / math.log(K),
        "patch_prototypes_effective": effective_number(counts),
    }


def spread(deviation: str, rank: str, queue: Queue) -> dict[str, float]:
    """`feature_std` and `rankme` of the rows of a queue, by these names; none of an empty one."""
    if queue.rows is None:
        return {}
    rows = queue.filled()
    return {deviation: feature_std(rows).item(), rank: rankme(rows).item()}


def effective_number(counts: Shaped[Tensor, " U"]) -> float:
    """exp of the entropy of the shares: how many equally frequent ones tell as much."""
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp().item()


def judge(loss: float, values: Mapping[str, float], num_prototypes: int | None) -> str:
    """What is wrong, causes before effects.

    Alike: normalised features, or embeddings, deviate by less than a fiftieth of what independent
    directions do, or span fewer than two dimensions. One prototype: the images' favourites tell
    less than two equally frequent ones. Uniform: the loss within 0.1 % of ln K, or the teacher's
    entropy within 0.5 %. Of patches likewise, by the teacher, less than 1.5.
    """
    if values["feature_std"] < 0.02 or values["rankme"] < 2.0:
        return ALIKE
    if values.get("embedding_std", 1.0) < 0.02 or values.get("embedding_rankme", 2.0) < 2.0:
        return EMBEDDINGS_ALIKE
    if num_prototypes is not None:
        uniform = math.log(num_prototypes)
        if values["prototypes_effective"] < min(2.0, num_prototypes / 4):
            return ONE_PROTOTYPE
        if abs(loss - uniform) < 1e-3 * uniform or values["teacher_entropy_share"] > 0.995:
            return UNIFORM
    if values.get("patch_prototypes_effective", 2.0) < 1.5:
        return ONE_PROTOTYPE_OF_PATCHES
    return UNIFORM_PATCHES if values.get("patch_entropy_share", 0.0) > 0.995 else HEALTHY
