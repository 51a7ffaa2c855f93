"""The report of a run: its numbers are those of the files, what files hold stays text, and whatever
is missing is said.
"""

import csv
import html
import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SMALL, held_by_another, metrics, run
from html_page import Page
from PIL import Image
from scipy.stats import binomtest

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.eval.commands.report import folders_of
from ssl_xcit.eval.report import page_layout, run_features, sections
from ssl_xcit.eval.report.curves import decimated, figure_groups
from ssl_xcit.eval.report.image_sections import (
    entropy_data,
    pictures_section,
    recorded_timeline,
)
from ssl_xcit.eval.report.report import write_report
from ssl_xcit.eval.report.run_features import ReportOptions, RunFeatures
from ssl_xcit.eval.report.run_reader import read_run, tell_apart
from ssl_xcit.eval.viz.markup import duration_in_words, script_json
from ssl_xcit.utils.locks import lock_holder
from ssl_xcit.utils.terminal import printable

TINY = [w for w in SMALL if not w.startswith("evaluation.evaluators.linear")]
TINY += ["evaluation.evaluators.linear=null", "evaluation.evaluators.knn.k=[20]"]
OPTIONS = ReportOptions(num_workers=0, max_images=24, device="cpu")
PARTS = ["results", "curves", "pictures", "channels", "neighbours", "atlas", "settings",
         "commands", "environment", "bad"]  # fmt: skip


@pytest.fixture(scope="module")
def words(on_few_photos):
    """Settings of both runs, without the report."""
    return [*TINY, "eval_data=folder", *on_few_photos, "evaluation.baselines=null"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words):
    """Two runs of nine steps, and what the first printed; the second has other settings and no
    report.
    """
    folder = tmp_path_factory.mktemp("runs")
    with_report = [w for w in words if w != "report=null"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(page_layout, "get_plotlyjs", lambda: "Plotly = 0")
        assert run("pretrain", "name=a", *with_report) == 0
        said = out.getvalue()
        assert run("pretrain", "name=b", "seed=3", "optim.lr=0.01", *words) == 0
    return folder / "runs", said


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Plotly is 4.8 MB, which one test has in its page."""
    if "files" not in request.node.name:
        monkeypatch.setattr(page_layout, "get_plotlyjs", lambda: "Plotly = 0")


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """Copies, in the current folder."""
    shutil.copytree(runs[0], tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class ReportPage(Page):
    """A report, with the data of its figures."""

    @property
    def data(self):
        return next(content for content in self.json if "runs" in content or "numbers" in content)

    def curve(self, column):
        groups = self.data["curves"]
        lines = [line for g in groups for plot in g["plots"] for line in plot["lines"]]
        return [line for line in lines if line["column"] == column]


def made(*folders, out="page.html"):
    write_report([read_run(Path(f)) for f in folders], OPTIONS, Path(out))
    return ReportPage(Path(out))


def features_of(*folders):
    """Runs, and their features."""
    found = [read_run(Path(f)) for f in folders]
    tell_apart(found)
    return found, [RunFeatures(each, OPTIONS) for each in found]


def results_of(*folders):
    """The section of final numbers, and its data."""
    text, data = sections.results_section(*features_of(*folders))
    return Page(text), data


def settings_of(folder):
    return Page(sections.settings_section([read_run(Path(folder))]))


def edit(file, change):
    """Change the content of a JSON file in place; returns it."""
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))
    return content


def knn_of(name):
    return json.loads(Path(name, "summary.json").read_text())["results"]["pretrained"]["knn_k20"]


def test_numbers_are_those_of_the_files(here, capsys):
    assert run("report", "run=runs/b", "num_workers=0", "max_images=40") == 0
    printed = capsys.readouterr()
    assert "written: runs/b/report.html" in printed.out
    assert printed.err == ""
    page = ReportPage(Path("runs/b/report.html"))
    assert [i for i in page.ids if i in PARTS] == PARTS
    assert not page.classes("trouble")
    rows = metrics("runs/b")
    for column in ("loss", "lr", "rankme", "knn_k20", "images_per_second"):
        (line,) = page.curve(column)
        wanted = {int(r["step"]): float(r[column]) for r in rows if r[column]}
        assert dict(zip(line["x"], line["y"], strict=True)) == pytest.approx(wanted, rel=1e-6)
    (knn,) = page.curve("knn_k20")
    for value, low, high in zip(knn["y"], knn["low"], knn["high"], strict=True):
        bounds = binomtest(round(value * 51 / 100), 51).proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx((100 * bounds.low, 100 * bounds.high), rel=1e-6)
    summary = json.loads(Path("runs/b/summary.json").read_text())
    (row,) = page.data["numbers"]["rows"]
    assert row["values"] == pytest.approx([knn_of("runs/b")], rel=1e-6)
    bounds = summary["intervals"]["pretrained"]["knn_k20"]
    assert [row["low"][0], row["high"][0]] == pytest.approx(bounds, rel=1e-6)
    assert Path("runs/b/report.html").stat().st_size < 10e6
    assert "ssl-xcit pretrain name=b seed=3" in page.words
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_settings_that_were_changed_are_named(here):
    page = settings_of("runs/b")
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
    edit("runs/a/run.json", lambda c: c["choices"].update(trainer="cpu", augment="mine"))
    page = settings_of("runs/a")
    changed = {row[0]: row[1:] for row in page.rows("changed")}
    assert changed["trainer"] == ["cpu", "auto", "by the run"]
    assert "augment=mine is none of the installed options" in page.words


def test_data_that_has_to_be_named_leaves_the_other_settings_comparable(here):
    edit("runs/b/run.json", lambda c: c["choices"].update(data="folder"))
    edit("runs/b/run.json", lambda c: c["overrides"].extend(["data=folder", "data.root=my photos"]))
    config = Path("runs/b/config.yaml")
    config.write_text(config.read_text().replace("\ndata:\n", "\ndata:\n  root: my photos\n"))
    page = settings_of("runs/b")
    assert "could not be composed" not in page.words
    changed = {row[0]: row[1:] for row in page.rows("changed")}
    assert changed["data"] == ["folder", "photos", "typed"]
    assert changed["data.root"] == ["my photos", "(has to be named)", "typed"]
    assert changed["seed"] == ["3", "0", "typed"]
    assert "optim.weight_decay" not in changed


def test_what_files_hold_stays_text(here):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    folder = here / "runs" / "a<b>&'"
    shutil.copytree("runs/a", folder)
    edit(folder / "run.json", lambda c: c["overrides"].append(f"+note={hostile}"))
    edit(folder / "run.json", lambda c: c["versions"].update({hostile: hostile}))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"note: {json.dumps(hostile)}\n")
    (folder / "bad_samples.jsonl").write_text(
        json.dumps({"place": 0, "name": hostile, "reason": hostile}) + "\n"
    )
    edit(folder / "summary.json", lambda c: c["results"].update({hostile: {hostile: 1.0}}))
    edit(folder / "summary.json", lambda c: c.update(health=hostile))
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines = [f'{lines[0]},"{hostile}"', *(f"{line},1.5" for line in lines[1:])]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    plain, page = made("runs/b"), made(folder)
    assert page.words.count("alert(1)") >= 6
    scripts = [sum(tag == "script" for tag, _ in each.tags) for each in (page, plain)]
    assert scripts[0] == scripts[1]
    assert not [known for _, known in page.tags if "onerror" in known]
    assert page.curve(printable(hostile))[0]["y"] == [1.5] * (len(lines) - 1)
    assert page.data["numbers"]["rows"][-1]["name"] == printable(hostile)
    assert script_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_commands_are_quoted_for_a_shell(here):
    overrides = ["name=a b", "data.root='x;rm -rf $HOME'"]
    edit("runs/a/run.json", lambda c: c.update(overrides=overrides))
    text = sections.commands_section([read_run(Path("runs/a"))])
    line = html.unescape(re.search(r"ssl-xcit pretrain[^<]*", text)[0])
    printed = subprocess.run(["sh", "-c", line.replace("ssl-xcit", "printf '%s\\n'", 1)],
                             capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert printed.splitlines() == ["pretrain", *overrides]


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
    path = folder / "checkpoints/step-000009.ckpt"
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if ".backbone." in k}
    torch.save({k: content[k] for k in ("state_dict", "architecture")}, path)
    (folder / "checkpoints/manifest.json").unlink()


def damaged_checkpoint(folder):
    path = folder / "checkpoints/step-000009.ckpt"
    path.write_bytes(path.read_bytes()[:5000])


OF_IMAGES = {"pictures", "channels", "neighbours", "atlas"}


@pytest.mark.parametrize(
    ("harms", "said", "lost"),
    [
        ([remove("metrics.csv")], ["metrics.csv is missing: there are no curves"], {"curves"}),
        (
            [text("metrics.csv", "step,loss\n"), text("summary.json", "[]"), damaged_checkpoint],
            ["holds no numbers yet", "summary.json cannot be read", "not the", "bytes"],
            {"curves", "results", *OF_IMAGES},
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
            {"settings", *OF_IMAGES},
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


@pytest.mark.parametrize(
    ("one", "several", "said"),
    [
        (None, None, "name a run folder"),
        ("runs/a", ["runs/b"], "name a run folder"),
        (None, ["runs/a", "runs/a"], "named twice"),
        (["runs/a", "runs/b"], None, r"runs=\[runs/a,runs/b\]"),
        (None, list("abcdefghi"), "at most 8"),
    ],
)
def test_folders_that_are_refused(one, several, said):
    with pytest.raises(UserError, match=said):
        folders_of(one, several)


def test_a_folder_of_something_else_is_refused(here, capsys):
    Path("plain").mkdir()
    with pytest.raises(UserError, match="is no run folder"):
        read_run(Path("plain"))
    with pytest.raises(MissingPath, match="no such folder"):
        read_run(Path("nowhere"))
    Path("taken").write_text("a file")
    for words, said in (
        (["run=nowhere"], ["no such folder"]),
        (["run=runs/a", "out=page.txt"], ["ending in .html"]),
        (
            ["run=runs/a", "out=taken/page.html"],
            ["taken: no folder to write to", "out=FILE.html writes the page elsewhere"],
        ),
    ):
        assert run("report", *words) == 2, words
        error = capsys.readouterr().err
        assert all(each in error for each in said), error
        assert "Traceback" not in error


def test_images_that_are_gone_are_named(here):
    edit("runs/a/run.json", lambda c: c["overrides"].append("eval_data.root=gone"))
    _, (features,) = features_of("runs/a")
    with pytest.raises(MissingPath, match=r"^root=gone: no such folder"):
        _ = features.data


def test_a_run_that_is_going_on_is_seen_by_its_lock(here):
    lock = Path("runs/a/.lock")
    Path("runs/a/summary.json").unlink()
    lock.write_text("process 1 on nowhere\n")
    assert lock_holder(lock.parent) == ""  # a killed process leaves the file
    with held_by_another(lock) as process:
        words = Page(sections.headline(read_run(lock.parent))).words
        assert f"still running, at step 9 of 9; process {process} on" in words
        assert lock.is_file()


def test_several_runs_are_compared(here, capsys):
    assert run("report", "runs=[runs/a,runs/b]", "num_workers=0", "max_images=40") == 0
    assert "written: runs/report.html" in capsys.readouterr().out
    page = ReportPage(Path("runs/report.html"))
    assert [i for i in page.ids if i in PARTS] == PARTS
    assert not page.classes("trouble")
    assert page.data["runs"] == ["a", "b"]
    for name, line in zip("ab", page.curve("loss"), strict=True):
        wanted = [float(row["loss"]) for row in metrics(f"runs/{name}") if row["loss"]]
        assert line["y"] == pytest.approx(wanted, rel=1e-6)
    rows, values = page.data["numbers"]["rows"], [knn_of("runs/a"), knn_of("runs/b")]
    assert [row["values"][0] for row in rows] == pytest.approx(values, rel=1e-6)
    assert ["seed", "0", "3"] in page.rows("changed")
    assert ["optim.lr", "0.0025", "0.01"] in page.rows("changed")
    assert "b - a (paired)" in page.words
    difference = [r for r in page.rows("numeric") if len(r) == 5 and r[0] == "k-NN 20"][-1]
    assert difference[1] == f"{values[1] - values[0]:+.2f}"
    # what `eval` has left is taken where it is of these weights
    assert run("eval", "ckpt=[runs/a,runs/b]", "num_workers=0",
               *(f"evaluation.evaluators.{n}=null" for n in
                 ("linear", "few_shot", "logistic", "clustering", "retrieval")),
               "evaluation.baselines=null") == 0  # fmt: skip
    page, _ = results_of("runs/a", "runs/b")
    assert "From comparison.json" in page.words
    again = [row for row in page.rows("numeric") if row[0] == "k-NN 20" and len(row) == 5]
    assert again[-1] == difference


def test_runs_of_one_name_keep_their_own_numbers(here):
    shutil.copytree("runs/b", "elsewhere/a")
    page, data = results_of("runs/a", "elsewhere/a")
    assert [row["name"] for row in data["numbers"]["rows"]] == ["runs/a", "elsewhere/a"]
    ends = [knn_of("runs/a"), knn_of("elsewhere/a")]
    assert ends[0] != ends[1]
    (row,) = (r for r in page.rows("numeric") if r[0] == "k-NN 20" and "–" in r[2])
    assert [row[1], row[3]] == [f"{end:.1f}" for end in ends]


def test_pictures_of_other_images_are_not_put_beside(here):
    for name in "ab":
        folder = Path("runs") / name
        pictures(folder, [9])
        index = json.loads((folder / "pictures/index.json").read_text())
        for place, image in enumerate(index["images"]):
            image |= {"name": f"{name}/{place}.jpg", "label": "cat"}  # one class, other images
        (folder / "pictures/index.json").write_text(json.dumps(index))
    _, features = features_of("runs/a", "runs/b")
    assert len(Page(pictures_section(features)).classes("image", "img")) == 4


def test_numbers_of_the_student_are_not_taken_for_the_runs(here):
    content = json.loads(Path("runs/a/summary.json").read_text())
    content |= {"which": "student", "results": {"pretrained": {"knn_k20": 99.9}}, "intervals": {}}
    Path("runs/a/results.json").write_text(json.dumps(content))
    found = read_run(Path("runs/a"))
    assert "results.json is of other weights than the newest: the student" in found.problems
    assert found.results.numbers["pretrained"]["knn_k20"] == knn_of("runs/a")


def test_intervals_while_training_are_not_over_images_of_other_data(here):
    Path("runs/a/summary.json").unlink()  # stopped, then measured on something else
    content = {"test_images": 7, "results": {"pretrained": {"knn_k20": 12.3}}}
    Path("runs/a/results-cifar10.json").write_text(json.dumps(content))
    _, (features,) = features_of("runs/a")
    assert features.run.results is None
    assert features.run.elsewhere[0].content["test_images"] == 7
    assert features.num_online() == 51
    page, _ = results_of("runs/a")
    assert "On the run's own data nothing is measured yet." in page.words
    assert "results-cifar10.json" in page.words


def test_numbers_measured_again_stand_beside_the_others(here):
    end = json.loads(Path("runs/a/summary.json").read_text())
    end["results"]["pretrained"] |= {"linear": 55.5, "knn_k20": 11.1}
    end["results"] = {"random weights": {"linear": 22.2}} | end["results"]
    end["intervals"] = {"pretrained": {"linear": [50.0, 60.0], "knn_k20": [10.0, 12.0]}}
    Path("runs/a/summary.json").write_text(json.dumps(end))
    content = {"test_images": 51, "results": {"pretrained": {"knn_k20": 99.9}}, "intervals": {}}
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
    assert not page.classes("trouble")


def test_a_run_without_labels_shows_its_training_images(here, monkeypatch):
    monkeypatch.setattr(run_features, "BANK", 40)
    edit("runs/a/run.json", lambda c: c["choices"].update(eval_data="none"))
    edit("runs/a/run.json", lambda c: c.update(overrides=[]))
    _, (features,) = features_of("runs/a")
    features.run.state = "stopped"  # whose features nobody has kept
    assert features.data.name.startswith("training images of")
    assert len(features.bank) == len(features.queries) == 40
    assert features.queries is features.bank
    assert features.num_online() is None


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


def test_pictures_that_the_run_has_left_are_shown_over_time(here):
    folder = Path("runs/a/pictures")
    pictures(folder.parent, [0, 3, 6, 9])
    (folder / "3-x-pca.jpg").write_bytes(b"no picture")
    (folder / "6-y-pca.jpg").unlink()
    index = json.loads((folder / "index.json").read_text())
    index["moments"][3]["pca"][0] = "../config.yaml"
    index["moments"][3]["attention"][0] = "/etc/passwd"
    (folder / "index.json").write_text(json.dumps(index))
    _, features = features_of("runs/a")
    page = Page(pictures_section(features))
    counts = [len(page.classes(kind, "img")) for kind in ("image", "attention", "pca")]
    assert counts == [2, 7, 5]
    assert len(re.findall(r'class="gap', page.text)) >= 4
    (entropy,) = entropy_data(features)
    assert entropy["steps"] == [0, 3, 6, 9]
    assert entropy["values"] == [[0.9], [0.897], [0.894], [0.891]]


def test_moments_are_left_out_where_there_are_too_many(here):
    folder = Path("runs/a")
    pictures(folder, range(0, 40, 2))
    sizes = [f.stat().st_size for f in (folder / "pictures").glob("*-*.jpg")]
    timeline = recorded_timeline(read_run(folder), sum(sizes) // 3)
    steps = [moment.step for moment in timeline.moments]
    assert (steps[0], steps[-1]) == (0, 38)
    assert 5 <= len(steps) <= 6
    assert f"{len(steps)} of 20 moments are shown" in timeline.note
    pictures(Path("runs/b"), [1], size=900)
    timeline = recorded_timeline(read_run(Path("runs/b")), 10**9)
    assert len(timeline.images[0]) < Path("runs/b/pictures/x.jpg").stat().st_size


def test_long_curves_keep_their_peaks():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[12_345], values[40_001], values[7] = 99.0, -99.0, np.nan
    steps, kept = decimated((list(range(50_000)), values.tolist()), 1000)
    assert len(kept) <= 1000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 49_999)
    assert kept[steps.index(12_345)] == 99.0
    assert kept[steps.index(40_001)] == -99.0
    assert all(values[s] == v for s, v in zip(steps, kept, strict=True))


def test_time_in_training_counts_all_parts(here):
    Path("runs/a/summary.json").unlink()
    rows = [("step", "epoch", "images_per_second", "online_seconds")]
    rows += [(10, 0.5, 100.0, ""), (10, "", "", 3.0), (20, 1.0, 50.0, "")]
    with Path("runs/a/metrics.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    seconds = read_run(Path("runs/a")).seconds()
    assert seconds == pytest.approx(1494 * 0.5 / 100 + 1494 * 0.5 / 50 + 3.0)
    spoken = [duration_in_words(s) for s in (seconds, 0, 61, 3600, 100_000)]
    assert spoken == ["25 s", "0 s", "1 min 1 s", "1 h", "1 d 3 h"]


def test_stretches_without_health_are_marked(here):
    lines = ["step,loss,healthy"] + [f"{10 * i},1.0,{float(i not in (3, 4, 9))}" for i in range(10)]
    Path("runs/a/metrics.csv").write_text("\n".join(lines) + "\n")
    found = read_run(Path("runs/a"))
    plot = figure_groups([found], [None])[0]["plots"][0]
    assert plot["sick"] == [{"run": 0, "from": 30, "to": 50}, {"run": 0, "from": 90, "to": 90}]
    assert "healthy at the end, 3 reports were not" in sections.headline(found)


def test_a_run_writes_it_at_its_end(here, runs, words, capsys):
    said = runs[1]
    assert "report: runs/a/report.html" in said
    assert said.index("k-NN 20") < said.index("report: ")
    assert "finished" in ReportPage(Path("runs/a/report.html")).words
    before = {p: p.stat().st_mtime_ns for p in Path("runs/a").rglob("*")}
    assert run("pretrain", "name=a", *(w for w in words if w != "report=null")) == 0
    assert run("pretrain", "name=a", *words) == 0  # the same run
    assert "report: runs/a/report.html" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path("runs/a").rglob("*")}


def test_a_report_that_fails_changes_nothing_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if w != "report=null" and not w.startswith("callbacks.online")]
    words += ["~callbacks.online", "eval_data=none", "epochs=0.02", "report._target_=os.listdir"]
    err = io.StringIO()
    with redirect_stderr(err):
        assert run("pretrain", "name=c", *words) == 0
    assert "ssl-xcit report run=runs/c tries again" in err.getvalue()
    assert Path("runs/c/summary.json").is_file()
    assert not Path("runs/c/report.html").exists()
