"""Rows 27, 28: a logger that nobody answers, files of strangers; and what is recorded of a run."""

import io
import os
import pickle
import tarfile
import time

import torch
from runs import NO_RECORD, assert_equal_runs


def test_row_27_wandb_is_unreachable(place, whole):
    """Training unaffected, the local metrics complete, one warning; the record is off line."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    words = ["logger=wandb", "logger.wandb.offline=false", "logger.wandb.settings.init_timeout=5"]
    began = time.monotonic()
    err = place(*words, env=env)
    assert time.monotonic() - began < 60
    assert err.count("WARNING: logger wandb") == 1, err
    assert "metrics.csv is complete" in err
    assert_equal_runs(place, whole)
    assert list((place.run_dir / "wandb").glob("offline-run-*/*.wandb"))


def test_row_27_a_run_that_goes_on_is_the_same_run_there(place):
    place.killed_at(8, "logger=wandb")
    place("logger=wandb")
    names = [p.name for p in (place.run_dir / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert len({name.rpartition("-")[2] for name in names}) == 1


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_row_28_a_hostile_checkpoint(place, tmp_path):
    """No code runs, by any command; exit 2."""
    proof = tmp_path / "proof"
    torch.save({"state_dict": {}, "x": Evil(proof)}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(proof)))
    for name in ("evil.pth", "raw.pth"):
        words = ["eval", f"ckpt={name}", "eval_data=photos"]
        assert "cannot be read" in place(words=words, status=2)
    folder = place.run_dir / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}, "x": Evil(proof)}, folder / "step-000005.ckpt")
    assert "no checkpoint of runs/x is valid" in place(status=1)
    assert not proof.exists()


def test_row_28_a_hostile_tar(place, tmp_path):
    """Nothing is written outside, no link is followed; without an image in it exit 2."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/evil.tar", "w") as tar:
        for name in ("../../outside.png", "/tmp/ssl_xcit-outside.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        tar.addfile(link)
        loader = tarfile.TarInfo("code.pickle")
        content = pickle.dumps(Evil(tmp_path / "proof"))
        loader.size = len(content)
        tar.addfile(loader, io.BytesIO(content))
    before = {p for p in tmp_path.rglob("*") if not p.name.startswith(("out-", "err-"))}
    place("data=shards", "data.root=in", status=2)
    after = {p for p in tmp_path.rglob("*") if not p.name.startswith(("out-", "err-"))}
    assert after == before
    assert not os.path.exists("/tmp/ssl_xcit-outside.png")


def test_everything_lies_in_the_run_folder(place):
    """What a run writes: the folder has these files, and nothing lies beside it."""
    place(words=NO_RECORD)
    assert {p.name for p in place.run_dir.iterdir()} == {
        "checkpoints", "config.yaml", "images.npz", "metrics.csv", "run.json", "summary.json",
    }  # fmt: skip
    assert {p.name for p in place.folder.iterdir()} == {"runs", "out-0", "err-0"}
