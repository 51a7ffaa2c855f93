"""A file of features that is there already, in part, of something else, or in the wrong place."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from commands import images, run
from ssl_xcit.eval import embed, embedded
from tiny_run import published

from ssl_xcit.locks import exclusive

LOOK = ["ckpt=w.pth", "data.root=in", "resize=32", "size=32", "num_workers=0", "device=cpu"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "w.pth")
    for name in "ab":
        images(Path("in") / name, 2)


def test_another_index_is_other_settings_for_faiss_alone(capsys):
    assert run("embed", *LOOK, "out=[f.npy,f.faiss]") == 0
    assert run("embed", *LOOK, "out=f.npy", "index=hnsw") == 0
    assert run("embed", *LOOK, "out=f.faiss", "index=hnsw") == 2
    error = capsys.readouterr().err
    assert "f.faiss is there, made with index=flat, not hnsw: name another file" in error


def test_other_labels(capsys):
    assert run("embed", *LOOK, "out=f.npy") == 0
    assert run("embed", *LOOK, "out=f.npy", "data.labels=true") == 2
    assert "made with other labels: name another file" in capsys.readouterr().err
    assert run("embed", *LOOK, "out=g.npy", "data.labels=true") == 0


def test_other_weights_and_changed_images(capsys, monkeypatch):
    monkeypatch.setattr("ssl_xcit.eval.feature_cache.SETTLED", 0)
    assert run("embed", *LOOK, "out=f.npy") == 0
    published(Path("w.pth"), seed=1)
    assert run("embed", *LOOK, "out=f.npy") == 2
    assert "made from other weights:" in capsys.readouterr().err
    published(Path("w.pth"))
    os.rename("in/a/0.png", "in/a/x.png")
    assert run("embed", *LOOK, "out=f.npy") == 2
    assert "made of images with other names:" in capsys.readouterr().err
    os.rename("in/a/x.png", "in/a/0.png")
    shutil.copy("in/b/1.png", "in/a/0.png")
    assert run("embed", *LOOK, "out=f.npy") == 2
    assert "made of images whose files have changed since:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["f.npy", "f.faiss", "f.parquet"])
def test_stopped_while_the_file_is_written(name, monkeypatch, capsys):
    """At the end of a long extraction: nothing is extracted again, nothing has to be removed."""
    assert run("embed", *LOOK, f"out=whole{Path(name).suffix}") == 0
    with monkeypatch.context() as patched:
        for step in ("write_rows", "write_index", "write_parquet"):
            patched.setattr(embedded, step, interrupt)
        assert run("embed", *LOOK, f"out={name}") == 130
        assert not Path(name).exists()
    with monkeypatch.context() as patched:
        patched.setattr("ssl_xcit.eval.feature_cache.batches", None)
        assert run("embed", *LOOK, f"out={name}") == 0
    if name != "f.parquet":  # which holds when its weights were read
        assert Path(name).read_bytes() == Path(f"whole{Path(name).suffix}").read_bytes()
    assert not list(Path().glob(".*"))


def interrupt(*_):
    raise KeyboardInterrupt


def test_names_that_belong_to_another_file(capsys):
    assert run("embed", *LOOK, "out=f.npy") == 0
    rows = Path("f.npy.rows.jsonl").read_text().splitlines(keepends=True)
    Path("f.npy.rows.jsonl").write_text("".join(rows[:-1]))
    assert run("search", "index=f.npy", "image=in/a/0.png", "out=null") == 2
    assert "has 4 rows, and 3 names are beside it" in capsys.readouterr().err
    assert run("embed", *LOOK, "out=f.npy") == 2
    assert "f.npy is there, and is not whole" in capsys.readouterr().err


def test_an_array_among_the_images_is_refused(capsys):
    assert run("embed", *LOOK, "out=in/f.npy") == 2
    assert "out=in/f.npy lies in data.root=in, where" in capsys.readouterr().err
    assert run("embed", *LOOK, "data.root=[in/a,in/b]", "out=in/b/f.npy") == 2
    assert "out=in/b/f.npy lies in data.root=in/b, where" in capsys.readouterr().err
    assert run("embed", *LOOK, "out=in/f.parquet") == 0
    assert run("embed", *LOOK, "out=in/f.parquet") == 0
    assert "all of it is there already" in capsys.readouterr().out


def test_every_file_is_locked(capsys):
    holder = os.fork()
    if holder == 0:
        with exclusive(Path(".g.npy.embedding.lock"), "g.npy"):
            time.sleep(60)
        os._exit(0)
    try:
        while not Path(".g.npy.embedding.lock").exists() or not locked("g.npy"):
            time.sleep(0.01)
        assert run("embed", *LOOK, "out=[f.npy,g.npy]") == 2
        assert f"g.npy is in use by process {holder}" in capsys.readouterr().err
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)


def locked(name):
    return Path(f".{name}.embedding.lock").read_text().startswith("process")


def test_a_run_whose_options_are_unknown_is_looked_at_as_usual(tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy("w.pth", "run/checkpoints/w.pth")
    run_json = {"overrides": [], "choices": {"data": "of_tomorrow", "eval_data": "of_tomorrow"}}
    Path("run/run.json").write_text(json.dumps(run_json))
    words = [w for w in LOOK if not w.startswith(("ckpt=", "resize=", "size="))]
    assert run("embed", *words, "ckpt=run/checkpoints/w.pth", "out=f.npy") == 0
    said = capsys.readouterr()
    assert "short side 256, central 224 x 224" in said.out
    assert "at which size the run was measured cannot be told" in said.err


def test_words_of_differences():
    about = {"stamp": None, "images": 3, "names": "x", "size": 8, "labels": None}
    assert embed.differing(about | {"size": 9}, about) == "with size=9, not 8"
    assert embed.differing(about | {"names": "y", "stamp": "z"}, about) == (
        "of images with other names"
    )
    assert embed.differing({**about, "stamp": "z"}, about) == ""
