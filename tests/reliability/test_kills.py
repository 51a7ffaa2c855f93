"""Rows 1 to 8, 14 to 18: a run that is killed or stopped anywhere goes on as if it had not been."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

import pytest
from commands import EVALUATION, images
from runs import STEPS, TOY, Place, assert_equal_runs, assert_goes_on, content_of, trick

from ssl_xcit.data.order import image_at
from ssl_xcit.models.checkpoint_manifest import read_manifest


def last_checkpoint(place, step=STEPS):
    """All that it holds."""
    return content_of(place.run_dir / f"checkpoints/step-{step:06d}.ckpt")


def test_row_01_sigkill_at_any_step(place, whole):
    """Lost work is less than one checkpoint interval."""
    for step in (3, 12, 27):
        place.killed_at(step, *trick("Slow", seconds=0.02))
        reached = max(r["step"] for r in place.records())
        saved = [int(p[5:11]) for p in place.checkpoints()]
        assert reached - max(saved, default=0) <= 5
    assert_goes_on(place, whole)
    assert last_checkpoint(place) == last_checkpoint(whole)


def test_row_01_twenty_sigkills_at_random_moments_in_one_run(place, whole):
    """While it starts, between steps, within steps and writes; the target moves on with the number
    of kills, so that there are twenty before the end.
    """
    draw = random.Random(0)
    for n in range(20):
        saved = max((int(p[5:11]) for p in place.checkpoints()), default=0)
        target = min(draw.randint(saved, saved + 7), 38 * (n + 1) // 20)
        run = place.start(*trick("Slow", seconds=0.02))
        if target > saved:
            place.until_step(target, run)
            time.sleep(draw.uniform(0.0, 0.03))
        else:
            time.sleep(draw.uniform(0.0, 0.5))
        run.kill()
    assert_goes_on(place, whole)
    assert last_checkpoint(place) == last_checkpoint(whole)


def test_row_02_sigkill_during_a_write_on_another_file_system(place, whole, other_file_system):
    """Twenty writes cut at random bytes, and between the manifest and the rename; none corrupt."""
    out = f"out={other_file_system}"
    place.run_dir = other_file_system / "x"
    draw = random.Random(0)
    for n in range(20):
        limit = -1 if n % 5 == 4 else draw.randrange(1_250_000)
        number = 2 if n % 3 == 0 else 1  # so seven of the run's eight are written meanwhile
        env = {"WRITE_NUMBER": str(number), "WRITE_BYTES": str(limit)}
        err = place(out, env=env, call=["die_within_a_write"], status=-signal.SIGKILL)
        assert "corrupt" not in err
        manifest = read_manifest(place.run_dir / "checkpoints")
        assert set(place.checkpoints()) <= set(manifest)
    assert "corrupt" not in place(out)
    assert not list((place.run_dir / "checkpoints").glob("*.corrupt"))
    assert_equal_runs(place, whole)


@pytest.fixture
def other_file_system(tmp_path):
    """A folder on another file system than the temporary folder."""
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
    place(env=env, call=["die_within_a_write"], status=-signal.SIGKILL)
    left = list((place.run_dir / "checkpoints").glob(".*.part"))
    assert len(left) == 1
    stranger = place.folder / "runs/y/checkpoints/.step-000005.ckpt.part"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("of another run")
    place(env={"TMPDIR": str(temp)})
    assert not list(place.run_dir.rglob(".*"))
    assert stranger.exists()
    assert not list(temp.iterdir())


def test_row_04_sigterm(place, whole):
    run, holding = place.held_at(8)
    run.send(signal.SIGTERM)
    time.sleep(0.1)
    holding.unlink()
    run.ends(75, timeout=10)
    assert place.checkpoints()[-1] == "step-000008.ckpt"
    assert "the same command goes on from step-000008" in run.out
    assert_goes_on(place, whole)
    assert last_checkpoint(place) == last_checkpoint(whole)


def test_row_06_a_second_sigterm_while_saving(place, whole, tmp_path):
    mark = tmp_path / "writing"
    run = place.start(env={"WRITING": str(mark)}, call=["slow_writes"])
    place.until(mark.exists, run)
    for _ in range(3):
        run.send(signal.SIGTERM)
        time.sleep(0.1)
    run.ends(75)
    first, last = place.checkpoints()  # the one that was being written, and where it stopped
    assert first == "step-000005.ckpt"
    assert f"step-{place.records()[-1]['step']:06d}.ckpt" == last
    assert "corrupt" not in place()
    assert_equal_runs(place, whole)


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path):
    """(environment of a job, file to which its `scontrol` writes what it was asked for)."""
    calls, scontrol = tmp_path / "calls", tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    newest = tmp_path / "runs/x/checkpoints/step-000008.ckpt"
    scontrol.write_text(f'#!/bin/sh\ntest -e {newest} && set saved "$@"\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    return {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}, calls


def test_row_07_sigusr1_under_slurm(place, whole, slurm):
    """Saved first, then one requeue."""
    env, calls = slurm
    run, holding = place.held_at(8, env=env)
    run.send(signal.SIGUSR1)
    run.send(signal.SIGUSR1)
    time.sleep(0.1)
    holding.unlink()
    run.ends(75)
    assert calls.read_text() == "saved requeue 4711\n"
    place(env=env)
    assert_equal_runs(place, whole)


def test_row_08_ctrl_c_once_and_twice(place, whole):
    for times, saved in ((2, "step-000005.ckpt"), (1, "step-000007.ckpt")):
        run, holding = place.held_at(7)
        for _ in range(times):
            run.send(signal.SIGINT)
            time.sleep(0.2)
        if times == 1:
            holding.unlink()
        run.ends(130, timeout=10)
        holding.unlink(missing_ok=True)
        assert place.checkpoints()[-1] == saved
    assert_goes_on(place, whole)


def test_row_07_sigusr1_after_training(place, slurm):
    """While the features are measured: nothing is to be saved, and the job is queued again."""
    env, calls = slurm
    env["THE_SIGNAL"] = "SIGUSR1"
    place(env=env, call=["signal_after_training"], status=75)
    assert calls.read_text() == "requeue 4711\n"
    place(env=env)


def test_a_signal_before_training_leaves_at_once(place):
    """There is nothing to save yet."""
    place(call=["signal_before_training"], status=75)
    assert "starts again" in place.runs[-1].out
    place()


def test_a_signal_after_training_ends_the_evaluation(place):
    """Everything is saved; the same command evaluates."""
    words = [w for w in TOY if not w.startswith("eval_data")]
    more = ["evaluation.baselines=null", *EVALUATION]
    place(*more, words=words, call=["signal_after_training"], status=75)
    assert "goes on from step-000040" in place.runs[-1].out
    assert not (place.run_dir / "summary.json").exists()
    before = len(place.records())
    place(*more, words=words)
    assert (place.run_dir / "summary.json").exists()
    assert len(place.records()) == before


@pytest.mark.parametrize("workers", [1, 2, 3], ids=str)
def test_row_14_another_number_of_workers(place, whole, workers):
    place.killed_at(11)
    place(f"num_workers={workers}")
    assert_equal_runs(place, whole)
    assert last_checkpoint(place) == last_checkpoint(whole)


def test_row_16_a_changed_configuration(place):
    place.killed_at(11)
    before = sorted(place.run_dir.rglob("*"))
    err = place("optim.weight_decay=0.1", "objective.clip_norm=1", status=2)
    assert "objective.clip_norm=3.0 (now 1)" in err
    assert "optim.weight_decay=0.04 (now 0.1)" in err
    config = place.run_dir / "config.yaml"
    original = config.read_text()
    config.write_text(original.replace("clip_norm: 3.0", "clip_norm: 1.0"))
    assert "config.yaml has been changed" in place("objective.clip_norm=1.0", status=2)
    config.write_text(original)
    assert sorted(place.run_dir.rglob("*")) == before
    place("callbacks.checkpoints.keep_last=3", "worker_timeout=60")


@pytest.mark.parametrize("step", [9, 10, 11])
def test_row_17_around_an_epochs_end_after_validation_with_accumulation(place, zygote, step):
    """Ten images a pass, so that passes end within steps; k-NN at step 10; two parts a step."""
    images(place.folder / "ten", 10)
    more = [
        "trainer.accumulate=2", "eval_data=photos",
        "callbacks.online.every_steps=10", "callbacks.online.max_images=60",
        "callbacks.online.evaluators.knn.k=[5]", "evaluation.baselines=null",
        "callbacks.online.eval_budget=null", "callbacks.online.best=knn_k5", *EVALUATION,
        "data=folder", f"data.root={place.folder}/ten", "model=xcit_micro_4_p8",
        "epochs=32",  # of 10 images: 40 steps
    ]  # fmt: skip
    words = [w for w in TOY if not w.startswith(("eval_data", "~callbacks"))]
    other = Place(zygote, place.folder / "whole")
    other(*more, words=words)
    run, holding = place.held_at(step + 1, *more, words=words)
    run.kill()
    holding.unlink()
    place(*more, words=words)
    assert_equal_runs(place, other)
    assert [r["knn_k5"] for r in other.metrics() if r["knn_k5"]] != []


def test_row_17_killed_behind_a_checkpoint(place, whole):
    """Whatever is logged at a step is logged before the step is saved."""
    env = {"WRITE_NUMBER": "3", "WRITE_BYTES": "-1"}
    place(env=env, call=["die_behind_a_write"], status=-signal.SIGKILL)
    assert place.checkpoints()[-1] == "step-000015.ckpt"
    assert [r["step"] for r in place.metrics()][-1] == "15"
    assert_goes_on(place, whole)


def test_row_18_the_same_samples_over_a_crash(place, whole):
    """By the record, of the last time that each step was made; and by the pure function."""
    place.killed_at(13)
    place()
    last = {r["step"]: r["images"] for r in place.records()}
    seen = Counter(i for images in last.values() for i in images)
    assert seen == Counter(i for r in whole.records() for i in r["images"])
    assert seen == Counter(image_at(0, n, 1494) for n in range(8 * STEPS))
    assert max(seen.values()) == 1  # less than a pass
