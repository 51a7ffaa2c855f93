"""Rows 1 to 8, 14 to 18: a run that is killed or stopped anywhere goes on as if it had not been."""

import os
import random
import shutil
import signal
import stat
import time
from collections import Counter

import pytest
import torch
from commands import EVALUATION
from runs import STEPS, TOY, assert_equal_runs

from ssl_xcit.data.order import image_at
from ssl_xcit.models.checkpoint_manifest import read_manifest
from ssl_xcit.models.weights import read_checkpoint

NO_RECORD = [w for w in TOY if "record" not in w]


def weights(place):
    (newest,) = [p for p in place.checkpoints() if p == f"step-{STEPS:06d}.ckpt"]
    return read_checkpoint(place.run_dir / "checkpoints" / newest)


def assert_equal_ends(place, reference):
    """Weights, optimizer, loops, callbacks: the last checkpoints hold the same, bit for bit."""

    def compare(a, b, where):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for n, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}.{n}")
        elif isinstance(a, torch.Tensor):
            same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
            assert same, where
        elif ".loops." not in f".{where}.":  # Lightning counts batches of this process there
            assert a == b, where

    ours, theirs = weights(place), weights(reference)
    compare(ours, theirs, "checkpoint")


def test_row_01_sigkill_at_any_step(place, whole):
    """Lost work is less than one checkpoint interval."""
    for step in (3, 12, 27):
        run = place.start("+callbacks.slow._target_=tricks.Slow", "+callbacks.slow.seconds=0.02")
        place.until_step(step, run)
        run.kill()
        assert run.wait() == -signal.SIGKILL
        reached = max(r["step"] for r in place.records())
        saved = [int(p[5:11]) for p in place.checkpoints()]
        assert reached - max(saved, default=0) <= 5
    assert place()[0] == 0
    assert_equal_runs(place, whole)
    assert_equal_ends(place, whole)


def test_row_01_twenty_sigkills_at_random_moments_in_one_run(place, whole):
    """While it starts, between steps, within steps and writes; the target moves on with the number
    of kills, so that there are twenty before the end.
    """
    draw = random.Random(0)
    for n in range(20):
        saved = max((int(p[5:11]) for p in place.checkpoints()), default=0)
        target = min(draw.randint(saved, saved + 7), 38 * (n + 1) // 20)
        run = place.start("+callbacks.slow._target_=tricks.Slow", "+callbacks.slow.seconds=0.02")
        if target > saved:
            place.until_step(target, run)
            time.sleep(draw.uniform(0.0, 0.03))
        else:
            time.sleep(draw.uniform(0.0, 0.5))
        run.kill()
        assert run.wait() == -signal.SIGKILL
    status, err = place()
    assert status == 0, err
    assert_equal_runs(place, whole)
    assert_equal_ends(place, whole)


def test_row_02_sigkill_during_a_write_on_another_file_system(place, whole, request):
    """Twenty writes cut at random bytes, and between the manifest and the rename; none corrupt."""
    other = request.getfixturevalue("other_file_system")
    out = f"out={other}"
    place.run_dir = other / "x"
    draw = random.Random(0)
    for n in range(20):
        limit = -1 if n % 5 == 4 else draw.randrange(1_250_000)
        number = 2 if n % 3 == 0 else 1  # so seven of the run's eight are written meanwhile
        env = {"WRITE_NUMBER": str(number), "WRITE_BYTES": str(limit)}
        status, err = place(out, env=env, call=["die_within_a_write"])
        assert status == -signal.SIGKILL, err
        assert "corrupt" not in err
        manifest = read_manifest(place.run_dir / "checkpoints")
        assert set(place.checkpoints()) <= set(manifest)
    status, err = place(out)
    assert status == 0, err
    assert "corrupt" not in "".join(r.err for r in place.runs)
    assert not list((place.run_dir / "checkpoints").glob("*.corrupt"))
    assert_equal_runs(place, whole)


@pytest.fixture
def other_file_system(tmp_path):
    """A folder on another file system than the temporary folder."""
    from pathlib import Path
    from tempfile import mkdtemp

    here = os.stat(tmp_path).st_dev
    candidates = [p for p in (Path("/dev/shm"), Path.home(), Path.cwd()) if os.access(p, os.W_OK)]
    found = next((p for p in candidates if os.stat(p).st_dev != here), Path.cwd())
    folder = Path(mkdtemp(prefix="ssl_xcit-test-", dir=found))
    yield folder
    shutil.rmtree(folder)


def test_row_03_left_over_temporary_files(place, tmp_path):
    """Swept at the next start, only this run's; the system's temporary folder stays empty."""
    temp = tmp_path / "temp"
    temp.mkdir()
    env = {"WRITE_NUMBER": "2", "WRITE_BYTES": "20000", "TMPDIR": str(temp)}
    assert place(env=env, call=["die_within_a_write"])[0] == -signal.SIGKILL
    left = list((place.run_dir / "checkpoints").glob(".*.part"))
    assert len(left) == 1
    stranger = place.folder / "runs/y/checkpoints/.step-000005.ckpt.part"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("of another run")
    assert place(env={"TMPDIR": str(temp)})[0] == 0
    assert not list(place.run_dir.rglob(".*"))
    assert stranger.exists()
    assert not list(temp.iterdir())


def test_row_04_sigterm(place, whole):
    run = place.start("+callbacks.hold._target_=tricks.Hold", "+callbacks.hold.step=8")
    holding = place.run_dir / "holding-0"
    place.until(holding.exists, run)
    run.kill(signal.SIGTERM)
    time.sleep(0.1)
    holding.unlink()
    assert run.wait(10) == 75
    assert place.checkpoints()[-1] == "step-000008.ckpt"
    assert "the same command goes on from step-000008" in run.out
    assert place()[0] == 0
    assert_equal_runs(place, whole)
    assert_equal_ends(place, whole)


def test_row_06_a_second_sigterm_while_saving(place, whole, tmp_path):
    mark = tmp_path / "writing"
    run = place.start(env={"WRITING": str(mark)}, call=["slow_writes"])
    place.until(mark.exists, run)
    for _ in range(3):
        run.kill(signal.SIGTERM)
        time.sleep(0.1)
    assert run.wait() == 75
    assert place.checkpoints() == ["step-000005.ckpt"]
    assert place()[0] == 0
    assert "corrupt" not in place.runs[-1].err
    assert_equal_runs(place, whole)


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


def test_row_07_sigusr1_under_slurm(place, whole, tmp_path):
    """Saved first, then one requeue."""
    calls, bin_dir = tmp_path / "calls", tmp_path / "bin"
    bin_dir.mkdir()
    scontrol = bin_dir / "scontrol"
    newest = place.run_dir / "checkpoints/step-000008.ckpt"
    scontrol.write_text(f'#!/bin/sh\ntest -e {newest} && echo saved "$@" >> {calls}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    env = {**SLURM, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    hold = ["+callbacks.hold._target_=tricks.Hold", "+callbacks.hold.step=8"]
    run = place.start(*hold, env=env)
    holding = place.run_dir / "holding-0"
    place.until(holding.exists, run)
    run.kill(signal.SIGUSR1)
    run.kill(signal.SIGUSR1)
    time.sleep(0.1)
    holding.unlink()
    assert run.wait() == 75, run.err
    assert calls.read_text() == "saved requeue 4711\n"
    assert place(env=env)[0] == 0
    assert_equal_runs(place, whole)


def test_row_08_ctrl_c_once_and_twice(place, whole):
    hold = ["+callbacks.hold._target_=tricks.Hold", "+callbacks.hold.step=7"]
    for times, saved in ((2, "step-000005.ckpt"), (1, "step-000007.ckpt")):
        run = place.start(*hold)
        holding = place.run_dir / "holding-0"
        place.until(holding.exists, run)
        for _ in range(times):
            run.kill(signal.SIGINT)
            time.sleep(0.2)
        if times == 1:
            holding.unlink()
        assert run.wait(10) == 130
        holding.unlink(missing_ok=True)
        assert place.checkpoints()[-1] == saved
        assert "Traceback" not in run.err
    assert place()[0] == 0
    assert_equal_runs(place, whole)


def test_row_07_sigusr1_after_training(place, tmp_path):
    """While the features are measured: nothing is to be saved, and the job is queued again."""
    calls, bin_dir = tmp_path / "calls", tmp_path / "bin"
    bin_dir.mkdir()
    scontrol = bin_dir / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    env = {**SLURM, "PATH": f"{bin_dir}:{os.environ['PATH']}", "THE_SIGNAL": "SIGUSR1"}
    assert place(env=env, call=["signal_after_training"])[0] == 75
    assert calls.read_text() == "requeue 4711\n"
    assert place(env=env)[0] == 0


def test_a_signal_before_training_leaves_at_once(place):
    """There is nothing to save yet."""
    run = place.start(call=["signal_before_training"])
    assert run.wait() == 75
    assert "starts again" in run.out
    assert place()[0] == 0


def test_a_signal_after_training_ends_the_evaluation(place):
    """Everything is saved; the same command evaluates."""
    words = [w for w in TOY if not w.startswith("eval_data")]
    more = ["evaluation.baselines=null", *EVALUATION]
    run = place.start(*more, words=words, call=["signal_after_training"])
    assert run.wait() == 75, run.err
    assert "goes on from step-000040" in run.out
    assert not (place.run_dir / "summary.json").exists()
    before = len(place.records())
    assert place(*more, words=words)[0] == 0
    assert (place.run_dir / "summary.json").exists()
    assert len(place.records()) == before


@pytest.mark.parametrize("workers", [1, 2, 3], ids=str)
def test_row_14_another_number_of_workers(place, whole, workers):
    run = place.start()
    place.until_step(11, run)
    run.kill()
    run.wait()
    status, err = place(f"num_workers={workers}")
    assert status == 0, err
    assert_equal_runs(place, whole)
    assert_equal_ends(place, whole)


def test_row_16_a_changed_configuration(place):
    run = place.start()
    place.until_step(11, run)
    run.kill()
    run.wait()
    before = sorted(place.run_dir.rglob("*"))
    status, err = place("optim.weight_decay=0.1", "objective.clip_norm=1")
    assert status == 2
    assert "objective.clip_norm=3.0 (now 1)" in err
    assert "optim.weight_decay=0.04 (now 0.1)" in err
    config = place.run_dir / "config.yaml"
    original = config.read_text()
    config.write_text(original.replace("clip_norm: 3.0", "clip_norm: 1.0"))
    status, err = place("objective.clip_norm=1.0")
    assert status == 2
    assert "config.yaml has been changed" in err
    config.write_text(original)
    assert sorted(place.run_dir.rglob("*")) == before
    assert place("callbacks.checkpoints.keep_last=3", "worker_timeout=60")[0] == 0


@pytest.mark.parametrize("step", [9, 10, 11])
def test_row_17_around_an_epochs_end_after_validation_with_accumulation(place, zygote, step):
    """Ten images a pass, so that passes end within steps; k-NN at step 10; two parts a step."""
    from runs import Place

    more = [
        "trainer.accumulate=2", "eval_data=photos",
        "callbacks.online.every_steps=10", "callbacks.online.max_images=60",
        "callbacks.online.evaluators.knn.k=[5]", "evaluation.baselines=null",
        "callbacks.online.eval_budget=null", "callbacks.online.best=knn_k5", *EVALUATION,
    ]  # fmt: skip
    words = [w for w in TOY if not w.startswith(("eval_data", "~callbacks"))]
    words = [w for w in words if w != "batch_size=8"]
    more += ["data=list", f"data.file={ten_photos(place)}", "model=xcit_micro_4_p8", "batch_size=8"]
    more += ["epochs=32"]  # of 10 images: 40 steps
    other = Place(zygote, place.folder / "whole")
    other.folder.mkdir()
    assert other(*more, words=words)[0] == 0, other.runs[-1].err
    run = place.start(
        *more, "+callbacks.hold._target_=tricks.Hold", f"+callbacks.hold.step={step + 1}",
        words=words,
    )  # fmt: skip
    place.until((place.run_dir / "holding-0").exists, run)
    run.kill()
    run.wait()
    (place.run_dir / "holding-0").unlink()
    assert place(*more, words=words)[0] == 0, place.runs[-1].err
    assert_equal_runs(place, other)
    assert [r["knn_k5"] for r in other.metrics() if r["knn_k5"]] != []


def test_row_17_killed_behind_a_checkpoint(place, whole):
    """Whatever is logged at a step is logged before the step is saved."""
    env = {"WRITE_NUMBER": "3", "WRITE_BYTES": "-1"}
    status, err = place(env=env, call=["die_behind_a_write"])
    assert status == -signal.SIGKILL, err
    assert place.checkpoints()[-1] == "step-000015.ckpt"
    assert [r["step"] for r in place.metrics()][-1] == "15"
    assert place()[0] == 0
    assert_equal_runs(place, whole)


def ten_photos(place):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    names = []
    for n in range(10):
        names.append(str(place.folder / f"{n}.png"))
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(names[-1])
    file = place.folder / "ten.txt"
    file.write_text("\n".join(names) + "\n")
    return file


def test_row_18_the_same_samples_over_a_crash(place, whole):
    """By the record, of the last time that each step was made; and by the pure function."""
    run = place.start()
    place.until_step(13, run)
    run.kill()
    run.wait()
    assert place()[0] == 0
    last = {r["step"]: r["images"] for r in place.records()}
    seen = Counter(i for images in last.values() for i in images)
    assert seen == Counter(i for r in whole.records() for i in r["images"])
    assert seen == Counter(image_at(0, n, 1494) for n in range(8 * STEPS))
    assert max(seen.values()) == 1  # less than a pass
