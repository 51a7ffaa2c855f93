"""A colleague's run, which may only be read: results go to where one is, and that they do, or that
they cannot, is said before anything is measured.
"""

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch
from commands import EVALUATION, images, run
from tiny_run import make_run, published

from ssl_xcit import load_backbone
from ssl_xcit.errors import UserError
from ssl_xcit.eval.commands import atlas as atlas_command  # noqa: F401
from ssl_xcit.eval.commands import eval as evaluation
from ssl_xcit.eval.report import page as report_page
from ssl_xcit.eval.report import report as _report  # noqa: F401  # once, not in every child
from ssl_xcit.eval.report import sweep_page as _sweep  # noqa: F401
from ssl_xcit.export import safetensors_files  # noqa: F401
from ssl_xcit.utils.files import RESULTS_OF, writable_or_here

NOBODY = 65534
ROOT = os.geteuid() == 0


def close_to_us(folder, mode=0o755):
    """Another user's, or, where we cannot give it away, without the permission to write."""
    for path in (*folder.rglob("*"), folder):
        if ROOT:
            os.chown(path, NOBODY, NOBODY)
        elif path.is_dir():
            path.chmod(mode & 0o555)


def drop_root_rights():
    """Of this process: permissions hold for it as for anybody (CAP_DAC_OVERRIDE and the like)."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, data) == 0
    for i in range(3):
        data[i] &= ~0b1110
    assert libc.capset(head, data) == 0


def as_anybody(function, folder):
    """(exit code, what was written) of a function in a folder, in a child whose user is not root in
    effect.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    if not (child := os.fork()):
        code = 99
        try:
            os.dup2(writing, 1), os.dup2(writing, 2)
            os.close(reading)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            if ROOT:
                drop_root_rights()
            os.chdir(folder)
            code = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.fixture(scope="module")
def colleague(tmp_path_factory):
    """Runs, a file of weights and a sweep that are another user's."""
    folder = tmp_path_factory.mktemp("colleague")
    own = folder / "own"
    overrides = [f"{key}.root={folder}/pictures" for key in ("data", "eval_data")]
    overrides += ["eval_data.test_fraction=0.5", "eval_data.resize=32", "eval_data.size=32"]
    make_run(own / "runs/demo", overrides=overrides, data="folder")
    make_run(own / "runs/other", overrides=overrides, data="folder", seed=9)
    published(own / "net.pth")
    (own / "swept/t0").mkdir(parents=True)
    trial = {"number": 0, "values": {"optim.lr": "1"}, "state": "running", "error": ""}
    (own / "swept/t0/trial.json").write_text(json.dumps(trial))
    about = {"command": "ssl-xcit pretrain -m", "of": "pretrain", "fixed": [], "all_fixed": [],
             "metric": "knn_k20", "maximize": True}  # fmt: skip
    (own / "swept/sweep.json").write_text(json.dumps(about))
    for name in "ab":
        images(folder / "pictures" / name, 4, (40, 40))
    close_to_us(own)
    yield folder
    for path in (own, *own.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "get_plotlyjs", lambda: "Plotly = 0")
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


KNN = [*(w for w in EVALUATION if "linear" not in w), "evaluation.evaluators.linear=null"]
KNN += ["evaluation.baselines=null", "evaluation.cache=false", "num_workers=0"]
KNN += ["eval_data=folder", "eval_data.root=../pictures", "eval_data.test_fraction=0.5"]
KNN += ["eval_data.resize=32", "eval_data.size=32"]
COMMANDS = {  # what is typed, and what is written in a folder of the run's name
    "eval": (["eval", "ckpt=own/runs/demo", *KNN], "demo/results-folder.json"),
    "eval, several": (
        ["eval", "ckpt=[own/runs/demo,own/runs/other]", *KNN], "demo/comparison-folder.json"
    ),
    "eval, a file": (["eval", "ckpt=own/net.pth", *KNN], "own/results-folder.json"),
    "visualize": (
        ["visualize", "ckpt=own/runs/demo", "images=../pictures/a/0.png", "kinds=[attention]"],
        "demo/visualize/index.html",
    ),
    "export": (
        ["export", "ckpt=own/runs/demo", "format=safetensors", "eval_data=none"],
        "demo/export/demo.safetensors",
    ),
    "report": (["report", "run=own/runs/demo", "num_workers=0"], "demo/report.html"),
    "reports": (["report", "runs=[own/runs/demo,own/runs/other]"], "runs/report.html"),
    "atlas": (
        ["atlas", "ckpt=own/runs/demo", "num_workers=0", "eval_data=folder",
         "eval_data.root=../pictures", "cache=false"],
        "demo/atlas.html",
    ),
    "film": (["film", "ckpt=own/runs/demo", "video=../pictures/a"], "demo/film/a-attention.mp4"),
    "sweep": (["sweep", "own/swept"], "swept/sweep.html"),
}  # fmt: skip


def typed(name, colleague):
    """With whole paths."""
    return [
        w.replace("own/", f"{colleague}/own/").replace("../", f"{colleague}/")
        for w in COMMANDS[name][0]
    ]


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("reports", "eval, a file")])
def test_results_go_to_where_one_is(colleague, here, name):
    before = sorted((colleague / "own").rglob("*"))
    code, said = as_anybody(lambda: run(*typed(name, colleague)), here)
    out = COMMANDS[name][1]
    assert code == 0, said
    first = said.splitlines()[0]
    assert "cannot be written (Permission denied): results go to " in first
    assert f"results go to {Path(out).parent} where you are" in first
    assert (here / out).stat().st_size
    assert sorted((colleague / "own").rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_nowhere_to_write_is_said_before_anything_is_measured(colleague, here, name):
    close_to_us(here)
    code, said = as_anybody(lambda: run(*typed(name, colleague)), here)
    here.chmod(0o755)
    assert code == 2, said
    assert len(said.splitlines()) == 1
    assert f"cannot be written (Permission denied), and neither can {here}" in said
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("name", "out"),
    [("eval", "a.json"), ("visualize", "new"), ("export", "name"), ("report", "a.html"),
     ("atlas", "a.html"), ("film", "a.mp4"), ("sweep", "a.html")],
)  # fmt: skip
def test_an_out_that_cannot_be_written_is_no_other_place(colleague, here, name, out):
    words = [*typed(name, colleague), f"out={colleague}/own/{out}"]
    code, said = as_anybody(lambda: run(*words), here)
    assert code == 2, said
    assert len(said.splitlines()) == 1
    assert "no folder to write to (Permission denied)" in said
    assert not list(here.iterdir())


def test_nothing_of_others_is_overwritten(colleague, here):
    """A run of one's own of that name stays, and two colleagues' runs have a folder each."""
    (here / "demo").mkdir()
    (here / "demo/results.json").write_text("mine")
    second = here.parent / "second/demo"
    second.mkdir(parents=True)
    close_to_us(second)

    def places():
        for folder in (colleague / "own/runs/demo", second, second):
            print(writable_or_here(folder))

    code, said = as_anybody(places, here)
    assert code == 0, said
    found = said.splitlines()[1::2]
    assert found[0] != found[1] == found[2]
    assert all(name.startswith("demo-") for name in found)
    assert (here / "demo/results.json").read_text() == "mine"
    assert (here / found[1] / RESULTS_OF).read_text() == str(second)


def test_a_part_of_a_run_may_be_another_user_s(here):
    folder = here / "runs/demo"
    make_run(folder)
    for name in ("heads", "visualize"):
        (folder / name).mkdir()
        close_to_us(folder / name)

    def places():
        print(writable_or_here(folder))
        print(writable_or_here(folder, holds=["heads"]))
        print(writable_or_here(folder, "visualize"))
        print(writable_or_here(folder, "export"))

    code, said = as_anybody(places, here)
    assert code == 0, said
    lines = [line for line in said.splitlines() if "results go to" not in line]
    assert lines == [str(folder), "demo", "demo/visualize", str(folder / "export")]
    assert f"{folder}/heads cannot be written" in said


@pytest.mark.parametrize("closed", ["checkpoints/step-000006.ckpt", "checkpoints", "."])
def test_weights_that_may_not_be_read(here, closed):
    folder = make_run(here / "demo")
    if ROOT:
        shutil.chown(folder / closed, NOBODY, NOBODY)
    (folder / closed).chmod(0o600 if closed.endswith(".ckpt") else 0o000)

    def load():
        try:
            load_backbone(folder)
        except UserError as error:
            print(error)

    code, said = as_anybody(load, here)
    (folder / closed).chmod(0o755)
    assert code == 0, said
    assert "Permission denied" in said
    assert len(said.splitlines()) == 1


def test_a_run_in_a_folder_that_may_be_entered_but_not_listed(here):
    folder = make_run(here / "demo")
    folder.chmod(0o711)

    def load():
        load_backbone(folder)

    code, said = as_anybody(load, here)
    folder.chmod(0o755)
    assert (code, said) == (0, "")


@pytest.mark.parametrize("name", ["demo", "demo/checkpoints/step-000006.ckpt"])
def test_below_a_folder_that_may_not_be_entered(here, name):
    parent = here / "closed"
    make_run(parent / "demo")
    parent.chmod(0o600)

    def load():
        try:
            load_backbone(parent / name)
        except UserError as error:
            print(error)

    code, said = as_anybody(load, here)
    parent.chmod(0o755)
    assert code == 0, said
    assert said.endswith("Permission denied\n")


def test_under_torchrun_the_first_rank_alone_chooses(colleague, here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(evaluation.HydraConfig, "get", lambda: pytest.fail("not asked"))

    def choose():
        print(evaluation.out_file(str(colleague / "own/a.json"), [colleague / "own/net.pth"]))

    assert as_anybody(choose, here) == (0, f"{colleague}/own/a.json\n")
    assert not list(here.iterdir())
