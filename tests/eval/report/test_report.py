"""The report of a run: its numbers are those of the files, what files hold stays text, and whatever
is missing is said.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SMALL, metrics, run
from PIL import Image
from scipy.stats import binomtest
from ssl_xcit.eval.report import command as report
from ssl_xcit.eval.report import facts, features, looks, page
from ssl_xcit.eval.report.curves import thinned
from ssl_xcit.eval.report.features import Options, Seen
from ssl_xcit.eval.report.run import read_run
from ssl_xcit.eval.views.markup import script_json, spoken

from ssl_xcit.locks import lock_holder
from ssl_xcit.terminal import printable

TINY = [w for w in SMALL if not w.startswith("evaluation.evaluators.linear")]
TINY += ["callbacks.snapshots=null"]
TINY += ["evaluation.evaluators.linear=null", "evaluation.evaluators.knn.k=[20]"]
OPTIONS = Options(num_workers=0, max_images=24, device="cpu")
PARTS = ["results", "curves", "pictures", "channels", "neighbours", "atlas", "settings",
         "commands", "environment", "bad"]  # fmt: skip


class Page(HTMLParser):
    """Tags, links, tables and the data of a page."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.links, self.tables = [], [], [], []
        self.scripts, self.words, self.inside, self.cell = [], "", [], None
        self.text = Path(path).read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append((tag, known))
        self.inside.append((tag, known))
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known[key] for key in ("src", "href") if key in known]
        if tag == "table":
            self.tables.append((known.get("class", ""), []))
        if tag == "tr" and self.tables:
            self.tables[-1][1].append([])
        if tag == "td":
            self.cell = ""

    def handle_endtag(self, tag):
        if tag == "td":
            self.tables[-1][1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, words):
        if self.inside and self.inside[-1][0] == "script" and self.cdata_elem:
            if self.inside[-1][1].get("id") == "data":
                self.scripts.append(words)
            return
        if self.inside and self.inside[-1][0] == "style" and self.cdata_elem:
            return
        self.words += words
        if self.cell is not None:
            self.cell += words

    @property
    def data(self):
        return json.loads("".join(self.scripts))

    def rows(self, kind):
        return [row for name, rows in self.tables if name == kind for row in rows if row]

    def curve(self, column):
        return [
            line
            for group in self.data["curves"]
            for plot in group["plots"]
            for line in plot["lines"]
            if line["column"] == column
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """Two runs of nine steps; the second has other settings."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in (["name=a"], ["name=b", "seed=3", "optim.lr=0.01"]):
            assert run("pretrain", *words, *TINY, "evaluation.baselines=null") == 0
    finally:
        os.chdir(before)
    return folder / "runs"


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Plotly is 4.8 MB, which one test has in its page."""
    if "files" not in request.node.name:
        monkeypatch.setattr(page, "get_plotlyjs", lambda: "Plotly = 0")


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """Copies, in the current folder."""
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*folders, out="page.html", options=OPTIONS):
    report.write_report([read_run(Path(f)) for f in folders], options, Path(out))
    return Page(out)


def test_numbers_are_those_of_the_files(here, capsys):
    assert run("report", "run=runs/b", "num_workers=0", "max_images=40") == 0
    shown = capsys.readouterr()
    assert "written: runs/b/report.html" in shown.out
    assert shown.err == ""
    page = Page("runs/b/report.html")
    assert [i for i in page.ids if i in PARTS] == PARTS
    assert not [tag for tag, known in page.tags if known.get("class") == "trouble"]
    rows = metrics("runs/b")
    for column in ("loss", "lr", "rankme", "knn_k20", "images_per_second"):
        (line,) = page.curve(column)
        wanted = {int(r["step"]): float(r[column]) for r in rows if r[column]}
        assert dict(zip(line["x"], line["y"], strict=True)) == pytest.approx(wanted, rel=1e-6)
    (knn,) = page.curve("knn_k20")
    for value, low, high in zip(knn["y"], knn["low"], knn["high"], strict=True):
        test = binomtest(round(value), 100)  # callbacks.online.max_images
        bounds = test.proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx((100 * bounds.low, 100 * bounds.high), rel=1e-6)
    summary = json.loads(Path("runs/b/summary.json").read_text())
    (row,) = page.data["numbers"]["rows"]
    assert row["values"] == pytest.approx([summary["results"]["pretrained"]["knn_k20"]], rel=1e-6)
    bounds = summary["intervals"]["pretrained"]["knn_k20"]
    assert [row["low"][0], row["high"][0]] == pytest.approx(bounds, rel=1e-6)
    size = Path("runs/b/report.html").stat().st_size
    assert size < 10e6
    assert "ssl-xcit pretrain name=b seed=3" in page.words
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_settings_that_were_changed_are_named(here):
    page = made("runs/b")
    changed = {row[0]: row[1:] for row in page.rows("changed")}
    assert changed["seed"] == ["3", "0", "typed"]
    assert changed["optim.lr"] == ["0.01", "0.0025", "typed"]
    linear = [key for key in changed if key.startswith("evaluation.evaluators.linear")]
    assert linear == ["evaluation.evaluators.linear"]
    assert changed[linear[0]] == ["null", "(several settings)", "typed"]
    assert "optim.weight_decay" not in changed
    assert "data" not in changed
    everything = {row[0]: row[1] for row in page.rows("settings")}
    assert everything["optim.weight_decay"] == "0.04"
    assert everything["model"] == "xcit_micro_4_p8"
    assert everything.keys() > changed.keys()


def test_another_option_is_a_change(here):
    content = json.loads(Path("runs/a/run.json").read_text())
    content["choices"] |= {"trainer": "cpu", "augment": "mine"}
    Path("runs/a/run.json").write_text(json.dumps(content))
    page = made("runs/a")
    changed = {row[0]: row[1:] for row in page.rows("changed")}
    assert changed["trainer"] == ["cpu", "auto", "by the run"]
    assert "augment=mine is none of the installed options" in page.words


def test_data_that_has_to_be_named_leaves_the_other_settings_comparable(here):
    content = json.loads(Path("runs/b/run.json").read_text())
    content["choices"] |= {"data": "folder", "eval_data": "folder"}
    content["overrides"] += ["data=folder", "data.root=photos of mine"]
    Path("runs/b/run.json").write_text(json.dumps(content))
    config = Path("runs/b/config.yaml").read_text()
    Path("runs/b/config.yaml").write_text(
        config.replace("\ndata:\n", "\ndata:\n  root: photos of mine\n")
    )
    page = made("runs/b")
    assert "could not be composed" not in page.words
    changed = {row[0]: row[1:] for row in page.rows("changed")}
    assert changed["data"] == ["folder", "photos", "typed"]
    assert changed["data.root"] == ["photos of mine", "(has to be named)", "typed"]
    assert changed["seed"] == ["3", "0", "typed"]
    assert "optim.weight_decay" not in changed


def test_what_files_hold_stays_text(here):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    folder = here / "runs" / "a<b>&'"
    shutil.copytree("runs/a", folder)
    content = json.loads((folder / "run.json").read_text())
    content["overrides"].append(f"+note={hostile}")
    content["versions"][hostile] = hostile
    (folder / "run.json").write_text(json.dumps(content))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"note: {json.dumps(hostile)}\n")
    (folder / "bad_samples.jsonl").write_text(
        json.dumps({"place": 0, "name": hostile, "reason": hostile}) + "\n"
    )
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"][hostile] = {hostile: 1.0}
    summary["health"] = hostile
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines = [f'{lines[0]},"{hostile}"', *(f"{line},1.5" for line in lines[1:])]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    plain, page = made("runs/b"), made(folder)
    assert page.words.count("alert(1)") >= 6
    scripts = [known for tag, known in page.tags if tag == "script"]
    assert len(scripts) == len([1 for tag, _ in plain.tags if tag == "script"])
    assert not [known for _, known in page.tags if "onerror" in known]
    assert page.curve(printable(hostile))[0]["y"] == [1.5] * (len(lines) - 1)
    assert page.data["numbers"]["rows"][-1]["name"] == printable(hostile)
    assert script_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_commands_are_quoted_for_a_shell(here):
    content = json.loads(Path("runs/a/run.json").read_text())
    content["overrides"] = ["name=a b", "data.root='x;rm -rf $HOME'"]
    Path("runs/a/run.json").write_text(json.dumps(content))
    words = facts.commands_part([read_run(Path("runs/a"))])
    import html

    line = html.unescape(re.search(r"ssl-xcit pretrain[^<]*", words)[0])
    shown = subprocess.run(["sh", "-c", line.replace("ssl-xcit", "printf '%s\\n'", 1)],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert shown.splitlines() == ["pretrain", *content["overrides"]]


def remove(*names):
    def do(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def damaged_line(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines[2] = lines[2][: len(lines[2]) // 2]
    lines.insert(4, "\x00,,1e999999,x")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n5,0.1,")


def without_head(folder):
    (path,) = list((folder / "checkpoints").glob("step-000009.ckpt"))
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if ".backbone." in k}
    torch.save({k: content[k] for k in ("state_dict", "architecture")}, path)
    (folder / "checkpoints/manifest.json").unlink()


def damaged_checkpoint(folder):
    path = folder / "checkpoints/step-000009.ckpt"
    path.write_bytes(path.read_bytes()[:5000])


LOOKS = {"pictures", "channels", "neighbours", "atlas"}


@pytest.mark.parametrize(
    ("harms", "said", "lost"),
    [
        ([remove("metrics.csv")], ["metrics.csv is missing: there are no curves"], {"curves"}),
        (
            [text("metrics.csv", "step,loss\n"), text("summary.json", "[]"), damaged_checkpoint],
            ["holds no numbers yet", "summary.json cannot be read", "not the", "bytes"],
            {"curves", "results", *LOOKS},
        ),
        (
            [damaged_line, text("results.json", '{"results": {"a": 3'), without_head],
            ["2 lines are damaged and left out", "results.json cannot be read"],
            set(),
        ),
        (
            [text("results.json", '{"results": {"a": 3}}'), text("config.yaml", "a: [}")],
            ["are no numbers by row", "config.yaml cannot be read"],
            set(),
        ),
        (
            [remove("run.json", "config.yaml", "checkpoints")],
            ["there is no checkpoint", "neither config.yaml nor run.json", "run.json is missing"],
            {"settings", *LOOKS},
        ),
        (
            [remove("summary.json")],
            [
                "trained to the last step, but not evaluated",
                "final numbers are measured at the end",
            ],
            {"results"},
        ),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_there(here, harms, said, lost):
    for harm in harms:
        harm(Path("runs/a"))
    page = made("runs/a")
    assert [i for i in page.ids if i in PARTS] == PARTS
    for words in said:
        assert words in page.words
    pieces = re.split(r'<section id="', page.text)[1:]
    assert {piece.split('"')[0] for piece in pieces if 'class="trouble"' in piece} == lost


def test_a_folder_of_something_else_is_refused(here, capsys):
    Path("plain").mkdir()
    for words, said in (
        (["run=plain"], "is no run folder"),
        (["run=nowhere"], "no such folder"),
        ([], "name a run folder"),
        (["run=runs/a", "runs=[runs/b]"], "name a run folder"),
        (["runs=[runs/a,runs/a]"], "named twice"),
        (["run=[runs/a,runs/b]"], "runs=[runs/a,runs/b]"),
        (["run=runs/a", "out=page.txt"], "ending in .html"),
        (["run=runs/a", "which=both"], "teacher or student"),
        (["run=runs/a", "max_images=0"], "max_images=0"),
    ):
        assert run("report", *words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert "Traceback" not in error


def test_a_folder_that_takes_no_page_is_said_first(here, capsys):
    Path("taken").write_text("a file")
    assert run("report", "run=runs/a", "out=taken/page.html") == 2
    said = capsys.readouterr().err
    assert "taken: no folder to write to" in said
    assert "out=FILE.html writes the page elsewhere" in said


def test_images_that_are_gone_are_named(here):
    content = json.loads(Path("runs/a/run.json").read_text())
    content["choices"] |= {"data": "folder", "eval_data": "folder"}
    content["overrides"] += ["data.root=gone", "eval_data.root=gone"]
    Path("runs/a/run.json").write_text(json.dumps(content))
    page = made("runs/a")
    assert "InstantiationException" not in page.words
    assert "This part is missing: root=gone: no such folder" in page.words


def test_a_run_that_is_going_on_is_seen_by_its_lock(here):
    folder = Path("runs/a")
    Path("runs/a/summary.json").unlink()
    (folder / ".lock").write_text("process 1 on nowhere\n")
    assert lock_holder(folder) == ""  # a killed process leaves the file
    code = (  # as the run does, without seconds of imports
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        page = made(folder)
        assert "still running, at step 9 of 9; process 1 on nowhere" in page.words
        assert (folder / ".lock").is_file()
    finally:
        process.kill()
        process.wait()


def test_several_runs_are_compared(here, capsys):
    words = ["report", "runs=[runs/a,runs/b]", "num_workers=0", "max_images=40"]
    assert run(*words) == 0
    assert "written: runs/report.html" in capsys.readouterr().out
    page = Page("runs/report.html")
    assert [i for i in page.ids if i in PARTS] == PARTS
    assert not [1 for _, known in page.tags if known.get("class") == "trouble"]
    assert page.data["runs"] == ["a", "b"]
    for name, line in zip("ab", page.curve("loss"), strict=True):
        wanted = [float(row["loss"]) for row in metrics(f"runs/{name}") if row["loss"]]
        assert line["y"] == pytest.approx(wanted, rel=1e-6)
    rows = page.data["numbers"]["rows"]
    ends = [json.loads(Path(f"runs/{n}/summary.json").read_text())["results"] for n in "ab"]
    values = [end["pretrained"]["knn_k20"] for end in ends]
    assert [row["values"][0] for row in rows] == pytest.approx(values, rel=1e-6)
    assert ["seed", "0", "3"] in page.rows("changed")
    assert ["optim.lr", "0.0025", "0.01"] in page.rows("changed")
    paired = [row for row in page.rows("numeric") if len(row) == 5 and row[0] == "k-NN 20"]
    difference = paired[-1]
    assert difference[1] == f"{values[1] - values[0]:+.2f}"
    # what `eval` has left is taken where it is of these weights
    assert run("eval", "ckpt=[runs/a,runs/b]", "num_workers=0",
               *(f"evaluation.evaluators.{n}=null" for n in
                 ("linear", "few_shot", "logistic", "clustering", "retrieval")),
               "evaluation.baselines=null") == 0  # fmt: skip
    page = made("runs/a", "runs/b")
    assert "From comparison.json" in page.words
    again = [row for row in page.rows("numeric") if row[0] == "k-NN 20" and len(row) == 5]
    assert again[-1][:4] == difference[:4]


def test_runs_of_one_name_keep_their_own_numbers(here):
    shutil.copytree("runs/b", "elsewhere/a")
    page = made("runs/a", "elsewhere/a")
    assert page.data["runs"] == ["runs/a", "elsewhere/a"]
    paths = [Path(f, "summary.json") for f in ("runs/a", "elsewhere/a")]
    ends = [json.loads(path.read_text())["results"]["pretrained"]["knn_k20"] for path in paths]
    assert ends[0] != ends[1]
    (row,) = (r for r in page.rows("numeric") if r[0] == "k-NN 20" and "–" in r[2])
    assert [row[1], row[3]] == [f"{end:.1f}" for end in ends]


def test_pictures_of_other_images_are_not_put_beside(here):
    for name in "ab":
        folder = Path("runs") / name
        index = pictures(folder, [9])
        for place, image in enumerate(index["images"]):
            image |= {"name": f"{name}/{place}.jpg", "label": "cat"}  # one class, other images
        (folder / "pictures" / "index.json").write_text(json.dumps(index))
    page = made("runs/a", "runs/b")
    images = [k for tag, k in page.tags if tag == "img" and k.get("class") == "image"]
    assert len(images) == 4


def test_numbers_of_the_student_are_not_taken_for_the_runs(here):
    content = json.loads(Path("runs/a/summary.json").read_text())
    wanted = content["results"]["pretrained"]["knn_k20"]
    content |= {"which": "student", "results": {"pretrained": {"knn_k20": 99.9}}, "intervals": {}}
    Path("runs/a/results.json").write_text(json.dumps(content))
    page = made("runs/a")
    assert "results.json is of other weights than the newest: the student" in page.words
    assert f"{wanted:.1f}" in page.words
    assert "99.9" not in page.words


def test_intervals_while_training_are_not_over_images_of_other_data(here):
    Path("runs/a/summary.json").unlink()  # stopped, then measured on something else
    content = {"test_images": 7, "results": {"pretrained": {"knn_k20": 12.3}}}
    Path("runs/a/results-cifar10.json").write_text(json.dumps(content))
    seen = Seen(read_run(Path("runs/a")), OPTIONS)
    assert seen.run.results is None
    assert seen.run.elsewhere[0].content["test_images"] == 7
    assert seen.num_online() == 100

    page = made("runs/a")
    assert "On the run's own data nothing is measured yet." in page.words
    assert "results-cifar10.json" in page.words


def test_numbers_measured_again_stand_beside_the_others(here):
    end = json.loads(Path("runs/a/summary.json").read_text())
    end["results"]["pretrained"] |= {"linear": 55.5, "knn_k20": 11.1}
    end["results"] = {"random weights": {"linear": 22.2}} | end["results"]
    end["intervals"] = {"pretrained": {"linear": [50.0, 60.0], "knn_k20": [10.0, 12.0]}}
    Path("runs/a/summary.json").write_text(json.dumps(end))
    content = {"test_images": 702, "results": {"pretrained": {"knn_k20": 99.9}}, "intervals": {}}
    Path("runs/a/results.json").write_text(json.dumps(content))
    found = read_run(Path("runs/a")).results
    assert found.source == "results.json and summary.json"
    assert found.numbers["pretrained"] == end["results"]["pretrained"] | {"knn_k20": 99.9}
    assert next(iter(found.numbers)) == "random weights"
    assert found.intervals["pretrained"] == {"linear": (50.0, 60.0)}


def test_one_of_several_runs_may_have_nothing(here):
    remove("checkpoints", "metrics.csv", "summary.json")(Path("runs/b"))
    page = made("runs/a", "runs/b")
    assert "Without final numbers: b." in page.words
    assert not [1 for _, known in page.tags if known.get("class") == "trouble"]


def test_a_run_without_labels_shows_its_training_images(here, monkeypatch):
    monkeypatch.setattr(features, "BANK", 40)
    content = json.loads(Path("runs/a/run.json").read_text())
    content["choices"]["eval_data"] = "none"
    Path("runs/a/run.json").write_text(json.dumps(content))
    seen = Seen(read_run(Path("runs/a")), Options(num_workers=0, max_images=24, device="cpu"))
    seen.run.state = "stopped"  # whose features nobody has kept
    assert seen.data.name.startswith("training images of")
    assert len(seen.bank) == len(seen.queries) == 40
    assert seen.queries is seen.bank
    assert seen.num_online() is None


def pictures(folder, steps, size=40):
    """As training leaves them."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)

    def draw(name):
        pixels = rng.integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / name, quality=90)
        return name

    index = {
        "images": [{"name": n, "label": f"image {n}", "file": draw(f"{n}.jpg")} for n in "xy"],
        "moments": [
            {
                "step": step,
                "seconds": 1.0,
                "attention": [draw(f"{step}-{n}-attention.jpg") for n in "xy"],
                "pca": [draw(f"{step}-{n}-pca.jpg") for n in "xy"],
                "entropy": [0.9 - step / 1000],
            }
            for step in steps
        ],
    }
    (folder / "pictures" / "index.json").write_text(json.dumps(index))
    return index


def test_pictures_that_the_run_has_left_are_shown_over_time(here):
    folder = Path("runs/a")
    index = pictures(folder, [0, 3, 6, 9])
    (folder / "pictures" / "3-x-pca.jpg").write_bytes(b"no picture")
    (folder / "pictures" / "6-y-pca.jpg").unlink()
    index["moments"][3]["pca"][0] = "../config.yaml"
    index["moments"][3]["attention"][0] = "/etc/passwd"
    (folder / "pictures" / "index.json").write_text(json.dumps(index))
    page = made(folder)
    images = [k for tag, k in page.tags if tag == "img" and "class" in k]
    assert len([k for k in images if k["class"] == "image"]) == 2
    assert len([k for k in images if k["class"] == "attention"]) == 7
    assert len([k for k in images if k["class"] == "pca"]) == 5
    assert len(re.findall(r'class="gap', page.text)) >= 4
    (entropy,) = page.data["entropy"]
    assert entropy["steps"] == [0, 3, 6, 9]
    assert entropy["values"] == [[0.9], [0.897], [0.894], [0.891]]


def test_moments_are_left_out_where_there_are_too_many(here):
    folder = Path("runs/a")
    pictures(folder, range(0, 40, 2))
    sizes = [f.stat().st_size for f in (folder / "pictures").glob("*-*.jpg")]
    film = looks.kept_film(read_run(folder), sum(sizes) // 3)
    steps = [moment.step for moment in film.moments]
    assert (steps[0], steps[-1]) == (0, 38)
    assert 5 <= len(steps) <= 6
    assert f"{len(steps)} of 20 moments are shown" in film.note
    large = pictures(Path("runs/b"), [1], size=900)
    film = looks.kept_film(read_run(Path("runs/b")), 10**9)
    assert (
        len(film.images[0]) < (Path("runs/b/pictures") / large["images"][0]["file"]).stat().st_size
    )


def test_long_curves_keep_their_peaks():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[12_345], values[40_001], values[7] = 99.0, -99.0, np.nan
    steps, kept = thinned((list(range(50_000)), values.tolist()), 1000)
    assert len(kept) <= 1000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 49_999)
    assert kept[steps.index(12_345)] == 99.0
    assert kept[steps.index(40_001)] == -99.0
    assert all(values[s] == v for s, v in zip(steps, kept, strict=True))


def test_time_in_training_counts_all_parts(here):
    folder = Path("runs/a")
    Path("runs/a/summary.json").unlink()
    rows = [("step", "epoch", "images_per_second", "online_seconds")]
    rows += [(10, 0.5, 100.0, ""), (10, "", "", 3.0), (20, 1.0, 50.0, "")]
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    found = read_run(folder)
    assert found.seconds() == pytest.approx(1494 * 0.5 / 100 + 1494 * 0.5 / 50 + 3.0)
    assert spoken(found.seconds()) == "25 s"
    assert [spoken(s) for s in (0, 61, 3600, 100_000)] == ["0 s", "1 min 1 s", "1 h", "1 d 3 h"]


def test_stretches_without_health_are_marked(here):
    folder = Path("runs/a")
    lines = ["step,loss,healthy"] + [f"{10 * i},1.0,{float(i not in (3, 4, 9))}" for i in range(10)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    page = made(folder)
    plot = page.data["curves"][0]["plots"][0]
    assert plot["sick"] == [{"run": 0, "from": 30, "to": 50}, {"run": 0, "from": 90, "to": 90}]
    assert "healthy at the end, 3 reports were not" in page.words


def test_a_run_writes_it_at_its_end(here, capsys):
    words = [w for w in TINY if w != "report=null"] + ["evaluation.baselines=null"]
    words = [w for w in words if not w.startswith("callbacks.online")]
    words += ["~callbacks.online"]
    assert run("pretrain", "name=c", *words) == 0
    shown = capsys.readouterr()
    assert "report: runs/c/report.html" in shown.out
    assert shown.out.index("k-NN 20") < shown.out.index("report: ")
    page = Page("runs/c/report.html")
    assert "finished" in page.words
    before = {p: p.stat().st_mtime_ns for p in Path("runs/c").rglob("*")}
    assert run("pretrain", "name=c", *words) == 0
    assert run("pretrain", "name=c", *words, "report=null") == 0  # the same run
    assert "report: runs/c/report.html" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path("runs/c").rglob("*")}


@pytest.mark.parametrize(
    "setting",
    ["report._target_=ssl_xcit.nowhere", "report._target_=os.listdir", "report=true"],
)
def test_a_report_that_fails_changes_nothing_of_the_run(here, capsys, setting):
    words = [w for w in TINY if w != "report=null" and not w.startswith("callbacks.online")]
    words += ["~callbacks.online", "eval_data=none", "epochs=0.02"]
    assert run("pretrain", "name=c", *words, setting) == 0
    shown = capsys.readouterr()
    assert "ssl-xcit report run=runs/c tries again" in shown.err
    assert Path("runs/c/summary.json").is_file()
    assert not Path("runs/c/report.html").exists()
