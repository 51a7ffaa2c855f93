"""What it costs that a run cannot be lost: the share of a step that guarding and watching it take,
and the time to write a checkpoint.

python benchmarks/reliability.py
python benchmarks/reliability.py --model small_12_p16 --batch 8 --prototypes 65536
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import step
import torch
from measure import save

from ssl_xcit import create_model
from ssl_xcit.models.head import DINOHead
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.objective import RunLength, Signs
from ssl_xcit.training.checkpoint import serialized, write_checkpoint
from ssl_xcit.training.health import Health
from ssl_xcit.training.module import Pretraining, Schedules, StepOutput, make_networks
from ssl_xcit.utils.files import sha256_of

REPORT_EVERY = 10  # steps, as conf/callbacks/default.yaml has it


def make() -> Pretraining:
    backbone = create_model(f"xcit_{step.ARGS.model}")
    objective = DINO(
        RunLength(1000, 10, 100.0, 1000, 10.0), DINOHead, num_prototypes=step.ARGS.prototypes,
        ema=0.99, teacher_temp_start=0.04, teacher_temp=0.04,
    )  # fmt: skip
    head = objective.make_head(backbone.embed_dim)
    student, teacher = make_networks(backbone, head, create_model(f"xcit_{step.ARGS.model}"))
    constant = Schedules(*[lambda number: 0.5] * 3)
    return Pretraining(student, teacher, objective, constant, torch.optim.AdamW)


def seconds_of(work: Callable[[], object], rounds: int = 30) -> float:
    """Median."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    views = step.random_views()
    whole = step.our_step(views, "fp32")
    whole()
    step_seconds = seconds_of(whole, 5)

    module, health = make(), Health()
    module.on_train_start()
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    K, B, C = step.ARGS.prototypes, step.ARGS.batch, module.student.backbone.embed_dim
    named = [p for p in module.student.parameters() if p.requires_grad]
    module.output = StepOutput(
        loss=torch.tensor(1.0),
        grad_norm=torch.tensor(1.0),
        grad_norms=torch.rand(len(named)),
        losses={},
        signs=Signs(rows=torch.randn(2, B, K).softmax(-1)),
        features=torch.randn(2, B, C),
    )

    def queue() -> None:
        health.on_train_batch_end(None, module)  # type: ignore[arg-type]

    for _ in range(1024 // B):
        queue()
    loss = module.output.loss
    parts = {
        "running statistics kept": seconds_of(module.buffers_before.keep),
        "finite?": seconds_of(lambda: module.on_any_rank(~torch.isfinite(loss))),
        "queues": seconds_of(queue),
        f"report, a {REPORT_EVERY}th": seconds_of(lambda: health.report(module, 1), 10)
        / REPORT_EVERY,
    }
    share = sum(parts.values()) / step_seconds
    print(
        f"{step.ARGS.model}, batch {B}, K {K}: a step {step_seconds:.2f} s; "
        + ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in parts.items())
        + f"; together {100 * share:.3f} % of the step"
    )

    optimizer = torch.optim.AdamW(named)
    for p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    content = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "checkpoints/step-000001.ckpt"
        plain = seconds_of(lambda: torch.save(content, Path(folder) / "plain.ckpt"), 3)
        copied = seconds_of(lambda: serialized(content), 3)
        data = serialized(content)
        written = seconds_of(lambda: write_checkpoint(data, path), 3)
        size = path.stat().st_size / 1e6
        hashed = seconds_of(lambda: sha256_of(path), 3)
    print(
        f"checkpoint of {size:.0f} MB: the step waits {copied:.2f} s; a thread writes it in "
        f"{written:.2f} s, of which reading back and comparing {hashed:.2f} s; torch.save alone "
        f"{plain:.2f} s"
    )
    save("reliability", {f"{step.ARGS.model}, batch {B}, K {K}": {
        "step_seconds": step_seconds, "parts": parts, "share": share, "checkpoint_mb": size,
        "copy_seconds": copied, "write_seconds": written, "torch_save_seconds": plain,
        "verify_seconds": hashed,
    }})  # fmt: skip


if __name__ == "__main__":
    step.ARGS = step.parser.parse_args()
    main()
