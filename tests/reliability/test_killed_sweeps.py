"""A sweep of six runs on the built-in photographs, killed twice: six results, no trial run twice,
and the weights of runs that nobody has disturbed.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import same
from runs import NO_RECORD

SEEDS = range(6)
WORDS = [*NO_RECORD[1:], "max_steps=20"]
SWEEP = ["-m", "seed=0,1,2,3,4,5", "name=six", *WORDS]


def command(folder, cache, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache.parent)}
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "ssl_xcit", "pretrain", *words], cwd=folder, env=environment,
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finished(sweep):
    return {p.parent.name: p.stat().st_mtime_ns for p in sweep.glob("*/summary.json")}


def weights(run):
    return torch.load(run / "checkpoints/step-000020.ckpt", weights_only=True)["state_dict"]


@pytest.mark.timeout(600)
def test_killed_twice_a_sweep_ends_with_six_results(tmp_path, cache):
    sweep = tmp_path / "runs/six"
    kept = {}
    for wanted in (1, 3):
        process = command(tmp_path, cache, *SWEEP)
        limit = time.monotonic() + 240
        # so many are done, and the next has a checkpoint
        while len(finished(sweep)) < wanted or len(list(sweep.glob("*/checkpoints"))) <= wanted:
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            assert time.monotonic() < limit
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept |= finished(sweep)
        assert len(kept) < 6
    assert command(tmp_path, cache, *SWEEP).wait() == 0, (tmp_path / "out.txt").read_text()
    done = finished(sweep)
    assert sorted(done) == [f"seed-{seed}" for seed in SEEDS]
    assert kept == {name: done[name] for name in kept}  # not touched again
    starts = [len(json.loads((sweep / name / "trial.json").read_text())["starts"]) for name in done]
    assert sorted(starts) == [1, 1, 1, 1, 2, 2]
    resumed = [json.loads((sweep / name / "run.json").read_text())["resumed"] for name in done]
    (seed,) = [n for n, steps in enumerate(resumed) if steps][:1] or [0]
    assert command(tmp_path, cache, f"seed={seed}", "name=alone", *WORDS).wait() == 0
    assert same(weights(sweep / f"seed-{seed}"), weights(tmp_path / "runs/alone"))
