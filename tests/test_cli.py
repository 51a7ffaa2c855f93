"""pretrain and eval as a person types them."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import EVALUATION, NO_ONLINE, SMALL, images, metrics, run

from ssl_xcit.cli import named, with_data
from ssl_xcit.training.run_name import run_name


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)


def test_pretrain_then_eval(capsys):
    assert run("pretrain", "name=run", *SMALL) == 0
    out = capsys.readouterr().out
    assert "next: ssl-xcit eval ckpt=runs/run" in out
    assert "1,494 images" in out
    kind = r"(class token|mean patch token|class and mean patch token)"
    assert re.search(rf"features of pretrained: k-NN {kind}, linear probe {kind}\n", out)
    folder = Path("runs/run")
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "config.yaml", "images.npz", "metrics.csv", "run.json", "summary.json",
    }  # fmt: skip
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "best.ckpt", "best.json", "manifest.json", "step-000006.ckpt", "step-000009.ckpt",
    }  # fmt: skip
    rows = metrics(folder)
    assert [r["step"] for r in rows if r["loss"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["knn_k20"]] == ["4", "8"]
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["results"]) == ["random weights", "colour histogram", "pretrained"]
    assert summary["results"]["pretrained"].keys() == {
        "knn_k10", "knn_k20", "knn_k100", "knn_k200", "linear", "linear_lr",
    }  # fmt: skip
    with open(folder / "checkpoints/step-000009.ckpt", "rb") as file:
        assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []

    assert run("eval", "ckpt=runs/run", "num_workers=0", *EVALUATION) == 0
    assert "built-in photos" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results == summary["results"]  # the same numbers by either command

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run("pretrain", "name=run", *SMALL) == 0  # finished: nothing is done again
    assert "runs/run is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run("pretrain", "name=run", *SMALL, "optim.lr=1") == 2
    assert re.search(r"optim\.lr=[\d.]+ \(now 1\)", capsys.readouterr().err)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    words = ["pretrain", "evaluation.baselines=null"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*words, f"name={name}", f"seed={seed}", *SMALL) == 0
    assert run(*words, "name=d", "~callbacks.online", *NO_ONLINE) == 0
    a, b, c = (
        [[r[k] for k in ("step", "loss", "grad_norm", "knn_k20")] for r in metrics(f"runs/{n}")]
        for n in "abc"
    )
    assert a == b
    assert a != c
    alone = [[r["step"], r["loss"], r["grad_norm"]] for r in metrics("runs/d")]
    assert alone == [row[:3] for row in a if row[1]]  # online evaluation changes nothing


OWN = [
    "pretrain", "name=own", "data.root=in", "model=xcit_micro_4_p8",
    *(o for o in SMALL if not o.startswith(("model", "epochs"))),
]  # fmt: skip


def test_own_images_without_labels_and_smaller_than_the_crop(tmp_path, capsys):
    images(tmp_path / "in/some/where", 9, size=(20, 30))
    assert run(*OWN, "epochs=2") == 0
    captured = capsys.readouterr()
    assert captured.err.count("are enlarged") == 1
    assert captured.out.count("no labelled images") == 2
    assert json.loads(Path("runs/own/summary.json").read_text())["results"] == {}
    assert run("eval", "ckpt=runs/own") == 2
    assert "eval_data.root=DIR" in capsys.readouterr().err


def test_own_labelled_images(tmp_path, capsys):
    for name in ("a", "b"):
        images(tmp_path / "in" / name, 8)
    labelled = ["eval_data.root=in", "eval_data.size=32", "eval_data.resize=32"]
    assert run(*OWN, "data=folder", "epochs=1", *labelled) == 0
    assert "in (2 class folders)" in capsys.readouterr().out
    assert run("eval", "ckpt=runs/own", "num_workers=0", *EVALUATION) == 0
    assert "in (2 class folders)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_makes_a_folder_each():
    assert run("pretrain", "-m", "seed=1,2", "evaluation.baselines=null", *SMALL) == 0
    (sweep,) = Path("runs").iterdir()
    folders = [p for p in sweep.iterdir() if p.is_dir()]
    assert len(folders) == 2
    assert all((p / "summary.json").exists() for p in folders)


def test_wandb_writes_offline():
    assert run("pretrain", "name=w", "logger=wandb", *SMALL) == 0
    assert list(Path("runs/w/wandb").glob("offline-run-*/*.wandb"))
    recorded = b"".join(p.read_bytes() for p in Path("runs/w/wandb").rglob("*.wandb"))
    assert b"knn_k20" in recorded
    host = os.uname().nodename
    for private in ([host] if len(host) > 5 else []) + [sys.executable, str(Path.cwd())]:
        assert private.encode() not in recorded, private


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("ssl_xcit.commands.pretrain.check_images", lambda *a: {}["a bug"])
    assert run("pretrain") == 1
    assert "KeyError: 'a bug'" in capsys.readouterr().err


def test_trials_of_a_sweep_tell_their_errors_in_one_line(monkeypatch):
    seen = []

    def sweeper(config, command, words, flags):
        seen.append((os.environ["HYDRA_FULL_ERROR"], words))
        return 0

    monkeypatch.setattr("ssl_xcit.commands.multirun.main", sweeper)
    assert run("pretrain", "-m", "data.root=a,b") == 0
    assert seen == [("0", ["data=folder", "data.root=a,b"])]


def installed(*words, **environment):
    """What the installed command writes."""
    return subprocess.run(
        [Path(sys.executable).parent / "ssl-xcit", *words], env=os.environ | environment,
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_help_is_quick_and_offline():
    """`--help` of the installed command, with a proxy that nobody answers; by the processor's time,
    for the machine may be busy with something else.
    """
    nobody = "http://127.0.0.1:9"
    for words in (["--help"], ["pretrain", "--help"], ["eval", "--help"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "ssl-xcit" in installed(*words, http_proxy=nobody, https_proxy=nobody)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


def test_paths_as_people_type_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a (1)", "b=c", "d,e", "f'g", "ü $x", "[h]"):
        images(tmp_path / name, 3)
        assert run("check", f"data.root=~/{name}", "out=~/found", "num_workers=0") == 0, name
        assert (tmp_path / "found/report.json").is_file()
        shutil.rmtree(tmp_path / "found")


def test_tab_completion():
    def complete(line):
        point = str(len(line))
        return installed("-sc", "query=bash", COMP_LINE=line, COMP_POINT=point).split()

    assert complete("ssl-xcit pre") == ["predict", "pretrain"]
    assert "model=xcit_nano_12_p8" in complete("ssl-xcit pretrain model=xcit_nano")
    assert "optim.lr=" in complete("ssl-xcit pretrain optim.l")
    assert "which=" in complete("ssl-xcit eval whi")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "photos"),
        (["name=x", "out=/tmp", "num_workers=3", "logger=wandb", "trainer.devices=2"], "photos"),
        (["data=cifar10", "optim.lr=1e-3"], "cifar10_optim.lr-1e-3"),
        (["seed=1"], "photos_seed-1"),
        (["experiment=continue"], "photos_experiment-continue"),
        (["data=folder", "optim.lr=1", "data.root=a"], "folder_optim.lr-1_data.root-a"),
    ],
)
def test_run_names_are_stable(overrides, name):
    """Whether the words that a folder or the photographs alone stand for are typed or not."""
    data = next((o[5:] for o in overrides if o.startswith("data=")), "photos")
    assert run_name(data, overrides) == name
    assert run_name(data, with_data("pretrain", overrides)) == name


DATA = [  # what is typed, and what it means
    (["pretrain", "data.root=a"], ["data=folder", "data.root=a"]),
    (["pretrain", "a"], ["data=folder", "data.root=a"]),
    (["pretrain", "seed=1", "a"], ["seed=1", "data=folder", "data.root=a"]),
    (["pretrain", "-m", "data.root=a,b"], ["-m", "data=folder", "data.root=a,b"]),
    (["pretrain", "data.root=[a,~/b]"], ["data=folder", "data.root=[a,~/b]"]),
    (["pretrain", "data.root='a b'"], ["data=folder", "data.root='a b'"]),
    (["pretrain", "++data.root=a"], ["data=folder", "++data.root=a"]),
    (["pretrain", "data.file=x.NPY"], ["data=arrays", "data.file=x.NPY"]),
    (["pretrain", "data.file='x y.npz'"], ["data=arrays", "data.file='x y.npz'"]),
    (["pretrain", "data.file=x.txt\r"], ["data=list", "data.file=x.txt\r"]),
    (["pretrain", "x.parquet"], ["data=list", "data.file=x.parquet"]),
    (["pretrain", "data.root=a", "data.file=x.csv"],
     ["data.root=a", "data=list", "data.file=x.csv"]),
    (["pretrain", "eval_data.root=b"], ["eval_data=folder", "eval_data.root=b"]),
    (["pretrain", "data.file=x.tsv", "eval_data.root=b"],
     ["data=list", "data.file=x.tsv", "eval_data=folder", "eval_data.root=b"]),
    (["pretrain", "data.root=a", "eval_data.root=b"],
     ["data=folder", "data.root=a", "eval_data.root=b"]),
    (["pretrain", "data.root=a", "eval_data.file=x.npy"],
     ["data=folder", "data.root=a", "eval_data=arrays", "eval_data.file=x.npy"]),
    (["pretrain", "experiment=continue", "data.root=a"],
     ["experiment=continue", "data=folder", "data.root=a"]),
    (["check", "data.file=x.txt"], ["data=list", "data.file=x.txt"]),
    (["shard", "a", "out=b"], ["data.root=a", "out=b"]),
    (["shard", "a", "b"], ["data.root=a", "out=b"]),
    (["eval", "x", "eval_data.root=b"], ["ckpt=x", "eval_data=folder", "eval_data.root=b"]),
    (["eval", "ckpt=x", "eval_data.file=x.txt"],
     ["ckpt=x", "eval_data=list", "eval_data.file=x.txt"]),
    # what is chosen has the setting, or is not known here
    (["pretrain", "data=shards", "data.root=a"], ["data=shards", "data.root=a"]),
    (["pretrain", "s3://b/a"], ["data=shards", "data.root=s3://b/a"]),
    (["pretrain", "data.root=a", "data=photos"], ["data.root=a", "data=photos"]),
    (["pretrain", "data=list", "data.file=x.txt", "data.root=a"],
     ["data=list", "data.file=x.txt", "data.root=a"]),
    (["pretrain", "experiment=cifar10", "data.root=a"], ["experiment=cifar10", "data.root=a"]),
    (["pretrain", "experiment=imagenet", "data.root=a"],
     ["experiment=imagenet", "data.root=a"]),
    (["pretrain", "experiment=domain", "data.root=a"], ["experiment=domain", "data.root=a"]),
    (["pretrain", "experiment=mine", "data.root=a"], ["experiment=mine", "data.root=a"]),
    (["pretrain", "-cd", "mine", "data.root=a"], ["-cd", "mine", "data.root=a"]),
    (["check", "data.root=a"], ["data.root=a"]),
    (["check", "hf://datasets/a/b"], ["data=shards", "data.root=hf://datasets/a/b"]),
    (["eval", "x", "eval_data.root=s3://b"], ["ckpt=x", "eval_data=shards", "eval_data.root=s3://b"]),
    (["eval", "x", "eval_data=shards", "eval_data.root=b"],
     ["ckpt=x", "eval_data=shards", "eval_data.root=b"]),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), DATA, ids=lambda words: " ".join(words))
def test_images_are_named_by_their_folder_or_file_alone(tmp_path, typed, meant):
    (tmp_path / "a").mkdir()
    command, *words = typed
    for given in (words, meant):
        meaning = with_data(command, named(command, given))
        assert [word for word in meaning if word != "experiment=photos"] == meant


RECIPES = [  # what is typed, and the recipe that it means
    ([], "experiment=photos"),
    (["name=x"], "experiment=photos"),
    (["data=photos"], "experiment=photos"),
    (["data='photos'"], "experiment=photos"),
    (["eval_data.root=b"], "experiment=photos"),
    (["-m", "seed=1,2"], "experiment=photos"),
    (["-cd", "mine"], "experiment=photos"),
    (["experiment=continue"], "experiment=[photos,continue]"),
    (["experiment=[photos,continue]"], "experiment=[photos,continue]"),
    (["experiment=none"], "experiment=none"),
    (["experiment=domain"], "experiment=domain"),
    (["experiment=mine"], "experiment=mine"),
    (["~experiment"], None),
    (["data.root=a"], None),
    (["data.file=x.txt"], None),
    (["data=cifar10"], None),
    (["-m", "data=photos,folder"], None),  # each trial sees to itself
    (["-cd", "mine", "data=mine"], None),
    (["-cd", "mine", "data.root=a"], None),
    (["-cd", "mine", "-cn", "mine"], None),
]


@pytest.mark.parametrize(("typed", "recipe"), RECIPES, ids=lambda words: str(words))
def test_the_photographs_have_a_recipe_and_other_data_none(typed, recipe):
    meaning = with_data("pretrain", typed)
    found = [word for word in meaning if word.startswith("experiment=")]
    assert found == ([] if recipe is None else [recipe])
    assert with_data("pretrain", meaning) == meaning
    assert "experiment=photos" not in with_data("eval", ["ckpt=x"])


def test_run_names_tell_paths_apart():
    paths = ("/a/b", "/a-b", "/caf\udce9", "/caf\udcea")
    one, *others = (run_name("folder", [f"data.root={path}"]) for path in paths)
    assert len({one, *others}) == len(paths)
    assert "/" not in one
