"""The report of a run of `ssl-xcit finetune`: its numbers are those of the files, and what files
hold stays text.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import metrics, run
from html_page import Page
from tiny_run import make_run
from toys import KINDS, data, words

from ssl_xcit.eval.report import head_figures, report
from ssl_xcit.eval.report import page as page_module
from ssl_xcit.eval.report.run_features import ReportOptions, RunFeatures
from ssl_xcit.eval.report.run_reader import read_run
from ssl_xcit.eval.report.sections import settings_section

OPTIONS = ReportOptions(num_workers=0, max_images=24, device="cpu")
OWN = ["results", "predictions", "classes", "curves", "settings", "commands", "environment", "bad"]
OF_FEATURES = ["pictures", "channels", "neighbours"]  # a map needs more images


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Plotly is 4.8 MB."""
    monkeypatch.setattr(page_module, "get_plotlyjs", lambda: "Plotly = 0")


@pytest.fixture
def runs(transfer_runs, tmp_path, monkeypatch):
    """Copies, by the kind of task."""
    monkeypatch.chdir(tmp_path)
    return {k: Path(shutil.copytree(p, tmp_path / "runs" / k)) for k, p in transfer_runs.items()}


def made(*folders):
    """The page, its sections, and those that are missing with the reason."""
    parts = report.write_report([read_run(Path(f)) for f in folders], OPTIONS, Path("page.html"))
    page = Page(Path("page.html"))
    return page, {p.ident: p for p in parts}, {p.ident: p.trouble for p in parts if p.trouble}


def figures(page):
    return [content for content in page.json if "data" in content]


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_files_say(kind, runs):
    page, parts, missing = made(runs[kind])
    assert not missing
    assert set(parts) == {*OWN, *(OF_FEATURES if kind == "classification" else [])}
    summary = json.loads((runs[kind] / "summary.json").read_text())
    details = json.loads((runs[kind] / "evaluation.json").read_text())
    drawn = figures(page)
    final = drawn[0]["data"][0]
    numbers = list(summary["results"][kind].values())
    assert final["x"] == pytest.approx(numbers, rel=1e-5, abs=1e-9)
    lines = {t.get("name"): t for figure in drawn for t in figure["data"]}
    wanted = [float(row["loss"]) for row in metrics(runs[kind])]
    assert lines["loss"]["y"] == pytest.approx(wanted, rel=1e-6)
    (heat,) = (t for figure in drawn for t in figure["data"] if t.get("type") == "heatmap")
    counts = details.get("confusion", details.get("confusion_matrix"))
    counts = np.array(counts["counts"] if isinstance(counts, dict) else counts)
    assert np.array_equal(heat["customdata"], counts)
    share = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
    assert np.allclose(np.array(heat["z"], float), share, rtol=1e-5)
    bars = next(t for figure in drawn for t in figure["data"] if t.get("type") == "bar")
    known = {
        "classification": lambda: {c["class"]: c["accuracy"] for c in details["per_class"]},
        "segmentation": lambda: details["class_iou"],
        "detection": lambda: details["box_AP_by_class"],
    }[kind]()
    assert dict(zip(bars["y"], bars["x"], strict=True)) == pytest.approx(known, abs=1e-4)
    assert bars["x"] == sorted(bars["x"])
    cases = [a for tag, a in page.tags if tag == "figure" and "case" in a.get("class", "")]
    source = {a["title"].rpartition("/")[2] for a in cases}
    assert len(source) == (4 if kind == "classification" else 3)
    pictures = [a["src"] for tag, a in page.tags if tag == "img" and "prediction" in a["alt"]]
    assert len(pictures) == len(cases)
    for word in ("ssl-xcit finetune", "ssl-xcit predict", f"transfer={kind}"):
        assert word in page.words
    assert "Teacher" not in page.words
    assert "health" not in page.words
    assert all(link.startswith(("data:", "#")) for link in page.links)
    changed = {row[0] for row in settings_section([read_run(runs[kind])])["changed"].rows}
    assert {"data.root", "epochs", "batch_size"} <= changed
    assert "optim.optimizer.weight_decay" not in changed


def test_a_run_writes_its_page_at_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = data("segmentation", tmp_path / "own")
    given = words("segmentation", root, "name=x", "epochs=1", "num_workers=0")
    given = [w for w in given if w not in ("report=null", "callbacks.online=null")]
    assert run(*given, "callbacks.online.every_steps=2", "callbacks.online.eval_budget=null") == 0
    said = capsys.readouterr()
    assert "report: runs/x/report.html" in said.out
    assert "no report was written" not in said.err
    page = Page(tmp_path / "runs/x/report.html")
    assert "On test images" in page.words
    lines = {t.get("name"): t for figure in figures(page) for t in figure["data"]}
    online = {int(r["step"]): float(r["miou"]) for r in metrics("runs/x") if r["miou"]}
    assert dict(zip(lines["mIoU"]["x"], lines["mIoU"]["y"], strict=True)) == pytest.approx(online)


def test_runs_of_different_kinds_are_compared(runs, transfer_runs, tmp_path):
    root = transfer_runs["classification"].parents[1] / "data/classification"
    overrides = [f"data.root={root}", f"eval_data.root={root}", "eval_data.size=32"]
    make_run(tmp_path / "runs/pretrained", overrides=overrides, data="folder")
    page, parts, _ = made(*runs.values(), "runs/pretrained")
    assert {"predictions", "classes", "results", "curves"} <= set(parts)
    assert "Not compared image by image" in page.words
    for kind in KINDS:
        assert kind in page.words
    other = shutil.copytree(runs["detection"], tmp_path / "runs/other")
    page, parts, missing = made(runs["detection"], other)
    assert not missing
    assert set(parts) == set(OWN)
    assert f"ssl-xcit eval 'ckpt=[{runs['detection']},{other}]'" in page.words


def test_what_is_missing_or_damaged_is_said(runs, tmp_path):
    folder = runs["detection"]
    (folder / "evaluation.json").unlink()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    _, parts, missing = made(folder)
    assert set(parts) == set(OWN)
    assert "evaluation.json" in missing["classes"]
    assert "checkpoint" in missing["predictions"]
    folder = runs["segmentation"]
    edit(folder / "evaluation.json", lambda c: c.update(confusion_matrix=[[1], [2, 3]], worst=[1]))
    edit(folder / "evaluation.json", lambda c: c.update(class_iou="x", worst_images=[1, ["a"]]))
    _, _, missing = made(folder)
    assert not missing
    edit(folder / "run.json", lambda c: c["overrides"].append("data.root=gone"))
    _, _, missing = made(folder)
    assert set(missing) == {"predictions"}
    assert "gone" in missing["predictions"]


def test_what_files_hold_stays_text(runs):
    hostile = "</script><img src=x onerror=alert(1)>"
    folder = runs["detection"]

    def spoil(content):
        content["confusion"]["truth"][0] = hostile
        content["worst"] = [{"image": hostile, "missed": hostile, "false": hostile}]
        content["box_AP_by_class"][hostile] = 1.0

    edit(folder / "evaluation.json", spoil)
    page, _, missing = made(folder)
    assert not missing
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]


def test_annotations_that_were_left_out_are_listed(runs, tmp_path):
    root = data("detection", tmp_path / "own")
    file = root / "annotations/instances_train2017.json"
    edit(file, lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 4], segmentation=[]))
    edit(runs["detection"] / "run.json", lambda c: c["overrides"].append("data.root=own"))
    page, _, missing = made(runs["detection"])
    assert not missing
    assert "1 annotations could not be used" in page.words
    features = RunFeatures(read_run(runs["detection"]), OPTIONS)
    (line,) = features.transfer_data.train.left_out
    assert line in page.words


def test_test_images_that_could_not_be_read_are_listed(runs):
    file = runs["segmentation"] / "evaluation.json"
    example = {"image": "own/<b>.jpg", "reason": "truncated"}
    edit(file, lambda c: c.update(left_out={"count": 2, "of": 9, "examples": [example, 3]}))
    page, _, missing = made(runs["segmentation"])
    assert not missing
    assert "2 of 9 test images could not be read." in page.words
    assert "own/<b>.jpg: truncated" in page.words
    for damaged in ("x", {"count": "x"}, {"count": 1, "examples": "x"}):
        edit(file, lambda c, value=damaged: c.update(left_out=value))
        _, _, missing = made(runs["segmentation"])
        assert not missing


def test_of_many_classes_the_most_confused_are_named():
    K = 50
    counts = np.eye(K, dtype=int) * 9
    counts[7, 3] = 5
    counts[2, 9] = 1
    names = [f"n{k}" for k in range(K)]
    confusion = head_figures.confusion_in({"confusion": counts.tolist()}, names)
    assert head_figures.confusion_figure(confusion) is None
    rows = head_figures.confused_pairs(confusion).rows
    assert rows == [["n7 taken for n3", "35.7 %", "5"], ["n2 taken for n9", "10.0 %", "1"]]
    values = {"per_class": [{"class": n, "accuracy": float(i)} for i, n in enumerate(names)]}
    (found,) = head_figures.class_values_in(values)
    assert head_figures.class_figure([found])["data"][0]["y"] == names[:40]
