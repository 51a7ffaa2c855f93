"""The report of a run: its numbers are those of the files, what files hold stays text, and whatever
is missing is said.
"""

import html
import io
import json
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

from ssl_xcit.errors import MissingPath
from ssl_xcit.eval.report import figures, image_sections, run_features, sections
from ssl_xcit.eval.report import page as page_module
from ssl_xcit.eval.report.report import write_report
from ssl_xcit.eval.report.run_features import ReportOptions, RunFeatures
from ssl_xcit.eval.report.run_reader import read_run, tell_apart
from ssl_xcit.eval.viz.markup import render_macro
from ssl_xcit.utils.locks import lock_holder
from ssl_xcit.utils.terminal import duration_in_words, printable

A, B = Path("runs/a"), Path("runs/b")
TINY = [w for w in SMALL if not w.startswith("evaluation.evaluators.linear")]
TINY += ["evaluation.evaluators.linear=null", "evaluation.evaluators.knn.k=[20]"]
TINY += ["evaluation.evaluators.knn.kinds=[cls]"]
OPTIONS = ReportOptions(num_workers=0, max_images=24, device="cpu")
PARTS = ["results", "curves", "pictures", "channels", "neighbours", "atlas", "settings",
         "commands", "environment", "bad"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, on_few_photos):
    """The folder of two runs of nine steps, settings of both, and what the first printed; the
    second has other settings and no report.
    """
    folder, out = tmp_path_factory.mktemp("runs"), io.StringIO()
    words = [*TINY, "eval_data=folder", *on_few_photos, "evaluation.baselines=null"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(page_module, "get_plotlyjs", lambda: "Plotly = 0")
        assert run("pretrain", "name=a", *(w for w in words if w != "report=null")) == 0
        said = out.getvalue()
        assert run("pretrain", "name=b", "seed=3", "optim.lr=0.01", *words) == 0
    return folder / "runs", words, said


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Plotly is 4.8 MB, which one test has in its page."""
    if "files" not in request.node.name:
        monkeypatch.setattr(page_module, "get_plotlyjs", lambda: "Plotly = 0")


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """Copies, in the current folder."""
    shutil.copytree(runs[0], tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class ReportPage(Page):
    """A report, with the figures that plotly draws; every section is there."""

    def __init__(self, file, missing=()):
        super().__init__(Path(file))
        assert [i for i in self.ids if i in PARTS] == PARTS
        pieces = self.text.split('<section id="')[1:]
        assert {p.split('"')[0] for p in pieces if 'class="trouble"' in p} == set(missing)
        self.figures = [content for content in self.json if "data" in content]

    @property
    def traces(self):
        """Lines of all figures by their names, without bands."""
        drawn = (trace for figure in self.figures for trace in figure["data"])
        return {trace["name"]: trace for trace in drawn if trace.get("hoverinfo") != "skip"}


def made(*folders, missing=()):
    write_report([read_run(Path(f)) for f in folders], OPTIONS, Path("page.html"))
    return ReportPage("page.html", missing)


def features_of(*folders):
    found = [read_run(Path(f)) for f in folders]
    tell_apart(found)
    return [RunFeatures(each, OPTIONS) for each in found]


def edit(file, change):
    """Change the content of a JSON file in place, or begin one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    change(content)
    file.write_text(json.dumps(content))


def knn_of(folder):
    return json.loads((folder / "summary.json").read_text())["results"]["pretrained"]["knn_k20"]


def test_numbers_are_those_of_the_files(here, capsys):
    assert run("report", "run=runs/b", "num_workers=0", "max_images=40") == 0
    printed = capsys.readouterr()
    assert "written: runs/b/report.html" in printed.out
    assert printed.err == ""
    page = ReportPage("runs/b/report.html")
    names = {"loss": "loss", "lr": "lr", "rankme": "RankMe", "knn_k20": "k-NN 20",
             "images_per_second": "images/s"}  # fmt: skip
    for column, name in names.items():
        line = page.traces[name]
        wanted = {int(r["step"]): float(r[column]) for r in metrics(B) if r[column]}
        assert dict(zip(line["x"], line["y"], strict=True)) == pytest.approx(wanted, rel=1e-6)
    knn = page.traces["k-NN 20"]
    for value, interval in zip(knn["y"], knn["customdata"], strict=True):
        bounds = binomtest(round(value * 51 / 100), 51).proportion_ci(0.95, "wilson")
        assert interval == pytest.approx([100 * bounds.low, 100 * bounds.high], rel=1e-6)
    (final,) = page.figures[0]["data"]
    assert final["x"] == pytest.approx([knn_of(B)], rel=1e-6)
    summary = json.loads((B / "summary.json").read_text())
    low, high = summary["intervals"]["pretrained"]["knn_k20"]
    assert final["customdata"] == [f" ({low:.1f} to {high:.1f})"]
    bars = final["error_x"]["arrayminus"] + final["error_x"]["array"]
    assert bars == pytest.approx([knn_of(B) - low, high - knn_of(B)])
    assert (B / "report.html").stat().st_size < 8e6
    assert "ssl-xcit pretrain name=b seed=3" in page.words
    assert all(link.startswith(("data:", "#")) for link in page.links)


def settings_of(folder):
    """Those that were changed, and all, by key, and notes."""
    content = sections.settings_section([read_run(folder)])
    tables = [content[kind].rows for kind in ("changed", "everything")]
    return *({key: row for key, *row in rows} for rows in tables), " ".join(content["notes"])


def test_settings_that_were_changed_are_named(here):
    changed, everything, _ = settings_of(B)
    linear = {key: row for key, row in changed.items() if ".linear" in key}
    several = ["null", "(several settings)", "typed"]
    assert linear == {"evaluation.evaluators.linear": several}
    assert changed["seed"] == ["3", "0", "typed"]
    assert changed["optim.lr"] == ["0.01", "0.0025", "typed"]
    assert not {"optim.weight_decay", "data"} & changed.keys()
    assert everything["optim.weight_decay"][0] == "0.04"
    assert everything["model"][0] == "xcit_micro_4_p8"
    edit(A / "run.json", lambda c: c["choices"].update(trainer="cpu", augment="mine"))
    changed, _, notes = settings_of(A)
    assert changed["trainer"] == ["cpu", "auto", "by the run"]
    assert "augment=mine is none of the installed options" in notes


def test_data_that_has_to_be_named_leaves_the_other_settings_comparable(here):
    edit(B / "run.json", lambda c: c["choices"].update(data="folder"))
    edit(B / "run.json", lambda c: c["overrides"].extend(["data=folder", "data.root=my photos"]))
    text = (B / "config.yaml").read_text()
    (B / "config.yaml").write_text(text.replace("\ndata:\n", "\ndata:\n  root: my photos\n"))
    changed, _, notes = settings_of(B)
    assert "could not be composed" not in notes
    assert changed["data"] == ["folder", "photos", "typed"]
    assert changed["data.root"] == ["my photos", "(has to be named)", "typed"]
    assert "optim.weight_decay" not in changed


def test_what_files_hold_stays_text(here):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    folder = here / "runs" / "a<b>&'"
    shutil.copytree(A, folder)
    edit(folder / "run.json", lambda c: c["overrides"].append(f"+note={hostile}"))
    edit(folder / "run.json", lambda c: c["versions"].update({hostile: hostile}))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"note: {json.dumps(hostile)}\n")
    bad = {"place": 0, "name": hostile, "reason": hostile}
    (folder / "bad_samples.jsonl").write_text(f"{json.dumps(bad)}\n")
    edit(folder / "summary.json", lambda c: c["results"].update({hostile: {hostile: 1.0}}))
    edit(folder / "summary.json", lambda c: c.update(health=hostile))
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines = [f'{lines[0]},"{hostile}"', *(f"{line},1.5" for line in lines[1:])]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    pages = plain, page = made(B), made(folder)
    assert page.words.count("alert(1)") >= 6
    scripts = [sum(tag == "script" for tag, _ in p.tags) - len(p.figures) for p in pages]
    assert scripts[0] == scripts[1]
    assert len(page.figures) == 1 + len(plain.figures)
    assert not [known for _, known in page.tags if "onerror" in known]
    shown = html.escape(printable(hostile), quote=False)  # plotly takes some HTML
    assert page.traces[shown]["y"] == [1.5] * (len(lines) - 1)
    assert page.figures[0]["data"][-1]["name"] == shown
    with pytest.raises(ValueError, match="JSON"):
        render_macro("macros.html", "plot", content=float("nan"), name="x")


def test_commands_are_quoted_for_a_shell(here):
    overrides = ["name=a b", "data.root='x;rm -rf $HOME'"]
    edit(A / "run.json", lambda c: c.update(overrides=overrides))
    ((_, groups),) = sections.commands_section([read_run(A)])["runs"]
    line = groups[0][1][0].replace("ssl-xcit", "printf '%s\\n'", 1)
    printed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["pretrain", *overrides]


CHECKPOINT = A / "checkpoints/step-000009.ckpt"
OF_IMAGES = {"pictures", "channels", "neighbours", "atlas"}


def damage_lines():
    lines = (A / "metrics.csv").read_text().splitlines()
    lines[2] = lines[2][: len(lines[2]) // 2]
    lines.insert(4, "\x00,,1e999999,x")
    (A / "metrics.csv").write_text("\n".join(lines) + "\n5,0.1,")


def remove_head():
    content = torch.load(CHECKPOINT, weights_only=True)
    state = {k: v for k, v in content["state_dict"].items() if ".backbone." in k}
    torch.save({"state_dict": state, "architecture": content["architecture"]}, CHECKPOINT)
    (A / "checkpoints/manifest.json").unlink()


def damage_checkpoint():
    CHECKPOINT.write_bytes(CHECKPOINT.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("missing", "said", "harm", "files"),
    [
        ("curves", "metrics.csv is missing: there are no curves", None, {"metrics.csv": None}),
        ("curves results images", "holds no numbers yet|summary.json cannot be read|not the|bytes",
         damage_checkpoint, {"metrics.csv": "step,loss\n", "summary.json": "[]"}),
        ("", "2 lines are damaged and left out|results.json cannot be read",
         damage_lines, {"results.json": '{"results": {"a": 3'}),
        ("", "are no numbers by row|config.yaml cannot be read",
         remove_head, {"results.json": '{"results": {"a": 3}}', "config.yaml": "a: [}"}),
        ("settings images", "no checkpoint|neither config.yaml nor run.json|run.json is missing",
         None, dict.fromkeys(["run.json", "config.yaml", "checkpoints"])),
        ("results", "trained to the last step, but not evaluated|measured at the end of a run",
         None, {"summary.json": None}),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_and_the_rest_is_there(here, missing, said, harm, files):
    if harm:
        harm()
    for name, text in files.items():
        if text is not None:
            (A / name).write_text(text)
        elif (A / name).is_dir():
            shutil.rmtree(A / name)
        else:
            (A / name).unlink()
    parts = set(missing.split())
    page = made(A, missing=parts - {"images"} | (OF_IMAGES if "images" in parts else set()))
    assert [words for words in said.split("|") if words not in page.words] == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "name a run folder"),
        (["run=runs/a", "runs=[runs/b]"], "name a run folder"),
        (["runs=[runs/a,runs/a]"], "named twice"),
        (["run=[runs/a,runs/b]"], "runs=[runs/a,runs/b]"),
        (["runs=[a,b,c,d,e,f,g,h,i]"], "at most 8"),
        (["run=nowhere"], "no such folder"),
        (["run=plain"], "is no run folder"),
        (["run=runs/a", "out=page.txt"], "ending in .html"),
        (["run=runs/a", "out=taken/p.html"], "out=FILE.html writes the page elsewhere"),
    ],
)
def test_what_is_refused(typed, said, here, capsys):
    Path("plain").mkdir()
    Path("taken").write_text("a file")
    assert run("report", *typed) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ("taken: no folder to write to" in error) == ("out=taken/p.html" in typed)
    assert "Traceback" not in error


def test_images_that_are_gone_are_named(here):
    edit(A / "run.json", lambda c: c["overrides"].append("eval_data.root=gone"))
    (features,) = features_of(A)
    with pytest.raises(MissingPath, match=r"^root=gone: no such folder"):
        _ = features.data


def test_a_run_that_is_going_on_is_seen_by_its_lock(here):
    (A / "summary.json").unlink()
    (A / ".lock").write_text("process 1 on nowhere\n")
    assert lock_holder(A) == ""  # a killed process leaves the file
    with held_by_another(A / ".lock") as process:
        kind, words = sections.headline(read_run(A))["pills"][0]
        assert kind == "busy"
        assert f"still running, at step 9 of 9; process {process} on" in words
        assert (A / ".lock").is_file()


def test_several_runs_are_compared(here, capsys):
    assert run("report", "runs=[runs/a,runs/b]", "num_workers=0", "max_images=40") == 0
    assert "written: runs/report.html" in capsys.readouterr().out
    page = ReportPage("runs/report.html")
    final, losses = (figure["data"] for figure in page.figures[:2])
    for folder, line in zip((A, B), losses, strict=True):
        assert line["name"] == folder.name
        wanted = [float(row["loss"]) for row in metrics(folder) if row["loss"]]
        assert line["y"] == pytest.approx(wanted, rel=1e-6)
    assert [row["x"][0] for row in final] == pytest.approx([knn_of(A), knn_of(B)], rel=1e-6)
    assert ["seed", "0", "3"] in page.rows("changed")
    assert ["optim.lr", "0.0025", "0.01"] in page.rows("changed")
    assert "b - a (paired)" in page.words
    difference = [r for r in page.rows("numeric") if len(r) == 5 and r[0] == "k-NN 20"][-1]
    assert difference[1] == f"{knn_of(B) - knn_of(A):+.2f}"
    # what `eval` has left is taken where it is of these weights
    others = ("linear", "few_shot", "logistic", "clustering", "retrieval")
    words = [f"evaluation.evaluators.{name}=null" for name in others]
    words += ["evaluation.baselines=null", "num_workers=0", "evaluation.evaluators.knn.kinds=[cls]"]
    assert run("eval", "ckpt=[runs/a,runs/b]", *words) == 0
    (paired,) = sections.results_section(features_of(A, B))["differences"]
    assert paired["words"] == "From comparison.json."
    assert difference in paired["table"].rows


def test_a_difference_says_when_it_is_of_other_features_than_the_numbers(here):
    (paired,) = sections.results_section(features_of(A, B))["differences"]
    assert paired["words"] == ""
    chosen = {"pretrained": {"knn": {"kind": "cls_patch"}}}
    edit(B / "summary.json", lambda c: c.update(chosen=chosen))
    (paired,) = sections.results_section(features_of(A, B))["differences"]
    assert paired["words"].startswith("Of class tokens; the numbers above of b are of features")
    assert paired["command"] == "ssl-xcit eval 'ckpt=[runs/a,runs/b]'"


def test_runs_of_one_name_keep_their_own_numbers(here):
    folders = [A, Path("elsewhere/a")]
    shutil.copytree(B, folders[1])
    content = sections.results_section(features_of(*folders))
    assert [trace["name"] for trace in content["figure"]["data"]] == [str(f) for f in folders]
    (row,) = (row for row in content["tables"][0][1].rows if row[0] == "k-NN 20")
    assert [row[1], row[3]] == [f"{knn_of(folder):.1f}" for folder in folders]
    assert row[1] != row[3]


def test_numbers_of_the_student_are_not_taken_for_the_runs(here):
    of_student = {"which": "student", "results": {"pretrained": {"knn_k20": 99.9}}}
    edit(A / "results.json", lambda c: c.update(of_student))
    found = read_run(A)
    assert "results.json is of other weights than the newest: the student" in found.problems
    assert found.results.numbers["pretrained"]["knn_k20"] == knn_of(A)


def test_intervals_while_training_are_not_over_images_of_other_data(here):
    (A / "summary.json").unlink()  # stopped, then measured on something else
    other = {"test_images": 7, "results": {"pretrained": {"knn_k20": 12.3}}}
    edit(A / "results-cifar10.json", lambda c: c.update(other))
    (features,) = features_of(A)
    assert features.run.results is None
    assert features.num_online() == 51
    content = sections.results_section([features])
    assert content["notes"] == ["On the run's own data nothing is measured yet."]
    ((title, table),) = content["tables"]
    assert "results-cifar10.json" in title
    assert table.rows == [["k-NN 20", "12.3", ""]]


def test_numbers_measured_again_stand_beside_the_others(here):
    end = {
        "results": {"random weights": {"linear": 22.2}, "pretrained": {"linear": 55.5, "map": 1.0}},
        "intervals": {"pretrained": {"linear": [50.0, 60.0], "map": [0.5, 1.5]}},
    }
    again = {"results": {"pretrained": {"knn_k20": 99.9, "map": 2.0}}}
    edit(A / "summary.json", lambda c: c.update(end))
    edit(A / "results.json", lambda c: c.update(again))
    found = read_run(A).results
    assert found.source == "results.json and summary.json"
    assert list(found.numbers) == ["random weights", "pretrained"]
    assert found.numbers["pretrained"] == {"linear": 55.5, "map": 2.0, "knn_k20": 99.9}
    assert found.intervals["pretrained"] == {"linear": (50.0, 60.0)}


def test_one_of_several_runs_may_have_nothing(here):
    shutil.rmtree(B / "checkpoints")
    for name in ("metrics.csv", "summary.json"):
        (B / name).unlink()
    assert "Without final numbers: b." in made(A, B).words


def test_a_run_without_labels_shows_its_training_images(here, monkeypatch):
    monkeypatch.setattr(run_features, "BANK", 40)
    edit(A / "run.json", lambda c: c["choices"].update(eval_data="none"))
    edit(A / "run.json", lambda c: c.update(overrides=[]))
    (features,) = features_of(A)
    features.run.state = "stopped"  # whose features nobody has kept
    assert features.data.name.startswith("training images of")
    assert len(features.bank) == 40
    assert features.queries is features.bank
    assert features.num_online() is None


def pictures(folder, steps, size=40, names=("x", "y")):
    """As training leaves them; returns the folder."""
    folder = folder / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def draw(*words):
        file = f"{'-'.join(map(str, words))}.jpg"
        pixels = rng.integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / file, quality=90)
        return file

    images = [{"name": n, "label": "cat", "file": draw(n)} for n in names]
    moments = [
        {"step": step, "entropy": [0.9 - step / 1000]}
        | {kind: [draw(step, n, kind) for n in names] for kind in ("attention", "pca")}
        for step in steps
    ]
    edit(folder / "index.json", lambda c: c.update(images=images, moments=moments))
    return folder


def test_pictures_that_the_run_has_left_are_shown_over_time(here):
    folder = pictures(A, [0, 3, 6, 9])
    (folder / "3-x-pca.jpg").write_bytes(b"no picture")
    (folder / "6-y-pca.jpg").unlink()
    edit(folder / "index.json", lambda c: c["moments"][3].update(
        pca=["../config.yaml", "9-y-pca.jpg"], attention=["/etc/passwd", "9-y-attention.jpg"]
    ))  # fmt: skip
    features = features_of(A)
    ((_, strip),) = image_sections.pictures_section(features)["runs"]
    missing = [
        (place, kind)
        for row in strip["rows"]
        for place, cell in enumerate(row["cells"])
        for kind, uri in cell.items()
        if not uri.startswith("data:image/jpeg;base64,")
    ]
    assert missing == [(1, "pca"), (3, "attention"), (3, "pca"), (2, "pca")]
    (line,) = image_sections.channels_section(features)["figure"]["data"]
    assert (*line["x"], *line["y"]) == (0, 3, 6, 9, 0.9, 0.897, 0.894, 0.891)


def test_pictures_of_other_images_are_not_put_beside(here):
    pictures(A, [9])
    pictures(B, [9], names=("x", "z"))  # one class
    strips = image_sections.pictures_section(features_of(A, B))["runs"]
    assert [(name, len(strip["rows"])) for name, strip in strips] == [("a", 2), ("b", 2)]


def test_moments_are_left_out_where_there_are_too_many(here):
    sizes = [file.stat().st_size for file in pictures(A, range(0, 40, 2)).glob("*-*.jpg")]
    timeline = image_sections.recorded_timeline(read_run(A), sum(sizes) // 3)
    steps = [moment.step for moment in timeline.moments]
    assert (steps[0], steps[-1]) == (0, 38)
    assert 5 <= len(steps) <= 6
    assert f"{len(steps)} of 20 moments are shown" in timeline.note
    folder = pictures(B, [1], size=900)
    timeline = image_sections.recorded_timeline(read_run(B), 10**9)
    assert len(timeline.images[0]) < (folder / "x.jpg").stat().st_size


def test_long_curves_keep_their_peaks():
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[40_001], values[7] = 99.0, -99.0, np.nan
    steps, kept = figures.decimated((list(range(50_000)), values.tolist()), 1000)
    assert len(kept) <= 1000
    assert steps == sorted(steps)
    assert {0, 12_345, 40_001, 49_999} <= set(steps)
    assert all(values[s] == v for s, v in zip(steps, kept, strict=True))


def test_local_means_are_of_what_is_finite_nearby():
    values = np.random.default_rng(0).normal(size=81)
    values[[3, 40, 41]] = np.nan, np.inf, -np.inf
    wanted = [values[max(0, i - 2) : i + 3] for i in range(81)]
    wanted = [near[np.isfinite(near)].mean() for near in wanted]
    assert figures.local_means(values.tolist()) == pytest.approx(wanted, rel=1e-6)
    assert figures.local_means([float("nan")] * 20) == [None] * 20


def test_time_in_training_counts_all_parts(here):
    (A / "summary.json").unlink()
    rows = ["step,epoch,images_per_second,online_seconds", "10,0.5,100.0,", "10,,,3.0",
            "20,1.0,50.0,", ""]  # fmt: skip
    (A / "metrics.csv").write_text("\n".join(rows))
    seconds = read_run(A).seconds()
    assert seconds == pytest.approx(1494 * 0.5 / 100 + 1494 * 0.5 / 50 + 3.0)
    spoken = [duration_in_words(s) for s in (seconds, 0, 61, 3600, 100_000)]
    assert spoken == ["25 s", "0 s", "1 min 1 s", "1 h", "1 d 3 h"]


def test_stretches_without_health_are_marked(here):
    lines = ["step,loss,healthy"] + [f"{10 * i},1.0,{float(i not in (3, 4, 9))}" for i in range(10)]
    (A / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = read_run(A)
    shapes = figures.curve_groups([found], [None])[0][1][0][2]["layout"]["shapes"]
    assert [(s["x0"], s["x1"]) for s in shapes if s.get("opacity")] == [(30, 50), (90, 90)]
    assert ("warn", "healthy at the end, 3 reports were not") in sections.headline(found)["pills"]


def test_a_run_writes_it_at_its_end(here, runs, capsys):
    _, words, said = runs
    assert said.index("k-NN 20") < said.index("report: runs/a/report.html")
    assert "finished" in ReportPage("runs/a/report.html").words
    before = {p: p.stat().st_mtime_ns for p in A.rglob("*")}
    assert run("pretrain", "name=a", *(w for w in words if w != "report=null")) == 0
    assert run("pretrain", "name=a", *words) == 0  # the same run
    assert "report: runs/a/report.html" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in A.rglob("*")}


def test_a_report_that_fails_changes_nothing_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if w != "report=null" and not w.startswith("callbacks.online")]
    words += ["~callbacks.online", "eval_data=none", "epochs=0.02", "report._target_=os.listdir"]
    with redirect_stderr(io.StringIO()) as err:
        assert run("pretrain", "name=c", *words) == 0
    assert "ssl-xcit report run=runs/c tries again" in err.getvalue()
    assert Path("runs/c/summary.json").is_file()
    assert not Path("runs/c/report.html").exists()
