"""The page's data read back by an HTML parser and by Pillow; the command on small sets."""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from commands import images, run
from html_page import Page
from PIL import Image
from plotly.offline import get_plotlyjs

from ssl_xcit.eval.viz.atlas import (
    SHEET,
    Atlas,
    atlas_page,
    common_folder,
    sprites,
    squared,
)

ODD = ["/d/</script><b>x.png", "/d/a\udcff.png", '/d/"q" & \u2028ü.jpg', "/d/<!--.png"]


def opened(uri):
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:image/webp"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_what_is_in_the_page_is_what_went_in():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(4, 2)) * 1e3
    atlas = Atlas(
        places, ODD, [7, 2, 7, 9], ["a", "b", "</script>", *"cdef", "</style>&"], ["x"], 32
    )
    html = atlas_page("<A> & b", ["<i>"], atlas)
    read = Page(html)
    (content,) = read.json
    drawn = np.stack([content["x"], content["y"]], axis=1)
    unit = np.ptp(places, axis=0).max()
    assert np.allclose(drawn - drawn[0], (places - places[0]) / unit, atol=2e-5)
    assert [content["classNames"][i] for i in content["classes"]] == [
        "</style>&", "</script>", "</style>&", "9"
    ]  # fmt: skip
    assert read.words.count("</style>&") == read.words.count("</script>") == 1  # in the legend
    assert [content["folder"] + name for name in content["names"]] == ODD
    assert os.fsencode(content["folder"] + content["names"][1]) == b"/d/a\xff.png"
    assert (content["side"], content["perSheet"], content["sheets"]) == (32, 64**2, ["x"])
    tags = [tag for tag, _ in read.tags]
    assert "i" not in tags
    assert tags.count("script") == 3
    assert html.encode()  # no lone surrogates outside of JSON
    assert all(link.startswith("data:") for link in read.links)
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", own)


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["/a/b/1.png", "/a/b/2.png"], "/a/b/"),
        (["/a/b1/1.png", "/a/b2/2.png"], "/a/"),
        (["x[0]", "x[1]"], ""),
        (["/a/b.png"], "/a/"),
        (["a/b/", "a/b/c"], "a/b/"),
        ([], ""),
    ],
)
def test_the_common_folder_is_told_once(names, folder):
    assert common_folder(names) == folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"places": np.zeros((2, 2))},
        {"places": np.full((1, 2), np.nan)},
        {"classes": [1, 2]},
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ValueError, match="1 image"):
        Atlas(**{"places": np.zeros((1, 2)), "names": ["a"], **wrong})


def test_thumbnails_lie_in_sheets_in_order():
    side = 256
    per_sheet = (SHEET // side) ** 2
    shades = np.random.default_rng(0).integers(0, 256, (per_sheet + 3, 3), np.uint8)
    pictures = (np.broadcast_to(shade, (40, 60, 3)) for shade in shades)
    sheets = [opened(uri) for uri in sprites(pictures, side)]
    assert [s.shape for s in sheets] == [(SHEET, SHEET, 3), (2 * side, 2 * side, 3)]
    for i, shade in enumerate(shades.astype(int)):
        found, place = sheets[i // per_sheet], i % per_sheet
        columns = found.shape[1] // side
        top, left = place // columns * side, place % columns * side
        inner = found[top + 8 : top + side - 8, left + 8 : left + side - 8]
        assert np.abs(inner.astype(int) - shade).max() <= 12
    assert sprites([], 32) == []


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 7)])
def test_the_central_square_is_taken(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    short = min(shape)
    top, left = (shape[0] - short) // 2, (shape[1] - short) // 2
    picture[top : top + short, left : left + short] = 200
    assert (squared(picture, 16) == 200).all()


# the command

QUICK = ["num_workers=0", "cache=false", "device=cpu"]
FOLDER = ["eval_data=folder", "eval_data.resize=32", "eval_data.size=32"]


def made(file):
    (content,) = Page(Path(file)).json
    return content


def test_a_folder_with_classes(here, capsys):
    for name, count in (("cats", 12), ("dogs", 9)):
        images(here / "own" / name, count)
    (here / "own" / "dogs" / "bad.png").write_bytes(b"no image")
    words = ["ckpt=net.pth", *FOLDER, "eval_data.root=own", "part=all", "out=map.html", *QUICK]
    before = set(here.rglob("*"))
    assert run("atlas", *words) == 0
    assert set(here.rglob("*")) - before == {here / "map.html"}
    told = capsys.readouterr().out
    assert "1 of 22 images" in told
    assert "bad.png" in told
    assert "21 images" in told
    assert "map.html" in told
    content = made("map.html")
    names = [content["folder"] + name for name in content["names"]]
    assert sorted(names) == sorted(
        f"own/{n}/{i}.png" for n, c in (("cats", 12), ("dogs", 9)) for i in range(c)
    )
    classes = [content["classNames"][i] for i in content["classes"]]
    assert classes == [Path(name).parent.name for name in names]
    sheet = opened(content["sheets"][0])
    for i, name in enumerate(names):  # each thumbnail is that of its name
        top, left = i // (sheet.shape[1] // 64) * 64, i % (sheet.shape[1] // 64) * 64
        own = np.asarray(Image.open(name).resize((64, 64), Image.Resampling.BOX)).astype(float)
        seen = sheet[top : top + 64, left : left + 64].astype(float)
        assert np.corrcoef(own.ravel(), seen.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("count", [1, 7])
def test_a_folder_without_classes(here, count):
    images(here / "plain", count)
    words = ["ckpt=net.pth", *FOLDER, "eval_data.root=plain", "thumbnail=16", *QUICK]
    assert run("atlas", *words) == 0
    content = made("atlas.html")
    assert content["classes"] is None
    assert (len(content["names"]), content["side"]) == (count, 16)


def test_parts_of_a_run_and_fewer_images(here):
    for part, count in (("test", 6), ("all", 10)):
        assert run("atlas", "ckpt=run", f"part={part}", f"max_images={count}", *QUICK) == 0
        content = made("run/atlas.html")
        assert abs(len(content["names"]) - count) <= 1
        parts = {"/test/" in n or n.startswith("test/") for n in
                 (content["folder"] + n for n in content["names"])}  # fmt: skip
        assert True in parts
        assert (False in parts) == (part == "all")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["part=validation"], "test, train or all"),
        (["out=map.png"], "ending in .html"),
        (["ckpt=[net.pth,net.pth]"], "one at a time"),
        (["eval_data=none"], "the images of a data set are needed"),
        ([*FOLDER, "eval_data.root=broken"], "can be read"),
        (["ckpt=nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_answered_in_a_line(here, capsys, words, said):
    (here / "broken").mkdir()
    (here / "broken" / "a.png").write_bytes(b"no")
    assert run("atlas", "ckpt=net.pth", *QUICK, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (here / "atlas.html").exists()
