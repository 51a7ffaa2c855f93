"""Row 32: every objective goes on after kills as if there had been none, and two ranks agree."""

import json
import random
import signal
import time

import pytest
import torch
from runs import TOY, Place, assert_goes_on, trick
from test_kills import last_checkpoint

from ssl_xcit.models.xcit import XCiT

WORDS = [
    *(word for word in TOY if not word.startswith(("objective", "epochs"))),
    "epochs=0.1073", "objective_defaults.hidden_dim=16",  # 20 steps
]  # fmt: skip
TERMS = [f"objective.terms.{term}.num_prototypes=16" for term in ("dino", "region")]
OBJECTIVES = {
    "infonce": ["objective.queue=40", "objective.projected=cls_patch", "objective.spread=1"],
    "simdino": ["augment.stages=[{until:0.5,global_size:24,local_size:12,num_local:1}]"],
    "swav": ["objective.num_prototypes=8", "objective.koleo=0.1", "objective.clip=module"],
    "region": TERMS,
    "dinov2": [
        "objective.terms.dino.num_prototypes=16",
        "objective.terms.ibot.start=0.2",
        "objective.terms.ibot.prototypes.num_prototypes=16",
    ],
    "distillation": ["objective.queue=40", "objective.teacher=TEACHER", "objective.ema=0.9"],
}


def words(name, folder):
    """Of a run with this objective; the teacher is a file in the folder."""
    torch.manual_seed(5)
    backbone = XCiT(48, 1, 2, 8)
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": {}}
    torch.save(content, folder / "teacher.ckpt")
    more = [w.replace("TEACHER", str(folder / "teacher.ckpt")) for w in OBJECTIVES[name]]
    return [*WORDS, f"objective={name}", *more]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_row_32_sigkills_with_each_objective(name, zygote, tmp_path, photos_pair):
    given = words(name, tmp_path)
    undisturbed = Place(zygote, tmp_path / "whole", given)
    undisturbed()
    place = Place(zygote, tmp_path / "killed", given)
    draw = random.Random(name)
    for n in range(2):
        saved = max((int(p[5:11]) for p in place.checkpoints()), default=0)
        target = min(max(saved + 1, 9 * n) + draw.randint(0, 5), 18)
        run = place.start(*trick("Slow", seconds=0.01))
        place.until_step(target, run)
        time.sleep(draw.uniform(0.0, 0.03))
        run.kill()
    assert_goes_on(place, undisturbed)
    assert last_checkpoint(place, 20) == last_checkpoint(undisturbed, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_row_32_stopped_while_a_rate_is_sought(number, zygote, tmp_path, photos_pair):
    """Nothing is left of it, and the same command finds the same rate."""
    place = Place(zygote, tmp_path / "place", [*words("simdino", tmp_path), "optim.lr=auto"])
    run = place.start()
    out = run.outputs[0]
    place.until(lambda: out.exists() and "lr=auto: 20 steps" in out.read_text(), run)
    run.send(number)
    assert run.wait() == {signal.SIGTERM: 75, signal.SIGINT: 130}.get(number, -number)
    assert "Traceback" not in run.err
    assert number == signal.SIGKILL or f"stopped by {number.name}" in run.out
    assert not place.checkpoints()
    whole = Place(zygote, tmp_path / "whole", place.words)
    for each in (place, whole):
        each()
    plans = [json.loads((each.run_dir / "run.json").read_text())["plan"] for each in (place, whole)]
    assert plans[0] == plans[1]
    assert last_checkpoint(place, 20) == last_checkpoint(whole, 20)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_row_32_two_ranks_with_each_objective(name, zygote, tmp_path, photos_pair):
    given = [w for w in words(name, tmp_path) if not w.startswith("epochs")]
    place = Place(zygote, tmp_path / "two", given)
    place("epochs=0.0323", "trainer.devices=2", "collective_timeout=20", timeout=120)
    ours, theirs = place.records(0), place.records(1)
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a["images"] != b["images"]
        assert a["state"] == b["state"]


def test_row_32_another_objective_is_refused(zygote, tmp_path, photos_pair):
    place = Place(zygote, tmp_path / "place", words("simdino", tmp_path))
    run = place.start(*trick("Slow", seconds=0.01))
    place.until_step(6, run)
    run.kill()
    assert "objective._target_=ssl_xcit.objectives.simdino.SimDINO (now" in place(
        "objective=infonce", status=2
    )
