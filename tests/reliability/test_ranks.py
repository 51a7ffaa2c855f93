"""Rows 5, 15, 19, 26: two ranks on gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import HERE, STEPS, Place, assert_equal_runs, trick

# two processes on two cores: they take turns, and a step takes a while
TWO = ["trainer.devices=2", "collective_timeout=20"]


@pytest.fixture(scope="module")
def whole_two(zygote, tmp_path_factory, photos_pair):
    here = Place(zygote, tmp_path_factory.mktemp("two"))
    here(*TWO, timeout=120)
    return here


def held(place):
    """Two ranks at their eighth step; (run, file that holds it, id of the other rank)."""
    run, holding = place.held_at(8, *TWO, timeout=90)
    place.until(lambda: len(place.records(1)) >= 7, run)
    return run, holding, place.records(1)[-1]["pid"]


def test_two_ranks_hold_the_same_weights(whole_two):
    ours, theirs = whole_two.records(0), whole_two.records(1)
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a["images"] != b["images"]
        assert a["state"] == b["state"]


@pytest.mark.parametrize(
    ("who", "devices"), [("first", None), ("other", 1), ("both", 1), ("both", 2)]
)
def test_row_05_sigterm(place, whole, whole_two, who, devices):
    """To one rank or to all, 0.3 s apart: the same step is saved by all, within 10 s, and the run
    goes on with as many ranks or with another number.
    """
    run, holding, other = held(place)
    targets = {"first": [run.pid], "other": [other], "both": [run.pid, other]}[who]
    began = time.monotonic()
    for pid in targets:
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    holding.unlink()
    run.ends(75, timeout=10)
    assert time.monotonic() - began < 10
    wait_for_end(other)
    assert place.checkpoints()[-1] == "step-000008.ckpt"
    assert [r["step"] for r in place.records(1)] == [r["step"] for r in place.records(0)]
    if devices is not None:
        assert_goes_on_with(place, devices, whole, whole_two)
    if devices == 2:
        # BatchNorm's running statistics of the others are not saved: they are used nowhere
        assert_equal_runs(place, whole_two, 1, without=("before", "hash"))


def wait_for_end(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_row_15_another_world_size(place, whole):
    """The same global batch: the same images at each step; said not to be bit-exact."""
    place.killed_at(22, *trick("Slow", seconds=0.02))
    assert min(r["step"] for r in place.records(0)) == 1
    saved = int(place.checkpoints()[-1][5:11])
    assert "it had devices 1 (now 2)" in place(*TWO, timeout=120)
    expected = {r["step"]: r["images"] for r in whole.records()}
    others = {r["step"]: r["images"] for r in place.records(1)}
    last = {r["step"]: r["images"] for r in place.records(0)}
    for step in range(saved + 1, STEPS + 1):
        assert last[step] + others[step] == expected[step]


def test_row_19_a_nan_on_one_rank(place):
    """All ranks leave the step out."""
    place(*TWO, *trick("Poison", steps="[6,7]", rank=1), timeout=120)
    for rank in (0, 1):
        for record in place.records(rank):
            assert (record["before"] != record["hash"]) == (record["step"] not in (6, 7))
    assert [r["state"] for r in place.records(0)] == [r["state"] for r in place.records(1)]


@pytest.mark.parametrize("devices", [2, 1])
@pytest.mark.parametrize("accident", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_row_26_a_rank_is_stopped(place, whole, whole_two, accident, devices):
    """The other exits 1 within the collective timeout, and leaves no process behind; with as many
    ranks or with another number the run goes on as if nothing was.
    """
    run, holding, other = held(place)
    os.kill(other, accident)
    holding.unlink()
    assert "collective_timeout" in run.ends(1, timeout=30)
    wait_for_end(other)
    assert_goes_on_with(place, devices, whole, whole_two)


def assert_goes_on_with(place, devices, whole, whole_two):
    """The same command with so many ranks: bit for bit, or the same images and the same losses but
    for rounding.
    """
    if devices == 2:
        place(*TWO, timeout=120)
        assert_equal_runs(place, whole_two, 0)
        return
    began = len(place.records(0))
    assert "it had devices 2 (now 1)" in place()
    expected = {r["step"]: r for r in whole.records()}
    records = place.records(0)[began:]
    assert records[0]["step"] <= 9
    assert records[-1]["step"] == STEPS
    for record in records:
        same = expected[record["step"]]
        assert record["images"] == same["images"]
        near = pytest.approx(float.fromhex(same["loss"]), rel=1e-4)
        assert float.fromhex(record["loss"]) == near


def test_row_26_an_address_that_does_not_answer(place):
    """The second machine of two, with nobody at the first."""
    with socket.socket() as closed:
        closed.bind(("localhost", 0))
        port = str(closed.getsockname()[1])
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": "1"}
    more = ["trainer.num_nodes=2", "trainer.strategy=ddp", "collective_timeout=3"]
    said = place(*more, status=1, env={**environment, "LOCAL_RANK": "0"})
    assert f"rank 1: the 2 ranks did not meet at localhost:{port} within 3 s" in said


def test_row_26_torchrun_starts_again_what_was_killed(place, whole_two):
    """A rank is killed; all begin again from the newest checkpoint, and end as if nothing was."""
    ssl_xcit = Path(sys.executable).with_name("ssl-xcit")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
        "--no-python", ssl_xcit, *place.words, *TWO, "name=x", *trick("Slow", seconds=0.05),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with subprocess.Popen(
        command, cwd=place.folder, env=environment, stderr=subprocess.PIPE
    ) as run:
        deadline = time.monotonic() + 120
        while "step-000010.ckpt" not in place.checkpoints():
            assert run.poll() is None, run.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(place.records(1)[-1]["pid"], signal.SIGKILL)
        said = run.communicate(timeout=200)[1].decode()
    assert run.returncode == 0, said
    assert len({record["pid"] for record in place.records(1)}) == 2
    assert_equal_runs(place, whole_two, 0)


SRUN = """#!/bin/sh
shift
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
wait
"""
SBATCH = """#!/bin/sh
export SLURM_JOB_ID=4711 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
export SLURM_JOB_NAME=x SLURM_NODEID=0 SLURM_NODELIST=localhost
sh "$2" > job.txt 2>&1
echo 4711
"""


def test_trainer_slurm_trains_in_the_job(place, whole_two, tmp_path):
    """With stand-ins for sbatch, which runs the script at once, and srun, which starts two."""
    for name, script in (("srun", SRUN), ("sbatch", SBATCH)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(0o755)
    words = ["trainer=slurm" if word == "trainer=cpu" else word for word in place.words]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ssl_xcit", *words, *TWO, "trainer.accelerator=cpu", "name=x"
    ]  # fmt: skip
    asked = subprocess.run(
        command, cwd=place.folder, env=environment, capture_output=True, text=True, check=False
    )
    output = (place.folder / "job.txt").read_text()
    assert asked.returncode == 0, asked.stderr
    assert "job 4711 is queued, 1 x 2 GPUs" in asked.stdout
    assert "40 steps" in output
    assert_equal_runs(place, whole_two, 0)


def test_row_15_two_ranks_learn_what_one_learns(whole, whole_two):
    """The command's losses and images; to 1e-10 in float64: test_split_batches.py."""
    each = zip(whole.records(), whole_two.records(0), whole_two.records(1), strict=True)
    for one, ours, theirs in each:
        assert one["images"] == ours["images"] + theirs["images"]
        assert ours["loss"] == theirs["loss"]
        expected = float.fromhex(one["loss"])
        assert float.fromhex(ours["loss"]) == pytest.approx(expected, rel=1e-4)


def test_accumulation_within_ranks(place):
    """Gradients are exchanged once, after the last part."""
    place(*TWO, "trainer.accumulate=2", timeout=120)
    assert [r["state"] for r in place.records(0)] == [r["state"] for r in place.records(1)]
