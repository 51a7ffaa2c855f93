"""Row 31: fine-tuning that is killed at any moment goes on as if it had not been."""

import random
import time

import pytest
import torch
from runs import STEPS, Place, assert_goes_on, trick
from test_kills import last_checkpoint
from toys import KINDS, data, words

EPOCHS = {"classification": 10, "segmentation": 13.34, "detection": 13.34}  # 40 steps


@pytest.fixture(scope="module", params=KINDS)
def transfer_whole(request, zygote, tmp_path_factory):
    """A run that nothing happened to, with everything that draws random numbers."""
    kind = request.param
    root = data(kind, tmp_path_factory.mktemp(f"{kind}-data"))
    given = words(
        kind, root, f"epochs={EPOCHS[kind]}", "callbacks.checkpoints.every_steps=5", "ema=0.9",
        "callbacks.metrics.every_steps=3", "+callbacks.record._target_=tricks.Record",
        "callbacks.checkpoints.keep_last=2",
    )  # fmt: skip
    here = Place(zygote, tmp_path_factory.mktemp(kind), given)
    here()
    assert here.records()[-1]["step"] == STEPS
    return here


def test_row_31_sigkills_at_random_moments_of_fine_tuning(transfer_whole, zygote, tmp_path):
    """While it starts, between steps and within; weights, moments and the average, bit for bit."""
    place = Place(zygote, tmp_path, transfer_whole.words)
    draw = random.Random(1)
    for n in range(5):
        saved = max((int(p[5:11]) for p in place.checkpoints()), default=0)
        target = min(max(saved, 8 * n) + draw.randint(0, 6), 38)
        run = place.start(*trick("Slow", seconds=0.01))
        if target > saved:
            place.until_step(target, run)
            time.sleep(draw.uniform(0.0, 0.03))
        else:
            time.sleep(draw.uniform(0.0, 0.5))
        run.kill()
    assert_goes_on(place, transfer_whole)
    one, two = last_checkpoint(place), last_checkpoint(transfer_whole)
    assert one == two
    assert any(isinstance(value, bytes | torch.Tensor) for value in one[1].values())


@pytest.mark.parametrize("kind", KINDS)
def test_row_31_two_ranks_train_measure_and_end(kind, zygote, tmp_path):
    """The measure runs on the first rank alone, while training and at the end."""
    given = words(
        kind, data(kind, tmp_path / "data"), "trainer.devices=2", "trainer.strategy=ddp",
        "batch_size=4", "callbacks.online.every_steps=1", "callbacks.online.eval_budget=null",
    )  # fmt: skip
    place = Place(zygote, tmp_path / "place", [w for w in given if w != "callbacks.online=null"])
    place()
    assert (place.run_dir / "summary.json").is_file()
    assert (place.run_dir / "checkpoints" / "best.ckpt").is_file()
