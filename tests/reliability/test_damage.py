"""Rows 9 to 13, 19, 20, 29, 30: damaged files, full disks, numbers that are none, two processes."""

import json
import resource
import socket
import time

import pytest
from runs import NO_RECORD, STEPS, assert_equal_runs, assert_goes_on, trick

from ssl_xcit.models.checkpoint_files import read_checkpoint


def cut(place, step=17):
    """A run that was killed; its checkpoints, the newest last."""
    place.killed_at(step, *trick("Slow", seconds=0.02))
    found = [place.run_dir / "checkpoints" / name for name in place.checkpoints()]
    assert len(found) == 2
    return found


def limit_files(run, size=resource.RLIM_INFINITY):
    """What the run writes beyond this many bytes of a file fails."""
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "has 5,000 bytes, not the"), (flip_a_bit, "its SHA-256 differs")],
    ids=["row_09_truncated", "row_10_one_bit"],
)
def test_row_09_10_the_newest_checkpoint_is_damaged(place, whole, damage, words):
    _, newest = cut(place)
    damage(newest)
    err = place()
    assert f"{newest.relative_to(place.folder)} {words}" in err or words in err
    assert newest.name in err
    assert newest.with_suffix(".corrupt").exists()
    assert_equal_runs(place, whole)


def test_row_11_all_checkpoints_are_bad(place):
    for path in cut(place):
        flip_a_bit(path)
    for _ in range(2):  # the second time they are put aside already
        assert "no checkpoint of runs/x is valid" in place(status=1)
    assert not place.checkpoints()
    assert max(r["step"] for r in place.records()) < 25  # nothing was trained from scratch


def test_row_12_disk_full_while_saving(place, whole):
    """Files that grow beyond a limit fail as on a full disk: old checkpoints stay, training goes
    on, later ones are written; the third failure in a row ends it.
    """
    run = place.start(*trick("Slow", seconds=0.05))
    place.until(lambda: "step-000005.ckpt" in place.checkpoints(), run)
    limit_files(run, 20_000)
    place.until(lambda: "training goes on" in run.err, run)
    assert "File too large" in run.err
    assert "newest checkpoint: step 5" in run.err
    assert place.checkpoints() == ["step-000005.ckpt"]
    assert not list((place.run_dir / "checkpoints").glob(".*"))
    limit_files(run)
    run.ends()
    assert place.checkpoints() == ["step-000035.ckpt", "step-000040.ckpt"]
    assert_equal_runs(place, whole)


def test_row_12_the_third_failure_in_a_row_ends_it(place):
    run = place.start(*trick("Slow", seconds=0.02))
    place.until(lambda: "step-000005.ckpt" in place.checkpoints(), run)
    limit_files(run, 20_000)
    assert "3rd failure in a row; newest checkpoint: step 5" in run.ends(1)
    for path in place.checkpoints():
        read_checkpoint(place.run_dir / "checkpoints" / path)


def test_row_12_a_full_disk_leaves_the_metrics_whole(place, whole):
    """Rows that could not be written come with the next that can."""
    more = [*trick("Slow", seconds=0.05), "callbacks.checkpoints.every_steps=40"]
    run = place.start(*more, words=NO_RECORD)
    file = place.run_dir / "metrics.csv"
    place.until(lambda: file.exists() and file.read_text().count("\n") > 2, run)
    limit_files(run, file.stat().st_size + 10)
    place.until(lambda: "metrics.csv could not be written" in run.err, run)
    limit_files(run)
    run.ends()
    assert place.metrics() == whole.metrics()


def test_row_12_a_disk_that_is_full_when_old_ones_are_dropped(place, whole):
    assert "old checkpoints could not be dropped" in place(call=["full_when_dropping"])
    assert_equal_runs(place, whole)


def test_row_12_a_row_cut_short_and_a_rerun(place, whole):
    """Half a line is what a full disk leaves of metrics.csv."""
    cut(place, 17)
    file = place.run_dir / "metrics.csv"
    lines = file.read_text().splitlines()
    kept = [line for line in lines if line.split(",")[0] in ("step", "3", "6", "9", "12", "15")]
    file.write_text("\n".join([*kept, "18,0.09,5.1"]))
    place()
    assert place.metrics() == whole.metrics()


def test_row_12_full_at_the_start(place):
    """One line, whatever cannot be written first."""
    assert "make room" in place(call=["no_room"], status=1)


def test_row_13_the_last_few_and_milestones(place):
    place("callbacks.checkpoints.keep_last=3", "callbacks.checkpoints.milestone_every=15")
    assert place.checkpoints() == [f"step-{s:06d}.ckpt" for s in (15, 30, 35, 40)]
    manifest = json.loads((place.run_dir / "checkpoints/manifest.json").read_text())
    assert sorted(manifest["files"]) == place.checkpoints()


def test_row_13_nothing_is_deleted_before_the_new_one_is_verified(place):
    """A disk that gives back something else than was written: the good ones stay."""
    err = place(env={"LIE_FROM": "3"}, call=["lying_disk"], status=1)
    assert "reads back differently" in err
    assert place.checkpoints() == ["step-000005.ckpt", "step-000010.ckpt"]
    for name in place.checkpoints():
        read_checkpoint(place.run_dir / "checkpoints" / name)


@pytest.mark.parametrize("what", ["images", "gradient"])
def test_row_19_20_steps_that_are_not_finite_are_left_out(place, what):
    """Before optimizer, EMA, center and running statistics; and a run that is killed in between
    counts on.
    """
    err = place(*trick("Poison", steps="[6,7,20]", what=what))
    assert err.count("skipped: loss") == 3
    for record in place.records():
        changed = record["before"] != record["hash"]
        assert changed == (record["step"] not in (6, 7, 20))
    assert place.metrics()[-1]["skipped_steps"] == "3.0"


def test_row_19_20_several_in_a_row_end_the_run(place):
    poison = trick("Poison", steps="[1,2,3,12,13,14,15,16,17,18]", what="gradient")
    assert "5 steps in a row, up to 16" in place(*poison, status=1)
    (dump,) = place.run_dir.glob("nonfinite-*.json")
    content = json.loads(dump.read_text())
    assert content["step"] == 16
    assert len(content["images"]) == 8
    assert content["gradient_norms"]["backbone.blocks.0.attn.proj.weight"] == "NaN"
    assert content["weight_norms"]["student.backbone.blocks.0.attn.proj.weight"] > 0
    newest = read_checkpoint(place.run_dir / "checkpoints" / place.checkpoints()[-1])
    assert all(v.isfinite().all() for v in newest["state_dict"].values() if v.is_floating_point())
    # killed after two of them and started again, the count goes on
    place(*poison, status=1)


def test_row_29_two_processes_in_one_folder(place, whole):
    first, holding = place.held_at(8)
    holder = f"runs/x is in use by process {first.pid} on {socket.gethostname()}"
    assert holder in place(status=2)
    first.kill()
    holding.unlink()
    place()  # a dead process's lock is nobody's
    assert_equal_runs(place, whole)


def test_row_29_children_do_not_hold_the_lock(place, whole):
    """Loader processes live some seconds longer than a killed parent."""
    place.killed_at(6, "num_workers=1")
    assert_goes_on(place, whole)


def test_row_30_rerun_after_completion(place, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.run_dir.rglob("*")}
    began = time.monotonic()
    whole()
    assert time.monotonic() - began < 15
    assert "runs/x is finished" in whole.runs[-1].out
    assert {p: p.stat().st_mtime_ns for p in whole.run_dir.rglob("*")} == before
    assert len(whole.records()) == STEPS
