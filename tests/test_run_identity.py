"""The set of images is part of a run's identity, its path is not."""

import json
import shutil
from pathlib import Path

import pytest
from commands import NO_ONLINE, images, run

from ssl_xcit.models.kernel_trial import kernels_are_faster
from ssl_xcit.training.run_dir import from_weights_of, kernels_of

SETTINGS = [
    *(o for o in NO_ONLINE if not o.startswith("epochs")),
    "data=folder", "model=xcit_micro_4_p8", "~callbacks.online", "epochs=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on 24 images that has checkpoints and is not finished."""
    home = tmp_path_factory.mktemp("run")
    images(home / "photos", 24)
    assert run("pretrain", f"data.root={home}/photos", f"out={home}/runs", "name=x", *SETTINGS) == 0
    (home / "runs/x/summary.json").unlink()
    return home


@pytest.fixture
def home(stopped, tmp_path, monkeypatch):
    """A copy of it, at another place."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(*more, root="photos", name="name=x"):
    return run(
        "pretrain", f"data.root={root}", "out=runs", *([name] if name else []), *SETTINGS, *more
    )


def about(home):
    return json.loads((home / "runs/x/run.json").read_text())


def test_a_copy_on_another_mount_goes_on(home, capfd):
    before = about(home)
    assert resume() == 0
    said = capfd.readouterr().out
    assert "the same images, elsewhere" in said
    assert "going on from runs/x/checkpoints" in said
    assert about(home)["data_sha256"] == before["data_sha256"]
    assert about(home)["data_changes"] == []


def test_a_run_goes_on_with_or_without_kernels_as_it_began(home, capfd):
    folder = home / "runs/x"
    assert kernels_of(folder) is kernels_are_faster()
    assert kernels_of(home / "photos") is None
    for noted, goes_on in ((False, False), (None, None), ("absent", True)):
        record = {key: value for key, value in about(home).items() if key != "kernels"}
        record |= {} if noted == "absent" else {"kernels": noted}
        (folder / "run.json").write_text(json.dumps(record))
        assert kernels_of(folder) is goes_on
    write = {**about(home), "kernels": False}
    (folder / "run.json").write_text(json.dumps(write))
    assert resume() == 0
    assert about(home)["kernels"] is False
    (folder / "run.json").write_text("cut sh")
    assert kernels_of(folder) is None


@pytest.mark.parametrize("lacking", ["a compiler", "kernels that work"])
def test_a_resumption_without_kernels_is_said_and_not_for_good(lacking, home, monkeypatch, capfd):
    if lacking == "a compiler":
        monkeypatch.setattr("ssl_xcit.models.xcit.kernels", lambda: None)
    else:
        monkeypatch.setattr("ssl_xcit.training.run_dir.kernel_speed", lambda: 0.0)
        monkeypatch.setattr("ssl_xcit.models.xcit.kernels", pytest.fail)
    run_json = home / "runs/x/run.json"
    run_json.write_text(json.dumps({**about(home), "kernels": True}))
    assert resume() == 0
    said = capfd.readouterr().err.splitlines()
    (line,) = [line for line in said if "was begun with kernels" in line]
    assert line.endswith("install a C++ compiler, or name another in CXX, or set compile=false")
    assert about(home)["kernels"] is True


def test_a_moved_run_that_has_no_name_is_found(home, capfd):
    assert resume(name=None) == 0  # runs/x has a name, and is not taken
    [folder] = [p for p in (home / "runs").iterdir() if p.name != "x"]
    (folder / "summary.json").unlink()
    shutil.move(home / "photos", home / "elsewhere")
    capfd.readouterr()
    assert resume(root="elsewhere", name=None) == 0
    said = capfd.readouterr().out
    assert f"runs/{folder.name}: data.root was photos and is elsewhere: the same images" in said
    assert f"going on from runs/{folder.name}/checkpoints" in said
    assert len(list((home / "runs").iterdir())) == 2
    assert resume(root="elsewhere", name=None) == 0
    assert f"runs/{folder.name} is finished" in capfd.readouterr().out


def test_fewer_images_than_steps_were_taken_for_end_the_run(home, capfd):
    for i in range(8):
        (home / f"photos/{i}.png").unlink()
    assert resume("resume.data=changed") == 0
    assert "24 images then, 16 now: 8 gone" in capfd.readouterr().err
    assert about(home)["plan"]["total_steps"] == 4  # of which 6 are done
    assert (home / "runs/x/summary.json").is_file()


def test_changed_images_are_refused_and_go_on_when_asked(home, capfd):
    images(home / "photos/new", 8)
    (home / "photos/3.png").unlink()
    assert resume() == 2
    said = capfd.readouterr().err
    assert "24 images then, 31 now: 8 new (such as new/0.png" in said
    assert "1 gone (such as 3.png)" in said
    assert "add resume.data=changed" in said
    assert "init.ckpt=runs/x init.head=kept" in said
    assert resume("resume.data=changed") == 0
    out, err = capfd.readouterr()
    assert "no longer the same, bit for bit" in err
    assert "31 images" in out
    [change] = about(home)["data_changes"]
    assert change["step"] == 6
    assert change["data"]["data"].startswith("24 images then, 31 now")
    assert about(home)["plan"]["num_images"] == 31
    assert run("report", "run=runs/x") == 0
    page = (home / "runs/x/report.html").read_text()
    assert "The images changed during this run" in page
    assert "8 new (such as new/0.png" in page
    (home / "runs/x/summary.json").unlink()
    assert resume() == 0  # the images are those of the run now


def test_a_changed_image_of_the_same_name_is_refused(home, capfd):
    (home / "photos/5.png").write_bytes((home / "photos/6.png").read_bytes() + b"\0")
    assert resume() == 2
    assert "1 of another size (such as 5.png)" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["true", "null", "Changed"])
def test_what_resume_may_be(home, value, capfd):
    assert resume(f"resume.data={value}") == 2
    assert "same or changed" in capfd.readouterr().err


def test_labelled_images_count_too(home, capfd, monkeypatch):
    for name in "ab":
        images(home / f"labelled/{name}", 4)
    words = ["eval_data.root=labelled", "eval_data.resize=32", "eval_data.size=32"]
    assert resume(*words, name="name=y") == 0
    (home / "other").mkdir()
    with monkeypatch.context() as elsewhere:  # they lay relative to where the run was
        elsewhere.chdir(home / "other")
        kept = [o for o in SETTINGS if o.startswith("evaluation.")]
        assert run("eval", "ckpt=../runs/y", "num_workers=0", *kept) == 0
    (home / "runs/y/summary.json").unlink()
    capfd.readouterr()
    assert resume(*words[1:], name="name=y") == 2  # left out
    assert "eval_data: images then, none now" in capfd.readouterr().err
    assert resume(*words, name="name=x") == 2  # added
    assert "eval_data" in capfd.readouterr().err
    shutil.move(home / "labelled/a/0.png", home / "labelled/b/moved.png")
    assert resume(*words, name="name=y") == 2
    assert "(eval_data: 8 images then, 8 now: 1 new" in capfd.readouterr().err


def test_statistics_of_the_images_count_and_not_where_they_lie(home, capfd):
    stats = {"channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "background": [255] * 3}
    (home / "a.json").write_text(json.dumps(stats | {"value_range": None}))
    (home / "b.json").write_text(json.dumps(stats | {"value_range": None, "mean": [0.4] * 3}))
    assert resume("preprocess.stats=a.json", name="name=y") == 0
    (home / "runs/y/summary.json").unlink()
    shutil.copy(home / "a.json", home / "c.json")
    assert resume("preprocess.stats=c.json", name="name=y") == 0
    (home / "runs/y/summary.json").unlink()
    assert resume("preprocess.stats=b.json", name="name=y") == 2
    assert "preprocess.stats and the other settings of preprocess" in capfd.readouterr().err


def test_a_finished_run_of_other_images_is_no_answer(home, capfd):
    assert resume() == 0
    (home / "others").mkdir()
    for i in range(24):  # the same names and, of noise, sizes, as those of another camera
        shutil.copy(home / f"photos/{i}.png", home / f"others/{(i + 1) % 24}.png")
    assert resume(root="others") == 2
    assert "the same names and sizes, but another order, content" in capfd.readouterr().err
    assert resume(root="others", name=None) == 0
    assert len(list((home / "runs").iterdir())) == 2
    shutil.rmtree(home / "photos")
    assert resume() == 0  # which it has no need of any more
    assert "runs/x is finished" in capfd.readouterr().out


def test_a_hostile_record_of_a_run_ends_no_other(home, capfd):
    for number, content in enumerate(("[]", "{", '{"overrides": null}', '{"overrides": [1]}')):
        (home / f"runs/{number}").mkdir()
        (home / f"runs/{number}/run.json").write_text(content)
    assert resume(name=None) == 0
    old = about(home) | {"resumed": None, "data_changes": 3, "plan": {"num_prototypes": "x"}}
    (home / "runs/x/run.json").write_text(json.dumps(old))
    assert resume() == 0


def test_more_epochs_are_told_how(home, capfd):
    assert resume("epochs=3") == 2
    said = capfd.readouterr().err
    assert "epochs=2 (now 3)" in said
    assert "init.ckpt=runs/x init.head=kept name=..." in said
    assert "scheduled anew" in said
    assert resume("init.ckpt=runs/x", "init.head=kept", "epochs=3", name="name=longer") == 0


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (
            "ssl_xcit.eval.runner.evaluate", "ssl_xcit.eval.run.evaluate",
            "which had ssl_xcit.eval.run.evaluate",
        ),
        ("  _target_: ssl_xcit.objectives.dino.DINO\n", "", "which had one objective"),
    ],
)  # fmt: skip
def test_a_run_of_another_version_is_refused_with_a_line_that_names_it(
    now, before, said, home, capfd
):
    path = home / "runs/x/config.yaml"
    assert now in path.read_text()
    then = path.read_text().replace(now, before)
    path.write_text(then)
    assert resume() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"begun with another version of ssl_xcit, {said}" in line
    assert "init.ckpt=runs/x init.head=kept name=..." in line
    assert path.read_text() == then


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"objective": "swav"}, "init.ckpt=x init.head=kept"),
        ({"objective": "infonce"}, "init.ckpt=x init.head=fresh"),
        ({"transfer": "detection"}, "ckpt=x"),
        ("hostile", "init.ckpt=x init.head=kept"),
    ],
)
def test_what_a_new_run_is_to_start_from(choices, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("x/run.json").write_text(json.dumps({"choices": choices}))
    assert from_weights_of(Path("x")) == said
