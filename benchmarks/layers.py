"""Layers that compute or keep less, each against the plain form of the same function, interleaved.

    python benchmarks/layers.py [--rounds 11]

`mixing`: attention across channels head by head on strided views against batched products on
copies. `class attention`: without keys and values against with them. `mlp`: the branch by parts
against its four layers, with the memory kept for the backward pass. `drop path`: a block whose
dropped samples are not computed against one that multiplies them by 0, at rate 0.1. `block`,
`stem` and `local patch interaction`: with the kernels against the plain forms, the first two in
float32 and bfloat16. Forward and backward, float32 but for these, at the sizes of a DINO step.
Writes benchmarks/results/layers.json.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import compared, interleaved, line, save
from torch import Tensor, nn
from torch.nn.functional import linear

from ssl_xcit import create_model
from ssl_xcit.models.class_attention import ClassAttention
from ssl_xcit.models.fused_block import local_branch
from ssl_xcit.models.kernels import kernels
from ssl_xcit.models.layers import DropPath
from ssl_xcit.models.xca import ChannelMixing, channel_attention

SIZES = (  # model, images, rows of patches
    ("nano_12_p16", 128, 6),
    ("nano_12_p16", 32, 14),
    ("small_12_p16", 64, 6),
    ("small_12_p16", 16, 14),
    ("tiny_12_p16", 1, 56),
)


def mixing(qkv: Tensor, temperature: Tensor) -> Tensor:
    B, N, C = qkv.shape
    q, k, v = qkv.view(B, N, 3, len(temperature), -1).permute(2, 0, 3, 4, 1)
    mixed = v.mT @ channel_attention(q, k, temperature).mT
    return mixed.transpose(1, 2).reshape(B, N, C // 3)


def with_keys_and_values(layer: ClassAttention, x: Tensor) -> Tensor:
    q, kv = x[:, 0], linear(x, layer.qkv.weight[x.shape[-1] :], layer.qkv.bias[x.shape[-1] :])
    q = linear(q, layer.qkv.weight[: x.shape[-1]], layer.qkv.bias[: x.shape[-1]])
    k, v = kv.unflatten(-1, (2, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = q.unflatten(-1, (layer.num_heads, 1, -1))
    out = nn.functional.scaled_dot_product_attention(q, k, v)
    return layer.proj(out.transpose(1, 2).flatten(2))


def by_factor(self: DropPath, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    return self(x, branch(x))


def kept_bytes(forward: Callable[[], Tensor], without: set[int]) -> int:
    """What autograd keeps for the backward pass, parameters and inputs not counted."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in without:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()  # alive until all is counted
    del kept
    return sum(sizes.values())


def main() -> None:
    results: dict[str, Any] = {}

    def pair(title: str, fast: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
            def run() -> None:
                out = forward()
                out.backward(torch.ones_like(out))

            return run

        sides = {"ours": both(fast), "plain": both(plain)}
        results[title] = compared(interleaved(sides, ARGS.rounds, 2), "ours", "plain")
        print(f"{title}: {line(results[title])}", flush=True)

    plain_drop_path = DropPath.by_sample
    for name, B, side in SIZES:
        model = create_model(f"xcit_{name}")
        block, last = model.blocks[0], model.cls_attn_blocks[0].attn
        N, C = side**2, model.embed_dim
        where = f"{name}, {B} images of {N} tokens"
        x, qkv = torch.randn(B, N, C).requires_grad_(), torch.randn(B, N, 3 * C).requires_grad_()
        temperature = block.attn.temperature
        pair(
            f"mixing, {where}",
            lambda q=qkv, t=temperature: ChannelMixing.apply(q, t),
            lambda q=qkv, t=temperature: mixing(q, t),
        )
        pair(
            f"class attention, {where}",
            lambda m=last, x=x: m(x),
            lambda m=last, x=x: with_keys_and_values(m, x),
        )
        parts = (
            lambda b=block, x=x: b.mlp.of_norm(x, b.norm2, b.gamma2),
            lambda b=block, x=x: b.mlp(b.norm2(x), b.gamma2),
        )
        title = f"mlp, {where}"
        pair(title, *parts)
        known = {t.untyped_storage().data_ptr() for t in (x, *block.parameters())}
        results[title]["kept_mb"] = [round(kept_bytes(f, known) / 2**20, 1) for f in parts]
        print(f"  kept for the backward pass: {results[title]['kept_mb']} MB")
        if (run := kernels()) is not None:
            pair(
                f"local patch interaction by kernels, {where}",
                lambda k=run, b=block, x=x, s=side: local_branch(
                    k, x, b.norm3, b.local_mp, (s, s), b.gamma3, None
                ),
                lambda b=block, x=x, s=side: x + b.local_mp(b.norm3(x), (s, s), b.gamma3),
            )
        dropping = create_model(f"xcit_{name}", drop_path=0.1).blocks[0]

        def masked(b: nn.Module = dropping, x: Tensor = x, side: int = side) -> Tensor:
            DropPath.by_sample = by_factor  # type: ignore[method-assign]
            try:
                return b(x, (side, side))
            finally:
                DropPath.by_sample = plain_drop_path  # type: ignore[method-assign]

        for part, inputs, *arguments in (
            ("block", x, (side, side)),
            ("stem", torch.randn(B, 3, 16 * side, 16 * side)),
        ):
            plain, fused = (create_model(f"xcit_{name}") for _ in range(2))
            fused.fuse()
            plain, fused = (
                m.blocks[0] if part == "block" else m.patch_embed for m in (plain, fused)
            )
            for precision in (torch.float32, torch.bfloat16):

                def of(module: nn.Module, x=inputs, a=arguments, p=precision) -> Any:
                    def forward() -> Tensor:
                        with torch.autocast("cpu", torch.bfloat16, enabled=p == torch.bfloat16):
                            return module(x, *a)

                    return forward

                title = f"{part} by kernels, {str(precision).removeprefix('torch.')}, {where}"
                pair(title, of(fused), of(plain))
        pair(f"drop path, {where}", lambda b=dropping, x=x, s=side: b(x, (s, s)), masked)
    save("layers", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    ARGS = parser.parse_args()
    torch.manual_seed(0)
    main()
