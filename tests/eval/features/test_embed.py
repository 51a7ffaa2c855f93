"""Embedding killed and rerun, in every format, and search in what came out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import held_by_another, images, run
from PIL import Image
from tiny_run import make_run, published

from ssl_xcit import load_backbone
from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise, resize_center_crop
from ssl_xcit.eval.features import cache as feature_cache
from ssl_xcit.eval.features import store
from ssl_xcit.eval.features.embed import describe_differences

ALL = ["ckpt=w.pth", "data.root=in", "resize=32", "size=32", "num_workers=0", "device=cpu"]
ARRAY = ["ckpt=w.pth", "data=arrays", "data.file=i.npy", "resize=16", "size=16", "device=cpu"]
SLOWLY = """
import sys, time
from ssl_xcit import cli
from ssl_xcit.eval.features import cache
cache.NOTED = 0.05
write_note = cache.PartialFeatures.write_note
def slower(self):
    write_note(self)
    time.sleep(0.5)
cache.PartialFeatures.write_note = slower
cli.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "w.pth")


@pytest.fixture
def classes(inside):
    for name in "ab":
        images(Path("in") / name, 2)


def noise(count):
    """An array of images, in a file."""
    np.save("i.npy", np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8))


def same_as_uninterrupted(words, count):
    """Check the file k.npy, and that each of its rows was written once."""
    assert run("embed", *words, "out=whole.npy") == 0
    assert Path("k.npy").read_bytes() == Path("whole.npy").read_bytes()
    lines = Path("k.npy.rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(count))


def expected(names):
    """Features by the backbone alone."""
    backbone = load_backbone("w.pth")
    pixels = [resize_center_crop(decode(Path(n).read_bytes(), RGB), 32, 32) for n in names]
    x = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), RGB)
    with torch.no_grad():
        return backbone(x).numpy()


def test_every_format_has_the_features(capsys):
    images(Path("in/a"), 5)
    images(Path("in/b"), 4)
    Path("in/a/bad.png").write_text("<html>")
    words = ["data.max_bad_fraction=0.5", *ALL]
    assert run("embed", *words, "out=[f.parquet,f.npy,f.faiss]") == 0
    out = capsys.readouterr().out
    assert "written: f.parquet, 9 rows" in out
    assert "1 images could not be read: f.parquet.bad_samples.jsonl" in out
    (bad,) = map(json.loads, Path("f.parquet.bad_samples.jsonl").read_text().splitlines())
    assert (bad["name"], bad["place"]) == ("in/a/bad.png", 5)
    assert "cannot identify" in bad["reason"]
    table = pq.read_table("f.parquet")
    names = table["name"].to_pylist()
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    truth = expected(names)
    features = np.array(table["feature"].to_pylist(), np.float32)
    assert np.abs(features - truth).max() < 1e-5
    assert np.array_equal(np.load("f.npy"), features)
    rows = [json.loads(line) for line in Path("f.npy.rows.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rows] == names
    index = faiss.read_index("f.faiss")
    assert index.ntotal == 9
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.abs(index.reconstruct_n(0, 9) - unit).max() < 1e-6
    assert not list(Path(".").glob(".f*"))
    before = {p: p.stat().st_mtime_ns for p in Path(".").iterdir()}
    assert run("embed", *words, "out=[f.parquet,f.npy,f.faiss]") == 0
    assert "all of it is there already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path(".").iterdir()}


def test_kinds_labels_and_half_precision(capsys):
    run_dir = make_run(Path("run"))
    for name in "abc":
        images(Path("in") / name, 2)
    words = ["data.root=in", "data.labels=true", "ckpt=run", "features=cls_patch", "num_workers=0"]
    assert run("embed", *words, "dtype=float16", "out=f.parquet") == 0
    assert "short side 64, central 64 x 64" in capsys.readouterr().out
    table = pq.read_table("f.parquet")
    assert table.schema.field("feature").type.list_size == 64
    assert str(table.schema.field("feature").type.value_type) in ("halffloat", "float16")
    assert table["label"].to_pylist() == [0, 0, 1, 1, 2, 2]
    about = json.loads(table.schema.metadata[b"ssl_xcit"])
    assert about["ckpt"] == str(run_dir / "checkpoints/step-000006.ckpt")


def test_interrupted_and_rerun_each_row_is_written_once(monkeypatch, capsys):
    """Ctrl-C twice; what was extracted is not extracted again."""
    noise(100)
    words = [*ARRAY, "batch_size=10", "num_workers=0"]
    whole, counts = feature_cache.batches, []

    def some(extractor, source, *rest):
        counts.append(len(source))
        for number, batch in enumerate(whole(extractor, source, *rest)):
            if number == 3 and len(counts) < 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(feature_cache, "batches", some)
    for _ in range(2):
        assert run("embed", *words, "out=k.npy") == 130
        assert "the same command goes on" in capsys.readouterr().out
        assert not Path("k.npy").exists()
    assert run("embed", *words, "out=k.npy") == 0
    assert "going on from image 60 of 100" in capsys.readouterr().out
    assert counts == [100, 70, 40]
    same_as_uninterrupted(words, 100)


def test_begun_with_other_settings(classes, refused):
    work = Path(".f.npy.embedding")
    work.mkdir()
    assert run("embed", *ALL, "out=f.npy") == 0
    os.rename("f.npy", "g.npy")
    work.mkdir()
    about = json.loads(Path("f.npy.json").read_text())
    (work / "settings.json").write_text(json.dumps(about | {"size": 5}))
    refused("was begun with size=5, not 32:", "embed", *ALL, "out=f.npy")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_killed_five_times():
    """Each start comes further than the one before."""
    noise(10_000)
    words = [*ARRAY, "batch_size=50", "num_workers=1"]
    command = [sys.executable, "-c", SLOWLY, "embed", *words, "out=k.npy"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    rng, note, done = random.Random(0), Path(".k.npy.embedding/progress.json"), 0
    for _ in range(5):
        process = subprocess.Popen(
            command, env=os.environ | path, stdout=subprocess.DEVNULL, start_new_session=True
        )
        last, limit = done, time.monotonic() + 120
        while done <= last:
            assert time.monotonic() < limit
            assert process.poll() is None, "done before it was killed"
            time.sleep(0.02)
            with suppress(OSError, ValueError):
                done = json.loads(note.read_text())["done"]
        time.sleep(rng.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run("embed", *words, "out=k.npy") == 0
    same_as_uninterrupted(words, 10_000)


def test_search_finds_what_brute_force_finds(capsys, refused):
    images(Path("in"), 12)
    assert run("embed", *ALL, "out=[f.parquet,f.npy,f.faiss]") == 0
    features = expected([f"in/{i}.png" for i in range(12)])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[3]))[:5]
    for index in ("f.parquet", "f.npy", "f.faiss"):
        search = ["search", f"index={index}", "image=in/3.png", "k=5", "device=cpu"]
        assert run(*search, "out=n.json") == 0
        (found,) = json.loads(Path("n.json").read_text())["found"]
        names = [near["name"] for near in found["neighbours"]]
        assert names == [f"in/{i}.png" for i in order]
        assert found["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)
        assert "in/3.png" in capsys.readouterr().out
    assert run("search", "index=f.npy", "image=in", "k=50", "device=cpu") == 0
    with Image.open("neighbours.png") as picture:
        assert picture.width > 1000
    os.mkdir("elsewhere")
    os.rename("w.pth", "elsewhere/v.pth")
    search = ["search", "index=f.npy", "image=in/3.png", "out=null"]
    refused("w.pth, are not there: name them with ckpt=...", *search)
    assert run(*search, "ckpt=elsewhere/v.pth") == 0
    published(Path("other.pth"), seed=1)
    refused("was made by weights with the SHA-256", *search, "ckpt=other.pth")


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indices(kind, capsys):
    noise(300)
    assert run("embed", *ARRAY, f"index={kind}", "out=f.faiss", "num_workers=0") == 0
    Image.fromarray(np.load("i.npy")[7]).save("q.png")
    assert run("search", "index=f.faiss", "image=q.png", "out=n.json") == 0
    assert "an approximate index" in capsys.readouterr().out
    (found,) = json.loads(Path("n.json").read_text())["found"]
    assert len(found["neighbours"]) == 10


def test_too_many_bad_images_and_none_that_is_good(capsys, refused):
    images(Path("in"), 3)
    Path("in/x.png").write_text("")
    assert run("embed", *ALL, "out=f.npy") == 1
    assert "1 of 4 images are bad" in capsys.readouterr().err
    assert len(np.load("f.npy")) == 3
    for file in Path("in").iterdir():
        file.write_text("")
    refused("none of 4 images can be read", "embed", *ALL, "out=g.npy")


def test_names_that_are_no_text():
    images(Path("in"), 2)
    os.rename(b"in/1.png", b"in/caf\xe9\n.png")
    assert run("embed", *ALL, "out=[f.parquet,f.npy]") == 0
    names = pq.read_table("f.parquet")["name"].to_pylist()
    assert names[1].startswith("in/caf\\udce9")
    lines = Path("f.npy.rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out=f.csv"], "a file ending in .parquet, .npy, .faiss"),
        (["out=[f.npy,f.npy]"], "of different names"),
        (["out=f.npy", "features=tokens"], "features=tokens must be cls, patch"),
        (["out=f.npy", "data.root=nowhere"], "nowhere"),
        (["out=in/f.npy"], "out=in/f.npy lies in data.root=in, where"),
        (["out=in/b/f.npy", "data.root=[in/a,in/b]"], "lies in data.root=in/b, where"),
    ],
)
def test_bad_words(classes, refused, words, said):
    refused(said, "embed", *ALL, *words)


def test_a_table_among_the_images_is_none_of_them(classes, capsys):
    assert run("embed", *ALL, "out=in/f.parquet") == 0
    assert run("embed", *ALL, "out=in/f.parquet") == 0
    assert "all of it is there already" in capsys.readouterr().out


def test_bad_searches(refused):
    images(Path("in"), 2)
    Path("bad.png").write_text("no image")
    np.save("bare.npy", np.ones((2, 3)))
    assert run("embed", *ALL, "out=[f.npy,broken.faiss]") == 0
    Path("broken.faiss").write_bytes(b"xxxx")
    for words, message in (
        (["index=none.npy", "image=q.png"], "none.npy: no such file"),
        (["index=w.pth", "image=q.png"], "a file ending in .parquet"),
        (["index=bare.npy", "image=q.png"], "nothing tells what made it"),
        (["index=f.npy", "image=none.png"], "image=none.png: no such file or folder"),
        (["index=f.npy", "image=bad.png"], "bad.png"),
        (["index=f.npy", "image=in/0.png", "k=0"], "k=0"),
        (["index=f.npy", "image=in/0.png", "out=n.txt"], "ending in .png"),
        (["index=broken.faiss", "image=in/0.png"], "broken.faiss cannot be read"),
    ):
        refused(message, "search", *words)


def test_without_pyarrow(monkeypatch, refused):
    images(Path("in"), 2)
    assert run("embed", *ALL, "out=g.parquet") == 0
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    install = "pip install 'ssl-xcit[tables]'"
    refused(install, "search", "index=g.parquet", "image=in/0.png", "out=null")
    monkeypatch.setattr(feature_cache, "batches", None)  # it is said before anything is extracted
    refused(install, "embed", *ALL, "out=f.parquet")


def test_a_file_of_something_else_is_left_alone(classes, refused, monkeypatch):
    monkeypatch.setattr("ssl_xcit.eval.features.cache.SETTLED", 0)
    embed = ["embed", *ALL, "out=f.npy"]
    Path("f.npy").write_text("mine")
    refused("none that ssl-xcit embed made", *embed)
    Path("f.npy").unlink()
    assert run(*embed, "out=[f.npy,f.faiss]") == 0
    refused("made with resize=32, not 64:", *embed, "resize=64")
    refused("made with other labels: name another file", *embed, "data.labels=true")
    assert run(*embed, "index=hnsw") == 0  # which makes another file of the index alone
    made = "f.faiss is there, made with index=flat, not hnsw: name another file"
    refused(made, *embed, "out=f.faiss", "index=hnsw")
    published(Path("w.pth"), seed=1)
    refused("made from other weights:", *embed)
    published(Path("w.pth"))
    os.rename("in/a/0.png", "in/a/x.png")
    refused("made of images with other names:", *embed)
    os.rename("in/a/x.png", "in/a/0.png")
    shutil.copy("in/b/1.png", "in/a/0.png")
    refused("made of images whose files have changed since:", *embed)
    images(Path("in/more"), 1)
    refused("made of 4 images, where there are 5 now:", *embed)
    rows = Path("f.npy.rows.jsonl").read_text().splitlines(keepends=True)
    Path("f.npy.rows.jsonl").write_text("".join(rows[:-1]))
    search = ["search", "index=f.npy", "image=in/a/0.png", "out=null"]
    refused("has 4 rows, and 3 names are beside it", *search)
    refused("f.npy is there, and is not whole", *embed)


@pytest.mark.parametrize("name", ["f.npy", "f.faiss", "f.parquet"])
def test_stopped_while_the_file_is_written(classes, name, monkeypatch, capsys):
    """At the end of a long extraction: nothing is extracted again, nothing has to be removed."""
    assert run("embed", *ALL, f"out=whole{Path(name).suffix}") == 0
    with monkeypatch.context() as patched:
        for step in ("write_rows", "write_index", "write_parquet"):
            patched.setattr(store, step, Mock(side_effect=KeyboardInterrupt))
        assert run("embed", *ALL, f"out={name}") == 130
        assert not Path(name).exists()
    with monkeypatch.context() as patched:
        patched.setattr("ssl_xcit.eval.features.cache.batches", None)
        assert run("embed", *ALL, f"out={name}") == 0
    if name != "f.parquet":  # which holds when its weights were read
        assert Path(name).read_bytes() == Path(f"whole{Path(name).suffix}").read_bytes()
    assert not list(Path().glob(".*"))


def test_every_file_is_locked(classes, refused):
    with held_by_another(Path(".g.npy.embedding.lock")) as holder:
        refused(f"in use by process {holder}", "embed", *ALL, "out=[f.npy,g.npy]")


def test_a_run_whose_options_are_unknown_has_the_usual_sizes(classes, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("w.pth", "run/checkpoints/w.pth")
    run_json = {"overrides": [], "choices": {"data": "of_tomorrow", "eval_data": "of_tomorrow"}}
    Path("run/run.json").write_text(json.dumps(run_json))
    words = [w for w in ALL if not w.startswith(("ckpt=", "resize=", "size="))]
    assert run("embed", *words, "ckpt=run/checkpoints/w.pth", "out=f.npy") == 0
    out, err = capsys.readouterr()
    assert "short side 256, central 224 x 224" in out
    assert "cannot determine the evaluation image size of the run" in err


def test_words_of_differences():
    about = {"stamp": None, "images": 3, "names": "x", "size": 8, "labels": None}
    assert describe_differences(about | {"size": 9}, about) == "with size=9, not 8"
    renamed = about | {"names": "y", "stamp": "z"}
    assert describe_differences(renamed, about) == "of images with other names"
    assert describe_differences({**about, "stamp": "z"}, about) == ""
    now = about | {"content": "new"}
    assert describe_differences(about, now) == ""  # written by an older version
    assert describe_differences(about | {"content": "old"}, now) == (
        "of other images of the same number and names"
    )


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("settled", [(10**18, 0), (0, 10**18)])
def test_files_replaced_after_the_first_start_are_noticed(
    classes, settled, stopped, refused, monkeypatch
):
    """Also where times of files, just written at one of the two starts, cannot be compared."""
    before, now = settled
    monkeypatch.setattr(feature_cache, "SETTLED", before)
    with monkeypatch.context() as patched:
        if stopped:
            patched.setattr(store, "write_rows", Mock(side_effect=KeyboardInterrupt))
        assert run("embed", *ALL, "out=f.npy") == (130 if stopped else 0)
    shutil.copy("in/b/1.png", "in/a/0.png")
    monkeypatch.setattr(feature_cache, "SETTLED", now)
    refused("of other images of the same number and names", "embed", *ALL, "out=f.npy")


def test_another_array_of_the_same_name(capsys):
    for folder, seed in (("a", 0), ("b", 1)):
        Path(folder).mkdir()
        images = np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), np.uint8)
        np.save(f"{folder}/images.npy", images)
    words = [w for w in ALL if not w.startswith("data")] + ["data=arrays", "out=f.npy"]
    assert run("embed", *words, "data.file=a/images.npy") == 0
    assert run("embed", *words, "data.file=a/images.npy") == 0
    assert "all of it is there already" in capsys.readouterr().out
    assert run("embed", *words, "data.file=b/images.npy") == 2
    assert "of other images of the same number and names" in capsys.readouterr().err
