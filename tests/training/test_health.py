"""Measures of collapse against other formulas, and what is judged by them."""

import math
import re

import numpy as np
import pytest
import torch

from ssl_xcit.objectives.objective import (
    ALIKE,
    EMBEDDINGS_ALIKE,
    ONE_PROTOTYPE,
    ONE_PROTOTYPE_OF_PATCHES,
    UNIFORM,
    UNIFORM_PATCHES,
)
from ssl_xcit.training.health import (
    HEALTHY,
    BufferSnapshot,
    Queue,
    effective_number,
    feature_std,
    grad_norm_groups,
    judge,
    rankme,
)
from ssl_xcit.training.memory import advice, is_out_of_memory


@pytest.mark.parametrize("shape", [(200, 32), (16, 32)])
def test_rankme_by_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, 5:] *= 0.01
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = values / values.sum()
    assert rankme(x).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_measures_at_their_ends():
    assert rankme(torch.eye(8)).item() == pytest.approx(8.0)
    assert rankme(torch.ones(8, 4)).item() == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.zeros(8, 4)).item() == pytest.approx(1.0)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(x).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(3.0 * torch.ones(10, 64)).item() == pytest.approx(0.0, abs=1e-6)
    assert effective_number(torch.tensor([5, 5, 5])) == pytest.approx(3.0)
    assert effective_number(torch.tensor([7])) == pytest.approx(1.0)


def test_a_queue_holds_the_last_rows():
    queue, rows = Queue(7), torch.arange(40.0)[:, None]
    for start, count in ((0, 3), (3, 3), (6, 5), (11, 12), (23, 2)):
        queue.add(rows[start : start + count])
        wanted = rows[max(0, start + count - 7) : start + count]
        assert torch.equal(queue.filled().sort(dim=0).values, wanted)


def values(**other):
    good = {
        "teacher_entropy_share": 0.5, "prototypes_effective": 20.0, "feature_std": 0.5,
        "rankme": 12.0,
    }  # fmt: skip
    return {**good, **other}


@pytest.mark.parametrize(
    ("loss", "measured", "verdict"),
    [
        (3.0, values(), HEALTHY),
        (math.log(128) * 1.0009, values(), UNIFORM),
        (math.log(128) * 0.9991, values(), UNIFORM),
        (math.log(128) * 1.002, values(), HEALTHY),
        (6.0, values(teacher_entropy_share=0.999), UNIFORM),
        (0.1, values(prototypes_effective=1.4), ONE_PROTOTYPE),
        (3.0, values(patch_prototypes_effective=1.1), ONE_PROTOTYPE_OF_PATCHES),
        (3.0, values(patch_entropy_share=0.999), UNIFORM_PATCHES),
        (3.0, values(feature_std=0.01), ALIKE),
        (3.0, values(rankme=1.2), ALIKE),
        (3.0, values(embedding_std=0.5, embedding_rankme=1.1), EMBEDDINGS_ALIKE),
        (3.0, values(embedding_std=0.01, embedding_rankme=9.0), EMBEDDINGS_ALIKE),
    ],
)
def test_verdicts(loss, measured, verdict):
    assert judge(loss, measured, 128) == verdict
    if verdict in (ALIKE, EMBEDDINGS_ALIKE):  # without prototypes too
        assert judge(loss, {k: v for k, v in measured.items() if "_e" not in k}, None) == verdict


def test_groups_of_gradients():
    names = [
        "backbone.patch_embed.proj.0.0.weight", "backbone.blocks.0.attn.qkv.weight",
        "backbone.blocks.5.attn.qkv.weight", "backbone.blocks.11.norm1.weight",
        "backbone.cls_attn_blocks.0.attn.qkv.weight", "backbone.norm.weight",
        "head.mlp.0.weight", "head.last_layer.weight_v",
    ]  # fmt: skip
    groups, of_each = grad_norm_groups(names)
    assert [groups[i] for i in of_each] == [
        "stem", "blocks_first", "blocks_middle", "blocks_last", "class_attention",
        "class_attention", "head", "prototypes",
    ]  # fmt: skip


def test_running_statistics_are_restored():
    norm = torch.nn.BatchNorm1d(4)
    statistics = BufferSnapshot(norm)
    for _ in range(2):
        statistics.keep()
        before = {k: v.clone() for k, v in norm.state_dict().items()}
        norm(torch.full((8, 4), float("nan")))
        assert norm.running_mean.isnan().all()
        statistics.restore()
        assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
        norm(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("images", "accumulate", "advised"),
    [
        (48, 1, "48 images at a time.*checkpoint_blocks=true.*trainer.accumulate=2,"),
        (48, 8, "6 images at a time, of 48.*trainer.accumulate=16,"),
        (3, 2, "2 images at a time.*trainer.accumulate=3,"),
        (4, 4, "1 images at a time.*checkpoint_blocks=true.*smaller model"),
    ],
)
def test_what_to_change_when_memory_runs_out(images, accumulate, advised):
    assert re.search(advised, advice(images, accumulate, "augment.global_size"))


def test_other_errors_are_not_about_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
