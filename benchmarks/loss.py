"""The DINO loss, forward and backward: ours against the double loop, interleaved.

    python benchmarks/loss.py [--views 10] [--batch 32] [--rounds 9]

Three ways from embeddings (V, B, 256) to the gradients of embeddings and prototypes: the prototype
layer fused with the loss in chunks, as training has it; the prototype layer and `dino_loss` over
its logits; and the prototype layer with log-softmaxes pair by pair, as the original code has it.
Then the loss alone, from logits to their gradient. K = 4096 and 65,536. Prints medians, ratios and
the memory each needs beyond its inputs, and writes benchmarks/results/loss.json.
"""

import argparse
from collections.abc import Callable

import torch
from measure import compared, extra_memory, interleaved, line, save
from torch import Tensor

from ssl_xcit.objectives.prototype_loss import dino_loss, prototype_loss

DIM, TEMPERATURE = 256, 0.1


def double_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """Every pair by itself."""
    out, targets = (student / TEMPERATURE).unbind(), teacher.unbind()
    loss, pairs = torch.zeros(()), 0
    for g, q in enumerate(targets):
        for v, s in enumerate(out):
            if v != g:
                loss = loss + (-q * s.log_softmax(-1)).sum(-1).mean()
                pairs += 1
    return loss / pairs


def sides(K: int) -> dict[str, dict[str, Callable[[], object]]]:
    x = torch.nn.functional.normalize(torch.randn(ARGS.views, ARGS.batch, DIM), dim=-1)
    x.requires_grad_()
    weight = (torch.randn(K, DIM) / 16).requires_grad_()
    gain = torch.ones(K, 1)
    teacher = torch.randn(2, ARGS.batch, K).mul_(4).softmax(-1)
    leaf = torch.randn(ARGS.views, ARGS.batch, K).requires_grad_()

    def layer() -> Tensor:
        return x @ torch._weight_norm(weight, gain).T

    def of_layer(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), [x, weight])

    def of_logits(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            logits = leaf.detach().clone().requires_grad_()  # a step makes new ones, too
            loss(logits.view_as(logits)).backward()

        return run

    return {
        "with the prototypes": {
            "fused": of_layer(lambda: prototype_loss(x, weight, gain, teacher, TEMPERATURE)),
            "logits": of_layer(lambda: dino_loss(layer(), teacher, TEMPERATURE, overwrite=True)),
            "loop": of_layer(lambda: double_loop(layer(), teacher)),
        },
        "loss alone": {
            "ours": of_logits(lambda s: dino_loss(s, teacher, TEMPERATURE, overwrite=True)),
            "loop": of_logits(lambda s: double_loop(s, teacher)),
        },
    }


def main() -> None:
    results = {}
    for K in (4096, 65536):
        for part, works in sides(K).items():
            seconds = interleaved(works, ARGS.rounds)
            memory = {name: extra_memory(work) / 2**20 for name, work in works.items()}
            for name in works:
                if name == "loop":
                    continue
                pair = {key: seconds[key] for key in (name, "loop")}
                found = compared(pair, name, "loop")
                found["extra_mb"] = {key: round(memory[key], 1) for key in pair}
                found["memory_ratio"] = round(memory[name] / memory["loop"], 3)
                results[f"K {K}, {part}, {name}"] = found
                print(
                    f"K {K}, {part}: {line(found)}; extra memory {memory[name]:.0f} MB against "
                    f"{memory['loop']:.0f} MB ({found['memory_ratio']:.2f})",
                    flush=True,
                )
    save("loss", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    ARGS = parser.parse_args()
    torch.manual_seed(0)
    main()
