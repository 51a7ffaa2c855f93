"""check, stats and shard, and what training does with other channels, bad images, dead workers."""

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile
from commands import EVALUATION, NO_ONLINE, held_by_another, images, metrics, run
from hydra import compose, initialize_config_module
from PIL import Image

from ssl_xcit import load_backbone
from ssl_xcit.commands.check import CheckSettings
from ssl_xcit.commands.check import main as check
from ssl_xcit.commands.shard import ShardSettings
from ssl_xcit.commands.shard import main as shard
from ssl_xcit.data import checks, crop_dataset, shard_writer
from ssl_xcit.data.decode import decode
from ssl_xcit.data.folders import folder
from ssl_xcit.data.picture import RGB, BadImage
from ssl_xcit.data.settings import DataSettings
from ssl_xcit.data.shards import labelled_shards, tar_shards
from ssl_xcit.data.sources import Files
from ssl_xcit.errors import RunFailed, UserError

TINY = [*NO_ONLINE, "~callbacks.online", "evaluation.baselines=null"]
TINY += ["evaluation.evaluators.linear=null", "augment.num_local=1"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def png(size, **options):
    out = io.BytesIO()
    pixels = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def bad_files():
    """One content of every kind."""
    whole = png((40, 40))
    flipped = bytearray(whole)
    flipped[300] ^= 8
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 600_000
    jpeg = io.BytesIO()
    Image.new("RGB", (60, 60), (9, 99, 199)).save(jpeg, "JPEG")
    return {
        "empty.png": b"",
        "html.jpg": b"<!doctype html><title>404</title>",
        "cut.png": whole[:900],
        "cut.jpg": jpeg.getvalue()[:500],
        "crc.png": bytes(flipped),
        "bomb.png": bomb.getvalue(),
    }


PREPROCESS = {"_target_": "ssl_xcit.data.preprocess.preprocess"}


def data(root="data", max_bad_fraction=0.01):
    source = {"_target_": "ssl_xcit.data.folders.folder", "root": root}
    return DataSettings(source=source, options={}, max_bad_fraction=max_bad_fraction)


def inspect(num_workers=0, **options):
    check(CheckSettings("", PREPROCESS, data(**options), "check", 224, 300.0, num_workers))


def write_tars(out, num_workers=0):
    shard(ShardSettings("", PREPROCESS, data(), out, 3, True, 0, 3600.0, num_workers))


@pytest.mark.parametrize(
    "words",
    [
        ["check", "num_workers=0"],
        ["stats", "num_workers=0"],
        ["pretrain", "data=folder", "model=xcit_micro_4_p8", *TINY],
    ],
    ids=["check", "stats", "pretrain"],
)
def test_images_that_are_nearly_black_are_noticed(words, capsys):
    """Twelve bits of a microscope, in 16-bit files."""
    Path("deep/a").mkdir(parents=True)
    for i in range(12):
        grey = np.random.default_rng(i).integers(0, 4096, (48, 48)).astype(np.uint16)
        Image.fromarray(grey).save(f"deep/a/{i}.png")
    assert run(*words, "data.root=deep") == 0
    warning = capsys.readouterr().err
    assert "is above 4095 of 65535" in warning
    assert "preprocess.value_range=[0,4095]" in warning
    if words[0] == "check":
        assert "4095" in json.loads(Path("check/report.json").read_text())["dark_images"]
        assert run(*words, "data.root=deep", "preprocess.value_range=[0,4095]") == 0
        assert "4095 of" not in capsys.readouterr().err


def test_a_run_started_inside_its_images_goes_on_with_them(capsys):
    """Its own pictures lie in the folder by then."""
    images(Path(), 16)
    words = ["pretrain", "data=folder", "data.root=.", "name=x", "model=xcit_micro_4_p8", *TINY]
    left_out = ("callbacks.snapshots=null", "report=null", "epochs=0.05")
    words = [w for w in words if w not in left_out]
    words += ["epochs=3", "callbacks.snapshots.moments=2", "callbacks.snapshots.images=2"]
    assert run(*words) == 0
    pictures = [p for p in Path("runs").rglob("*") if p.suffix in (".png", ".jpg")]
    assert pictures
    Path("runs/x/summary.json").unlink()
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert "  16 images" in out
    assert "going on from" in out
    assert "1 folder of runs, results or caches, such as runs" in err


def test_a_thin_image_and_what_augmentation_cannot_use(monkeypatch, caplog):
    Image.new("RGB", (6000, 1)).save("thin.png")
    source = Files(["thin.png"])
    pixels, good = crop_dataset.PlainDataset(source, 256, 224, RGB)[0]
    assert good
    assert pixels.shape == (3, 224, 224)

    def refuse(*_):
        raise BadImage("larger than it may become")

    monkeypatch.setattr(crop_dataset, "resize_center_crop", refuse)  # after it was decoded
    assert not crop_dataset.PlainDataset(source, 256, 224, RGB)[0][1]
    assert "larger than it may become" in caplog.text


def test_check_counts_names_and_finds_repeats(capsys):
    images(Path("data/a"), 3, (300, 250))
    images(Path("data/b"), 4, (60, 50))
    shutil.copy("data/b/2.png", "data/b/again.png")
    Image.new("L", (9, 9)).save("data/grey.png")
    for name, content in bad_files().items():
        Path("data", name).write_bytes(content)
    assert run("check", "data.root=data", "num_workers=2", "out=report") == 1
    captured = capsys.readouterr()
    assert "6 of 15 images are bad" in captured.err
    assert "2 not images" not in captured.out
    for line in (
        "good        9: 8 PNG RGB, 1 PNG L",
        "bad         6 (40 %)",
        "9 x 9 to 250 x 300",
        "6 have a side under 224 pixels",
        "1 images repeat another (1 groups)",
    ):
        assert line in captured.out
    report = json.loads(Path("report/report.json").read_text())
    assert report["bad_by_reason"] == {
        "truncated": 2, "too many pixels": 1, "corrupt": 1, "empty files": 1, "not images": 1,
    }  # fmt: skip
    rows = [json.loads(x) for x in Path("report/bad_samples.jsonl").read_text().splitlines()]
    assert {Path(row["name"]).name for row in rows} == set(bad_files())
    groups = [json.loads(x) for x in Path("report/duplicates.jsonl").read_text().splitlines()]
    assert groups == [["data/b/2.png", "data/b/again.png"]]
    inspect(max_bad_fraction=0.5)


def test_check_names_the_file_that_ends_its_process(capsys, monkeypatch):
    images(Path("data"), 40, (20, 20))
    whole = checks.inspect

    def crashing(source, preprocess, index):
        if source.name(index).endswith("/7.png"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return whole(source, preprocess, index)

    monkeypatch.setattr(checks, "inspect", crashing)
    monkeypatch.setattr("ssl_xcit.data.loader.POLL", 0.5)
    inspect(num_workers=1, max_bad_fraction=0.1)
    (row,) = [json.loads(x) for x in Path("check/bad_samples.jsonl").read_text().splitlines()]
    assert row["name"] == "data/7.png"
    assert row["reason"] == "decoding it ends the process (SIGSEGV)"
    assert "good        39" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RunFailed, UserError])
def test_check_ends_where_no_image_is_to_blame(error, monkeypatch):
    """Such as a server that is down, or a cache on a full disk."""
    images(Path("data"), 40, (20, 20))

    def failing(source, preprocess, index):
        raise error("the server does not answer")

    source, whole = folder("data"), checks.inspect
    monkeypatch.setattr(checks, "inspect", failing)
    with pytest.raises(error, match="the server does not answer"):
        list(checks.inspect_all(source, RGB, 1, 10))
    with pytest.raises(error, match="the server does not answer"):
        checks.inspect_in_process(source, RGB, 0)
    monkeypatch.setattr(checks, "inspect", whole)
    assert not checks.inspect_in_process(source, RGB, 0).reason


def test_stats_are_exact(capsys):
    images(Path("data"), 5, (30, 20))
    Path("data/bad.png").write_bytes(b"")
    assert run("stats", "data.root=data", "num_workers=0") == 0
    kept = json.loads(Path("stats.json").read_text())
    pixels = np.stack([decode(p.read_bytes()) for p in Path("data").glob("[0-9].png")]) / 255
    assert np.allclose(kept["mean"], pixels.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(kept["std"], pixels.std((0, 1, 2)), atol=1e-6)
    assert "next: ssl-xcit pretrain" in capsys.readouterr().out
    assert run("stats", "data.root=data", "preprocess.value_range=[0,10]", "num_workers=0") == 0
    assert run("pretrain", "data=folder", "data.root=data", "preprocess.stats=stats.json") == 2
    assert "was made with value_range=(0, 10)" in capsys.readouterr().err


def test_five_channels_from_stats_to_evaluation(capsys):
    """16-bit TIFFs of satellites: statistics, training, evaluation with what the weights know."""
    rng = np.random.default_rng(0)
    labelled = []
    Path("data").mkdir()
    for i in range(30):
        base = rng.uniform(0, 9000, 5) if i % 2 else np.array([8000, 100, 100, 5000, 10])
        noise = rng.normal(0, 300, (40, 40, 5))
        array = (base + noise).clip(0, 10000).astype(np.uint16)
        options = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(f"data/{i:02d}.tif", array, **options)
        labelled.append(f"data/{i:02d}.tif\t{i % 2}\n")
    Path("labels.txt").write_text("".join(labelled))
    satellite = ["preprocess.value_range=[0,10000]"]
    stats = ["stats", "data.root=data", "preprocess.channels=5", *satellite, "num_workers=0"]
    assert run(*stats) == 0
    training = [
        "pretrain", "data=list", "data.file=labels.txt", "eval_data.file=labels.txt",
        "eval_data.resize=40", "eval_data.size=32", "model=xcit_micro_4_p8", "model.in_chans=5",
        "preprocess.stats=stats.json", *satellite, "name=five", *TINY, "epochs=1",
    ]  # fmt: skip
    assert run(*training) == 0
    assert "no saturation, hue and grey" in capsys.readouterr().err
    backbone = load_backbone("runs/five")
    kept = json.loads(Path("stats.json").read_text())
    assert backbone.preprocess["mean"] == kept["mean"]
    assert backbone.preprocess["value_range"] == [0, 10000]
    before = json.loads(Path("runs/five/summary.json").read_text())["results"]
    words = [*EVALUATION, "evaluation.evaluators.linear=null", "evaluation.baselines=null"]
    words.remove("evaluation.evaluators.linear.epochs=2")
    # it finds its data and statistics by itself
    assert run("eval", "ckpt=runs/five", "num_workers=0", *words) == 0
    assert json.loads(Path("runs/five/results.json").read_text())["results"] == before
    capsys.readouterr()
    images(Path("rgb/a"), 4), images(Path("rgb/b"), 4)
    assert run("eval", "ckpt=runs/five", "eval_data=folder", "eval_data.root=rgb") == 2
    assert "preprocess.channels=5" in capsys.readouterr().err


def test_grey_trains_too():
    assert run("pretrain", "model.in_chans=1", "name=grey", *TINY) == 0
    assert load_backbone("runs/grey").preprocess["mean"] == [0.449]


def test_shards_hold_what_the_folder_holds(capsys):
    images(Path("data/cat"), 7, (20, 30))
    images(Path("data/dog"), 6, (25, 20))
    Path("data/dog/bad.png").write_bytes(b"")
    words = ["shard", "data.root=data", "data.labels=true", "out=tars", "images_per_shard=5"]
    words += ["data.max_bad_fraction=0.2"]
    assert run(*words, "num_workers=2") == 0
    out = capsys.readouterr().out
    assert "13 images in 3 shards" in out
    assert "1 bad images left out, such as data/dog/bad.png (empty file)" in out
    keys = dict(line.split("\t") for line in Path("tars/keys.tsv").read_text().splitlines())
    source = tar_shards("tars")
    assert len(source) == len(keys) == 13
    for i in range(13):
        name = Path(keys[source.keys[i]])
        assert source.read(i) == name.read_bytes()
        assert source.labels[i] == ("dog" in str(name))
    kept = json.loads(Path("tars/shards.json").read_text())
    assert kept["class_names"] == ["cat", "dog"]
    before = {p: p.stat().st_mtime_ns for p in Path("tars").glob("*.tar")}
    assert run(*words, "num_workers=0") == 0  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in Path("tars").glob("*.tar")}
    assert run(*words[:-2], "images_per_shard=4") == 2
    assert "begun with another images_per_shard" in capsys.readouterr().err
    assert not Path("tars/.progress.jsonl").exists()  # by which it is known to be ours
    assert run("shard", "data=shards", "data.root=tars", "out=again", "num_workers=0") == 0
    training = ["pretrain", "data=shards", "data.root=tars", "eval_data.root=tars", "name=t", *TINY]
    training += ["model=xcit_micro_4_p8", "eval_data.resize=32", "eval_data.size=32", "epochs=1"]
    assert run(*training) == 0
    assert json.loads(Path("runs/t/summary.json").read_text())["results"]["pretrained"]


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize("names", ["abc", "379", ["x", "y" * 250, "z"], ["é", "1", "b"]])
def test_shards_of_train_and_test_have_the_classes_of_the_folders(names, where):
    """Names that `.cls` cannot hold are found in the index, as those of older versions are."""
    for part, chosen in (("train", names), ("test", [names[0], names[2]])):
        for number, name in enumerate(chosen):
            images(Path(part, name), 2, (8 + number, 8))
        words = ["shard", f"data.root={part}", "data.labels=true", f"out=s/{part}"]
        assert run(*words, "num_workers=0") == 0
    places = ["s/train", "s/test"]
    if where == "bucket":
        places = [f"memory://{place}" for place in places]
        for file in Path("s").glob("*/*"):
            fsspec.filesystem("memory").pipe_file(f"memory://{file}", file.read_bytes())
    pair = labelled_shards(*places)
    assert sorted(pair.train.class_names) == sorted(names)
    for source, part in ((pair.train, "train"), (pair.test, "test")):
        keys = Path("s", part, "keys.tsv").read_text().splitlines()
        folders = [Path(line.split("\t")[1]).parent.name for line in keys]
        assert [source.class_names[label] for label in source.labels] == folders
    assert pair.test.class_names == pair.train.class_names


def run_until(count, patch, words):
    """Interrupt `shard` behind so many tars."""
    write = shard_writer.write_shard
    calls = iter(range(count))

    def interrupted(job, number):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return write(job, number)

    with patch.context() as during:
        during.setattr(shard_writer, "write_shard", interrupted)
        run(*words)


@pytest.mark.parametrize("count", [9, 2], ids=["finished", "interrupted"])
@pytest.mark.parametrize("kind", ["labels", "pixels"])
def test_shards_of_what_has_changed_since_are_refused(kind, count, monkeypatch, capsys):
    images(Path("data"), 4, (10, 10))
    rows = [f"data/{i}.png,{name}\n" for i, name in enumerate("abab")]
    Path("list.csv").write_text("path,label\n" + "".join(rows))
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    np.save("images.npy", pixels)
    source, file = ("list", "list.csv") if kind == "labels" else ("arrays", "images.npy")
    words = ["shard", f"data={source}", f"data.file={file}", "out=tars", "num_workers=0"]
    words.append("images_per_shard=1")
    run_until(count, monkeypatch, words)
    before = {p: p.read_bytes() for p in Path("tars").glob("shard*")}
    assert len(before) == (5 if count == 9 else 2)
    rows[3] = rows[3].replace("b\n", "a\n")
    Path("list.csv").write_text("path,label\n" + "".join(rows))
    np.save("images.npy", pixels + 9)
    capsys.readouterr()
    assert run(*words) == 2
    assert "out=tars was begun with another content: name another" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("tars").glob("shard*")} == before


@pytest.mark.parametrize("count", [9, 1], ids=["finished", "interrupted"])
def test_shards_that_an_older_version_began(count, monkeypatch):
    """They go on with class ids, and what it did not note stays unknown."""
    for name in "ab":
        images(Path("data", name), 3, (10, 10))
    words = ["shard", "data.root=data", "data.labels=true", "out=tars", "num_workers=0"]
    words.append("images_per_shard=2")
    with monkeypatch.context() as before:
        before.setattr(shard_writer, "class_texts", lambda source: ())
        run_until(count, before, words)
    index = Path("tars/shards.json" if count == 9 else "tars/.progress.jsonl")
    text = re.sub(r'"content": "[0-9a-f]+", *', "", index.read_text())
    assert "content" not in text
    index.write_text(text)
    assert run(*words) == 0
    assert "content" not in json.loads(Path("tars/shards.json").read_text())["made_with"]
    assert all(b"\0000000" not in p.read_bytes() for p in Path("tars").glob("*.part"))
    source = tar_shards("tars")
    keys = dict(line.split("\t") for line in Path("tars/keys.tsv").read_text().splitlines())
    assert len(source) == 6
    for key, label in zip(source.keys, source.labels, strict=True):
        assert Path(keys[key]).parent.name == source.class_names[label]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([23.7, 1.2, 0.5]), "one class an image, not numbers to predict"),
        (np.array([[0, 1], [1, 1], [0, 0]]), "one class an image, not several labels an image"),
    ],
)
def test_labels_that_are_no_classes_are_not_written(labels, message, capsys):
    np.save("images.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save("labels.npy", labels)
    words = ["shard", "data=arrays", "data.file=images.npy", "num_workers=0", "out=tars"]
    assert run(*words, "data.labels=labels.npy") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "data.labels=null" in error
    assert not Path("tars").exists()
    assert run(*words, "data.labels=null") == 0
    images(Path("data"), 2, (8, 8))
    Path("list.csv").write_text("path,target\ndata/0.png,1.5\ndata/1.png,2.25\n")
    assert run("shard", "data=list", "data.file=list.csv", "out=more") == 2
    assert "data.file=FILE" in capsys.readouterr().err
    assert not Path("more").exists()


def test_shards_go_on_where_they_were_stopped(monkeypatch):
    images(Path("data"), 12, (10, 10))
    write_tars("whole")
    write, calls = shard_writer.write_shard, []

    def interrupted(job, number):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(number)
        return write(job, number)

    monkeypatch.setattr(shard_writer, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tars("cut")
    assert not Path("cut/shards.json").exists()
    calls.clear()
    monkeypatch.setattr(shard_writer, "write_shard", lambda j, n: calls.append(n) or write(j, n))
    write_tars("cut")
    assert calls == [2, 3]
    # a settings line without a shard behind it, and one cut short
    for progress in ("", '{"images": 12'):
        Path("odd").mkdir()
        Path("odd/.progress.jsonl").write_text(progress)
        shutil.copy("whole/shard-000000.tar", "odd")
        write_tars("odd")
        assert len(list(Path("odd").glob("*.tar"))) == 4
        shutil.rmtree("odd")
    for path in Path("whole").glob("*.tar"):
        assert path.read_bytes() == Path("cut", path.name).read_bytes()
    assert not list(Path("cut").glob(".*"))


def test_one_writer_a_folder_and_a_killed_one(monkeypatch, caplog):
    images(Path("data"), 12, (10, 10))
    write = shard_writer.write_shard

    def killed(job, number):
        if number == 2 and not Path("mark").exists():
            Path("mark").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(job, number)

    monkeypatch.setattr(shard_writer, "write_shard", killed)
    write_tars("tars", num_workers=2)
    assert "SIGKILL" in caplog.text
    assert len(tar_shards("tars")) == 12
    assert not list(Path("tars").glob(".*"))
    Path("busy").mkdir()
    with (
        held_by_another(Path("busy/.lock")) as holder,
        pytest.raises(UserError, match=f"out=busy is in use by process {holder} on"),
    ):
        write_tars("busy")


def test_a_shard_that_reads_back_differently_is_an_error(monkeypatch):
    images(Path("data"), 4, (10, 10))
    whole = shard_writer.list_tar

    def spoiled(path):
        with open(path, "r+b") as file:
            file.seek(520)
            file.write(b"x")
        return whole(path)

    monkeypatch.setattr(shard_writer, "list_tar", spoiled)
    with pytest.raises(RunFailed, match=r"a bad disk\?"):
        write_tars("tars")
    assert not list(Path("tars").glob("shard-*.tar"))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_percent_bad(capsys, count):
    """Every kind of bad; the run ends well, each is listed once, and above the limit it stops."""
    bad, folder, good = bad_files(), Path("data"), png((24, 24))
    folder.mkdir()
    kinds = list(bad.items())
    for i in range(count):
        name = f"{i:05d}.png"
        if i % 100 == 50:
            kind, content = kinds[i // 100 % len(kinds)]
            name = f"{i:05d}_{kind}"
            if kind == "bomb.png":
                Path("bomb").exists() or Path("bomb").write_bytes(content)
                os.link("bomb", folder / name)
                continue
            Path(folder / name).write_bytes(content)
        elif i < 3:
            (folder / name).write_bytes(good)
        else:
            os.link(folder / f"{i % 3:05d}.png", folder / name)
    words = [
        "pretrain", "data=folder", "data.root=data", "model=xcit_micro_4_p8", *TINY, "name=run",
        "augment.global_size=16", "augment.local_size=8", "batch_size=100", "epochs=1",
    ]  # fmt: skip
    assert run(*words) == 0
    rows = [json.loads(x) for x in Path("runs/run/bad_samples.jsonl").read_text().splitlines()]
    names = [Path(row["name"]).name for row in rows]
    assert sorted(names) == sorted(p.name for p in folder.iterdir() if "_" in p.name)
    assert len(set(names)) == count // 100
    assert metrics("runs/run")[-1]["bad_images"] == repr(count / 100)
    capsys.readouterr()
    more = [word for word in words if word != "name=run"]
    assert run(*more, "name=few", "data.max_bad_fraction=0.003") == 1
    error = capsys.readouterr().err
    stopped = re.search(rf"(\d+) of {count:,} images are bad \(0.\d %, data.max_bad_frac", error)
    assert count * 3 // 1000 < int(stopped[1]) < count // 100
    assert "Traceback" not in error


def test_a_worker_killed_in_training_changes_no_number(monkeypatch, capsys):
    from ssl_xcit.training import module

    monkeypatch.setattr("ssl_xcit.data.loader.POLL", 0.5)
    workers = [w for w in TINY if w != "num_workers=0"] + ["num_workers=1"]
    assert run("pretrain", "name=quiet", *workers) == 0
    update, calls = module.ema_update_, []

    def killing(*args):
        calls.append(update(*args))
        if len(calls) == 4:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            itself = Path("/proc/self/cmdline").read_bytes()
            for child in children:  # of which loader processes alone are forked
                if Path(f"/proc/{child}/cmdline").read_bytes() == itself:
                    os.kill(int(child), signal.SIGKILL)

    monkeypatch.setattr(module, "ema_update_", killing)
    assert run("pretrain", "name=killed", *workers) == 0
    assert "SIGKILL" in capsys.readouterr().err
    timed = ("images_per_second", "data_wait")
    quiet, killed = (
        [{k: v for k, v in row.items() if k not in timed} for row in metrics(f"runs/{name}")]
        for name in ("quiet", "killed")
    )
    assert quiet == killed


@pytest.mark.parametrize(
    ("words", "eval_data"),
    [
        (["data=cifar10", "data.root=x", "data.download=true"], ("x", True)),
        (["data=cifar10", "data.root=x", "eval_data.root=y"], ("y", False)),
        (["data=cifar10", "data.root=x", "eval_data=cifar100"], ("data/cifar100", False)),
        (["data=folder", "data.root=x", "eval_data=cifar10"], ("data/cifar10", False)),
        (["data=imagenet", "data.root=x"], ("x", False)),
    ],
)
def test_eval_data_of_the_same_set_lies_where_data_does(words, eval_data):
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", overrides=words)
    assert (cfg.eval_data.root, cfg.eval_data.download) == eval_data
