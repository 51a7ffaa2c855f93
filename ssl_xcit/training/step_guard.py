"""Steps whose loss or gradient is not finite change nothing; too many in a row end the run."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.training.datamodule import names_of_batch
from ssl_xcit.training.health import BufferSnapshot, dump_step
from ssl_xcit.training.preemption import ORDER
from ssl_xcit.utils.ranks import averaged, world_size

log = logging.getLogger(__name__)


@runtime_checkable
class Outcome(Protocol):
    """What every training step leaves for callbacks, in `module.output`."""

    @property
    def loss(self) -> Float[Tensor, ""]: ...  # noqa: D102

    @property
    def grad_norm(self) -> Float[Tensor, ""]: ...  # noqa: D102

    @property
    def grad_norms(self) -> Float[Tensor, " P"]: ...  # noqa: D102


class Diagnosis(NamedTuple):
    """What is written down of a step that ends a run."""

    network: nn.Module  # whose trainable parameters `Outcome.grad_norms` are of
    lr: float
    values: Mapping[str, Any]  # more, by name


class StepGuard:
    """Counts what was skipped, and keeps the buffers that a skipped step must not move.

    Args:
        module: whose steps these are.
        networks: their buffers are those that a step moves.
        max_skipped: steps in a row that end the run.
    """

    def __init__(
        self, module: lightning.LightningModule, networks: tuple[nn.Module, ...], max_skipped: int
    ):
        self.module = module
        self.networks = networks
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self.own_loss = torch.zeros(())  # of this rank's images
        self.asked: Callable[[], int] = lambda: 0  # which signal has reached this rank, see `ORDER`
        self.reached: list[Tensor] = []  # the share of ranks that each has reached
        self.agreed = 0  # the last that had reached any rank as losses went round, for all the same
        self.buffers = BufferSnapshot(*networks)

    def begin(self) -> None:
        """Take the buffers of the networks where they are trained."""
        self.buffers = BufferSnapshot(*self.networks)

    def keep(self) -> None:
        """Copy the buffers before a step."""
        self.buffers.keep()

    def no_sync_if(self, condition: bool) -> AbstractContextManager[None]:
        """Run backward passes without an exchange of gradients between ranks, if there are any."""
        trainer = self.module.trainer
        if not condition or trainer.world_size == 1:
            return nullcontext()
        return trainer.strategy.block_backward_sync()  # type: ignore[attr-defined]

    def mean_losses(self, losses: Mapping[str, Float[Tensor, ""]]) -> dict[str, Tensor]:
        """Means over ranks; which signals have reached one goes round with them."""
        if world_size() == 1:
            return dict(losses)
        asked, like = self.asked(), next(iter(losses.values()))
        signals = {f"signal {n}": like.new_full((), float(asked == n)) for n in range(len(ORDER))}
        means = averaged({**losses, **signals})
        self.reached = [means.pop(name) for name in signals]
        return means

    def is_finite(self, output: Outcome) -> bool:
        """Whether a step may be taken. All numbers are the same on all ranks, and so is this."""
        finite = torch.isfinite(output.loss + output.grad_norm).to(output.loss)
        good, *reached = torch.stack([finite, *self.reached]).tolist()
        self.agreed = max((n for n, share in enumerate(reached) if share), default=0)
        if good:
            self.in_a_row = 0
        return bool(good)

    def skip(self, step: int, optimizer: Any, output: Outcome, diagnosis: Diagnosis) -> None:
        """Count the step, and change nothing.

        Raises:
            FloatingPointError: too many in a row; what is known of the last is written down.
        """
        self.skipped += 1
        self.in_a_row += 1
        self.buffers.restore()
        trainer = self.module.trainer
        if self.in_a_row >= self.max_skipped:
            verdict = self.postmortem(step, output, diagnosis)
            trainer.strategy.barrier("postmortem")  # all ranks have written theirs
            raise FloatingPointError(verdict)
        if trainer.is_global_zero:
            log.warning(
                "step %d skipped: loss %.4g, gradient norm %.4g; %d in a row end the run",
                step + 1, output.loss, output.grad_norm, self.max_skipped,
            )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()  # nothing has a gradient: no weight moves, and the step is counted

    def postmortem(self, step: int, output: Outcome, diagnosis: Diagnosis) -> str:
        """Write `RUN/nonfinite-...json`; what to say."""
        module, lr = self.module, diagnosis.lr
        rank, trainer = module.global_rank, module.trainer
        path = Path(trainer.default_root_dir) / f"nonfinite-step-{step + 1:06d}-rank{rank}.json"
        names = [n for n, p in diagnosis.network.named_parameters() if p.requires_grad]
        facts: dict[str, Any] = {
            "step": step + 1,
            "rank": rank,
            "loss": output.loss.item(),
            "own_loss": self.own_loss.item(),
            "images": names_of_batch(trainer),
            "lr": lr,
            **diagnosis.values,
            "precision": str(trainer.precision),
            "settings": "config.yaml",
        }
        norms = dict(zip(names, output.grad_norms.tolist(), strict=True))
        try:
            dump_step(path, module, norms, facts)
        except OSError as error:
            log.error("%s could not be written: %s", path, error)
        return (
            f"{self.in_a_row} steps in a row, up to {step + 1}, had a loss or gradient that"
            f" is not finite; the last checkpoint is sound; see {path}. As a new run, name=..., "
            f"with a lower optim.lr (now {lr:.2e}), or in float32 (trainer.precision=32-true)"
        )

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the counts into a checkpoint, and what decides in which order sums are taken."""
        checkpoint["skipped"] = [self.skipped, self.in_a_row]
        checkpoint["made_with"] = self.made_with()

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Counts go on; what makes sums come out otherwise is said."""
        self.skipped, self.in_a_row = checkpoint.get("skipped", [0, 0])
        before, now = checkpoint.get("made_with", {}), self.made_with()
        differs = [f"{k} {before[k]} (now {now[k]})" for k in before if before[k] != now.get(k)]
        if differs and self.module.trainer.is_global_zero:
            log.warning(
                "this run goes on with the same images at each step, but not bit for bit (what N "
                "ranks share: docs/cluster.md): it had %s", ", ".join(differs),
            )  # fmt: skip

    def made_with(self) -> dict[str, Any]:
        """What decides in which order sums are taken."""
        trainer = self.module.trainer
        return {
            "devices": trainer.world_size,
            "device": trainer.strategy.root_device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the generators that a step draws from: stochastic depth, dropout, sampling of boxes."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
