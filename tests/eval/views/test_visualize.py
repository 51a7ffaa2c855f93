"""`ssl-xcit visualize` as a person types it: files, page, numbers, and wrong input."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from commands import NO_ONLINE, images, run
from PIL import Image
from ssl_xcit.eval.views import attention, channels, looking
from ssl_xcit.eval.views.pictures import (
    colour_table,
    coloured,
    folder_names,
    found_images,
    overlay,
    read_fitted,
)
from tiny_run import make_run, published, sharp_backbone

from ssl_xcit.data.decode import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.weights import load_backbone


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    images(Path("own"), 2, (40, 72))
    return tmp_path


def numbers(folder="run/visualize"):
    return json.loads(Path(folder, "visualize.json").read_text())


class Links(HTMLParser):
    """What a page points to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [unquote(value) for name, value in attrs if name in ("href", "src")]


def links(folder="run/visualize"):
    page = Path(folder, "index.html").read_text()
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    found = Links(page).found
    for file in found:
        assert file.startswith("#") or Path(folder, file).is_file(), file
    return found


def test_everything_is_drawn_and_told(here, capsys):
    assert run("visualize", "ckpt=run", "images=own") == 0
    assert "of 2 images; open run/visualize/index.html" in capsys.readouterr().out
    out = Path("run/visualize")
    names = {"image", "components", "foreground", "similarity", "sheet", "map-mean", "mask-mean"}
    names |= {f"{kind}-head-{i}" for kind in ("map", "mask") for i in range(1, 5)}
    for image in ("0", "1"):
        assert {f.stem for f in (out / image).glob("*.png")} == names
        for name in names - {"sheet"}:
            assert Image.open(out / image / f"{name}.png").size == (72, 40)
    assert {f.name for f in (out / "channels").glob("*.png")} == {"entropy.png", "matrices.png"}
    assert not list(out.rglob("*.part"))
    assert {"0/map-head-4.png", "channels/matrices.png", "1/sheet.png"} <= set(links())
    content = numbers()
    assert content["images"] == {"0": "own/0.png", "1": "own/1.png"}
    assert content["left_out"] == {}
    assert len(content["weights"]["run"]["sha256"]) == 64
    assert content["weights"]["run"]["file"] == "run/checkpoints/step-000006.ckpt"
    found = content["results"]["run"]
    backbone = load_backbone("run")
    entropies = []
    for image in ("0", "1"):
        pixels = np.asarray(Image.open(f"own/{image}.png"))
        x = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], RGB)
        with torch.no_grad(), channels.watched(backbone) as matrices:
            maps = backbone.attention(x)[0]
        told = found["attention"]["images"][image]
        peaks = maps.amax((1, 2)) / maps.mean((1, 2))
        assert told["peak"] == pytest.approx(peaks.tolist(), rel=1e-3)
        itself = (1 - maps.sum((1, 2))).tolist()
        assert told["weight_on_class_token"] == pytest.approx(itself, abs=1e-5)
        entropies.append([channels.relative_entropy(m[0]).mean().item() for m in matrices])
    assert found["channels"]["entropy"] == pytest.approx(np.mean(entropies, axis=0), abs=1e-5)
    assert 0 < sum(found["pca"]["explained"]) <= 1
    for image in ("0", "1"):
        kept = np.asarray(Image.open(out / image / "foreground.png")).astype(int)
        coloured = (np.ptp(kept, axis=-1) > 0)[4::8, 4::8]  # the rest is grey
        assert coloured.mean() == pytest.approx(found["pca"]["foreground"][image], abs=0.05)


def test_one_kind_draws_nothing_else(here):
    assert run("visualize", "ckpt=run", "images=own/0.png", "kinds=channels") == 0
    assert {f.name for f in Path("run/visualize/0").glob("*.png")} == {"image.png"}
    assert list(numbers()["results"]["run"]) == ["channels"]
    links()
    assert run("visualize", "ckpt=run", "images=own/0.png", "kinds=[pca]", "patch=null",
               "out=pca") == 0  # fmt: skip
    assert {f.stem for f in Path("pca/0").glob("*.png")} == {
        "image", "components", "foreground", "sheet",
    }  # fmt: skip
    links("pca")


def test_checkpoints_over_time_and_side_by_side(here):
    words = ["images=own", "kinds=[attention,channels]"]
    assert run("visualize", "ckpt=run", "over_time=true", *words) == 0
    assert list(numbers()["results"]) == ["step-000003", "step-000006"]
    assert Path("run/visualize/0/step-000003/map-mean.png").is_file()
    assert "0/sheet.png" in links()
    make_run(Path("other run"), seed=50)
    assert run("visualize", "ckpt=[run,other run]", *words, "out=both") == 0
    content = numbers("both")
    assert list(content["results"]) == ["run", "other run"]
    one, two = (r["attention"]["images"]["0"]["peak"] for r in content["results"].values())
    assert one != two
    found = links("both")
    assert {"0/other_run/mask-mean.png", "channels/entropy-other_run.png"} <= set(found)
    # two rows of attention and two of masks, one for each, below each other
    sheet, single = (Image.open(f"both/{f}").size for f in ("0/sheet.png", "0/run/map-mean.png"))
    assert sheet[1] > 4 * single[1]


def test_what_cannot_be_read_is_left_out_and_named(here, capsys):
    Path("own/broken.png").write_bytes(Path("own/0.png").read_bytes()[:200])
    Path("own/text.jpg").write_text("no image")
    assert run("visualize", "ckpt=run", "images=own") == 0
    error = capsys.readouterr().err
    assert "own/broken.png is left out" in error
    assert "own/text.jpg is left out" in error
    content = numbers()
    assert list(content["images"]) == ["0", "1"]
    assert set(content["left_out"]) == {"own/broken.png", "own/text.jpg"}
    assert not any("broken" in link for link in links())
    assert run("visualize", "ckpt=run", "images=[own/broken.png,own/text.jpg]") == 2
    assert "none of 2 can be used; the first, own/broken.png" in capsys.readouterr().err


def test_a_patch_outside_of_some_or_of_all(here, capsys):
    images(Path("own/small"), 3, (16, 16))
    assert run("visualize", "ckpt=run", "images=own", "kinds=[pca]", "patch=[30,60]") == 0
    assert "0.png, 16 x 16, has no patch=[30, 60]" in capsys.readouterr().err
    assert Path("run/visualize/0/similarity.png").is_file()
    assert not Path("run/visualize/2/similarity.png").exists()
    links()
    assert run("visualize", "ckpt=run", "images=own", "patch=[400,60]") == 2
    assert "patch=[400, 60] lies outside of every image" in capsys.readouterr().err


def test_published_weights_need_no_run(here):
    published(here / "bare.pth")
    assert run("visualize", "ckpt=bare.pth", "images=own/0.png") == 0
    found = numbers("visualize")["results"]["bare"]
    assert set(found) == {"attention", "pca", "channels"}
    backbone = sharp_backbone(0)
    pixels = torch.from_numpy(np.asarray(Image.open("own/0.png")).copy())
    with torch.no_grad():
        maps = backbone.attention(normalise(pixels.permute(2, 0, 1)[None], RGB))[0]
    peaks = maps.amax((1, 2)) / maps.mean((1, 2))
    assert found["attention"]["images"]["0"]["peak"] == pytest.approx(peaks.tolist(), rel=1e-3)


def test_memory_that_is_not_there_leaves_an_image_out(here, monkeypatch, capsys):
    images(Path("own/large"), 3, (160, 320))
    real = attention.look

    def little(backbone, x):
        if x.shape[-1] > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(backbone, x)

    monkeypatch.setattr(attention, "look", little)
    assert run("visualize", "ckpt=run", "images=own", "size=null") == 0
    said = "not enough memory for 320 x 160 pixels: try size=160"
    assert said in capsys.readouterr().err
    assert numbers()["left_out"]["own/large/0.png"] == said
    assert len(numbers()["images"]) == 2


def test_more_memory_than_the_machine_has_is_not_tried(here, monkeypatch, capsys):
    monkeypatch.setattr(looking, "free_memory", lambda: 10_000)
    assert run("visualize", "ckpt=run", "images=own", "size=null") == 2
    assert "not enough memory for 72 x 40 pixels: try size=36" in capsys.readouterr().err


def test_weights_that_are_not_finite(here, capsys):
    content = sharp_backbone(0).state_dict()
    content["cls_attn_blocks.1.attn.qkv.bias"][0] = torch.nan  # which no patch sees
    torch.save(content, "broken.pth")
    assert run("visualize", "ckpt=broken.pth", "images=own") == 1
    assert "own/0.png: features that are not finite" in capsys.readouterr().err


def test_wrong_input_is_answered_in_a_line(here, capsys):
    Path("empty").mkdir()
    for words, said in (
        (["images=own/*.tif"], "no file fits"),
        (["images=nowhere"], "no file fits"),
        (["images=empty"], "images=empty"),
        (["images=[]"], "images=[]"),
        (["images=17"], "images=17: no file fits"),
        (["kinds=[]"], "kinds"),
        (["kinds=[attention,pictures]"], "some of attention, pca, channels, neighbours"),
        (["kinds=7"], "kinds"),
        (["ckpt=nowhere"], "no such file or run folder"),
        (["ckpt=own"], "without checkpoints"),
        (["ckpt=[run,run]"], "named twice"),
        (["ckpt=own/0.png"], "not a PyTorch file"),
        (["over_time=true", "ckpt=[run,own]"], "one run folder"),
        (["over_time=1"], "true or false"),
        (["model=xcit_nano_12_p16"], "not xcit_nano_12_p16"),
        (["size=7"], "at least the patch, 8"),
        (["size=large"], "size=large"),
        (["block=3"], "1 or 2"),
        (["block=true"], "1 or 2"),
        (["mass=0"], "mass=0"),
        (["mass=nan"], "mass=nan"),
        (["overlay=2"], "overlay=2"),
        (["max_images=0"], "max_images=0"),
        (["threshold=inf"], "threshold=inf"),
        (["patch=[0.5]"], "patch=[0.5]"),
        (["patch=5"], "patch=[5]"),
        (["which=both"], "teacher or student"),
        (["device=cuda:9"], "try device=cpu"),
        (["device=7"], "device=7"),
        (["out=own/0.png"], "name a folder"),
    ):
        given = [] if any(w.startswith("images") for w in words) else ["images=own"]
        given += [] if any(w.startswith("ckpt") for w in words) else ["ckpt=run"]
        assert run("visualize", *given, *words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert "Traceback" not in error


def test_a_real_run_over_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off = [w for w in NO_ONLINE if not w.startswith("evaluation")]
    off += ["~callbacks.online", "eval_data=none", "name=real"]
    assert run("pretrain", *off) == 0
    images(Path("own"), 1, (40, 72))
    words = ["over_time=true", "images=own", "eval_data=photos", "num_workers=0"]
    kinds = "kinds=[attention,pca,channels,neighbours,prototypes]"
    assert run("visualize", "ckpt=runs/real", kinds, *words, "cache=false") == 0
    found = numbers("runs/real/visualize")["results"]
    steps = [p.stem for p in sorted(Path("runs/real/checkpoints").glob("step-*.ckpt"))]
    assert list(found) == steps
    assert len(steps) > 1
    for each in found.values():
        assert set(each) == {"attention", "pca", "channels", "neighbours", "prototypes"}
        assert 1 <= each["prototypes"]["effective"] <= 32
        assert sum(p["share"] for p in each["prototypes"]["largest"]) <= 1
    assert {f"{k}/{s}.png" for k in ("neighbours", "prototypes") for s in steps} <= set(
        links("runs/real/visualize")
    )


def test_images_are_found_and_thinned(tmp_path):
    images(tmp_path / "a" / "deep", 9)
    files, count = found_images(str(tmp_path / "**" / "*.png"), 4)
    assert count == 9
    assert [f.name for f in files] == ["0.png", "3.png", "5.png", "8.png"]
    both = [str(tmp_path / "a"), str(tmp_path / "a" / "deep" / "0.png")]
    assert found_images(both, 40)[1] == 9  # each once
    photos, _ = found_images(None, 40)
    assert {"astronaut", "flower"} <= {f.stem for f in photos}
    odd = tmp_path / "odd [1].png"
    odd.write_bytes((tmp_path / "a/deep/0.png").read_bytes())
    assert found_images(str(odd), 40)[0] == [odd]
    with pytest.raises(MissingPath, match="pattern in quotes"):
        found_images(str(tmp_path / "*.gif"), 4)
    with pytest.raises(UserError, match="null"):
        found_images([], 4)


def test_colours_over_grey():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    values = rng.random((20, 30)).astype(np.float32)
    grey = np.asarray(Image.fromarray(picture).convert("L")).astype(float)[..., None]
    colours = coloured(values).astype(float)
    for strength in (0.0, 0.65, 1.0):
        expected = (1 - strength) * grey + strength * colours
        assert abs(overlay(picture, values, strength) - expected).max() <= 1.5
    light = colour_table() @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all()  # order is seen, also in grey


def test_no_two_images_share_a_folder():
    assert folder_names(["a", "A", "a b", "ä/..", "", "channels"], ["channels"]) == [
        "a", "A-2", "a_b", "image", "image-2", "channels-2",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [64, 100, None])
def test_sides_are_multiples_of_the_patch(tmp_path, size):
    for number, sides in enumerate([(40, 72), (37, 300), (3, 500), (161, 80)]):
        file = tmp_path / f"{number}.png"
        images(tmp_path / str(number), 1, sides)
        (tmp_path / str(number) / "0.png").rename(file)
        pixels, told = read_fitted(file, RGB, size, 8)
        assert told == sides
        assert pixels.shape[0] % 8 == pixels.shape[1] % 8 == 0
        scale = 1.0 if size is None else min(1.0, size / max(sides))
        for side, was in zip(pixels.shape, sides, strict=False):
            assert size is None or side <= size
            assert abs(side - max(8, was * scale)) <= 8


def test_sheets_and_page_escape_names(here):
    Image.open("own/0.png").save("own/<b>&'.png")
    assert run("visualize", "ckpt=run", "images=own", "kinds=[attention]") == 0
    page = Path("run/visualize/index.html").read_text()
    assert "<b>" not in page
    assert re.search(r'href="[^"]*b[^"]*/map-mean\.png"', page)
    links()


def test_a_disk_that_is_full(here, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_xcit.eval.views.album.write_png", full)
    assert run("visualize", "ckpt=run", "out=pictures") == 1
    assert "pictures cannot be written ([Errno 28] No space left" in capsys.readouterr().err
