"""What is handed to sbatch, by a stand-in that keeps it."""

import shlex
import sys

import pytest

from ssl_xcit.errors import UserError
from ssl_xcit.training.slurm import in_job, submit
from ssl_xcit.utils.hardware import default_workers


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Make an sbatch that runs a line of shell; returns a function that does."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def made(line):
        program = tmp_path / "bin/sbatch"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return made


def test_the_script_is_queued_and_says_where(sbatch, tmp_path, capsys):
    sbatch('echo "$@" > ' + shlex.quote(str(tmp_path / "asked")) + "; echo '4711;cluster'")
    words = [sys.executable, "-m", "ssl_xcit", "pretrain", "data.root=my pictures"]
    run_dir = tmp_path / "runs/a,b"
    submit(run_dir, words, 4, 8, 12, "2-00:00:00", options={"partition": "h100", "account": None})
    assert (tmp_path / "asked").read_text() == f"--parsable {run_dir}/job.sh\n"
    script = (run_dir / "job.sh").read_text().splitlines()
    assert script[0] == "#!/bin/sh"
    directives = {line.split()[1] for line in script if line.startswith("#SBATCH")}
    assert directives >= {
        "--job-name=ssl-xcit-a-b", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--cpus-per-task=12", "--time=2-00:00:00", "--signal=USR1@900", "--requeue",
        "--dependency=singleton", "--partition=h100",
    }  # fmt: skip
    assert not any("account" in line for line in directives)
    assert shlex.split(script[-1]) == ["exec", "srun", "--cpus-per-task=12", *words]
    said = capsys.readouterr().out
    assert "job 4711 is queued, 4 x 8 GPUs" in said
    assert f"{run_dir}/job-4711.txt" in said


def test_what_sbatch_says_is_passed_on(sbatch, tmp_path):
    sbatch("echo 'sbatch: error: invalid partition specified: h1' >&2; exit 1")
    with pytest.raises(UserError, match=r"sbatch refuses .*job\.sh: .*invalid partition"):
        submit(tmp_path / "run", ["x"], 1, 1)


def test_a_rank_of_srun_has_cores_of_its_own(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not in_job()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert in_job()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    of_machine = default_workers(8)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert default_workers(8) == 7
    assert of_machine < 12
