"""Collapse provoked in each way, and memory that runs out."""

import re

import pytest
import torch
from runs import trick

from ssl_xcit.models.xcit import XCiT

PHOTOS = [
    "pretrain", "epochs=1.5", "batch_size=16", "num_workers=0", "eval_data=none",
    "~callbacks.online", "trainer=cpu", "trainer.precision=32-true", "model.embed_dim=64",
    "model.depth=2", "model.num_heads=2", "augment.global_size=32", "augment.local_size=16",
    "augment.num_local=2", "objective=dino", "objective.num_prototypes=128",
    "objective.head.hidden_dim=64",
    "objective.head.bottleneck_dim=32", "callbacks.metrics.every_steps=5", "report=null",
]  # fmt: skip
UNIFORM, ONE, ALIKE = "a uniform distribution", "one prototype", "nearly the same"


OTHERS = ("infonce", "simdino", "swav", "region", "ibot", "dinov2", "distillation")


def of_patches(term):
    """Too high a temperature of the teacher, for patches alone."""
    key = f"objective.terms.{term}"
    return [f"{key}.teacher_temp_start=1.0", f"{key}.teacher_temp=1.0"]


def temperature(value):
    return [f"objective.teacher_temp_start={value}", f"objective.teacher_temp={value}"]


@pytest.mark.parametrize(
    ("more", "call", "said"),
    [
        (["epochs=1"], [], None),
        ([], ["no_centering"], f"{ONE} takes all images: lower objective.center_momentum"),
        (["epochs=1", *temperature(1.0)], [], f"{UNIFORM}: lower objective.teacher_temp"),
        (["epochs=1", *temperature(0.3)], [], f"{UNIFORM}: lower objective.teacher_temp"),
        # which of the two comes is chaotic, and differs between processors
        (["optim.lr=1.0"], [], f"{ALIKE}: lower optim.lr|{UNIFORM}: lower .* then optim.lr"),
    ],
    ids=["healthy", "no_centering", "no_sharpening", "high_temperature", "lr_x_400"],
)
def test_collapse_is_seen_and_said(place, more, call, said):
    err = place("epochs=2", *more, words=PHOTOS, call=call, timeout=120)
    verdicts = re.findall(r"step (\d+): (.*)", err)
    rows = place.metrics()
    if said is None:
        assert not verdicts
        assert {r["healthy"] for r in rows} == {"1.0"}
    else:
        assert any(re.search(said, words) for _, words in verdicts), err
        assert float(rows[-1]["healthy"]) == 0.0
        assert int(verdicts[0][0]) < 180
        assert "not healthy" in place.runs[-1].out
    names = {"teacher_entropy", "center_norm", "feature_std", "rankme", "prototypes_used"}
    assert names <= rows[0].keys()
    assert {"grad_norm_stem", "grad_norm_head", "grad_norm_prototypes"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        *((name, ["optim.lr=1.0"], f"{ALIKE}|{UNIFORM}|{ONE}") for name in OTHERS),
        ("region", of_patches("region"), f"{UNIFORM} of patches"),
        ("dinov2", of_patches("ibot.prototypes"), f"{UNIFORM} of patches"),
    ],
)
def test_row_32_collapse_is_seen_with_other_objectives(objective, more, said, place):
    """Within 200 steps, of which most are not needed: the run ends where it is said."""
    plain = [word for word in PHOTOS if not word.startswith(("objective", "epochs"))]
    if objective == "swav":
        more = [*more, "objective.num_prototypes=16"]
    if objective == "distillation":
        torch.manual_seed(0)
        torch.save(XCiT(16, 1, 2, 8).state_dict(), place.folder / "teacher.pth")
        more = [*more, "objective.teacher=teacher.pth"]
    err = place(
        "epochs=2", f"objective={objective}", "objective_defaults.hidden_dim=64",
        "callbacks.health.stop_on_collapse=true", *more, words=plain, timeout=120, status=1,
    )  # fmt: skip
    assert re.search(rf"step \d+: [^:]*({said})[^:]*: lower .*; stopped, as", err), err


def test_a_collapse_can_end_the_run(place):
    stop = "callbacks.health.stop_on_collapse=true"
    assert UNIFORM in place(stop, "epochs=0.7", *temperature(1.0), words=PHOTOS, status=1)


def test_a_run_that_goes_on_sick_says_so_and_can_be_stopped(place):
    more = ["epochs=0.7", "callbacks.checkpoints.every_steps=40", *temperature(1.0)]
    run = place.start(*more, *trick("Slow", seconds=0.01), words=PHOTOS)
    place.until(lambda: "step-000040.ckpt" in place.checkpoints(), run)
    run.kill()
    assert UNIFORM in run.err
    err = place(*more, "callbacks.health.stop_on_collapse=true", words=PHOTOS, status=1)
    assert f"step 45: the teacher has collapsed to {UNIFORM}" in err


def test_memory_that_runs_out(place):
    """The message names twice as many parts, and those fit."""
    more = ["batch_size=16", "epochs=0.05"]
    err = place(*more, words=PHOTOS, call=["small_memory"], status=1)
    found = re.search(r"16 images at a time, of 16 .*(trainer\.accumulate=2),", err)
    assert found, err
    place(*more, found[1], words=PHOTOS, call=["small_memory"])
