"""`ssl-xcit visualize` as a person types it: files, page, numbers, and wrong input."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from commands import images, run
from html_page import Page
from PIL import Image
from tiny_run import sharp_backbone

from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, RunFailed, UserError
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.viz import attention, channels, image_panels
from ssl_xcit.eval.viz.image_panels import ImageTiles, PanelOptions, draw_panels
from ssl_xcit.eval.viz.pictures import (
    colour_table,
    coloured,
    fitted_sides,
    overlay,
    read_fitted,
)
from ssl_xcit.eval.viz.visualize import image_paths
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.utils.files import plain_names


def numbers(folder="run/visualize"):
    return json.loads(Path(folder, "visualize.json").read_text())


def links(folder="run/visualize"):
    page = Page(Path(folder, "index.html"))
    assert "http" not in page.text
    assert "<b>" not in page.text  # of a file's name
    assert "prefers-color-scheme: dark" in page.text
    assert 'name="viewport"' in page.text
    found = [unquote(link) for link in page.links]
    for file in found:
        assert file.startswith("#") or Path(folder, file).is_file(), file
    return found


def textbook(image, backbone):
    """Class attention (H, h, w) of the last block."""
    pixels = torch.from_numpy(np.asarray(Image.open(image)).copy())
    with torch.no_grad():
        return backbone.attention(normalise(pixels.permute(2, 0, 1)[None], RGB))[0]


def peaks(maps):
    return pytest.approx((maps.amax((1, 2)) / maps.mean((1, 2))).tolist(), rel=1e-3)


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory):
    """The folder after one command on good, small, odd and damaged files; what it printed."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    images(folder / "own", 2, (40, 72))
    shutil.copy(folder / "own/0.png", folder / "own/<b>&'.png")
    (folder / "own/broken.png").write_bytes((folder / "own/0.png").read_bytes()[:200])
    (folder / "own/text.jpg").write_text("no image")
    images(folder / "own/small", 1, (16, 16))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        assert run("visualize", "ckpt=run", "images=own", "patch=[30,60]") == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def inside(drawn, monkeypatch):
    monkeypatch.chdir(drawn[0])


def test_everything_is_drawn_and_told(drawn, inside):
    assert "of 4 images; open run/visualize/index.html" in drawn[1]
    out = Path("run/visualize")
    names = {"image", "components", "foreground", "similarity", "sheet", "map-mean", "mask-mean"}
    names |= {f"{kind}-head-{i}" for kind in ("map", "mask") for i in range(1, 5)}
    for image in ("0", "1"):
        assert {f.stem for f in (out / image).glob("*.png")} == names
        for name in names - {"sheet"}:
            assert Image.open(out / image / f"{name}.png").size == (72, 40)
    assert {f.name for f in (out / "channels").glob("*.png")} == {"entropy.png", "matrices.png"}
    assert not list(out.rglob("*.part"))
    named = {"0/map-head-4.png", "channels/matrices.png", "1/sheet.png", "b/map-mean.png"}
    assert named <= set(links())
    content = numbers()
    folders = {"0": "own/0.png", "1": "own/1.png", "b": "own/<b>&'.png", "0-2": "own/small/0.png"}
    assert content["images"] == folders
    assert len(content["weights"]["run"]["sha256"]) == 64
    assert content["weights"]["run"]["file"] == "run/checkpoints/step-000006.ckpt"
    found = content["results"]["run"]
    backbone, entropies = load_backbone("run"), []
    for image, file in folders.items():
        with channels.recorded(backbone) as matrices:
            maps = textbook(file, backbone)
        told = found["attention"]["images"][image]
        assert told["peak"] == peaks(maps)
        itself = (1 - maps.sum((1, 2))).tolist()
        assert told["weight_on_class_token"] == pytest.approx(itself, abs=1e-5)
        entropies.append([channels.relative_entropy(m[0]).mean().item() for m in matrices])
    assert found["channels"]["entropy"] == pytest.approx(np.mean(entropies, axis=0), abs=1e-5)
    assert 0 < sum(found["pca"]["explained"]) <= 1
    for image in ("0", "1"):
        kept = np.asarray(Image.open(out / image / "foreground.png")).astype(int)
        in_colour = (np.ptp(kept, axis=-1) > 0)[4::8, 4::8]  # the rest is grey
        assert in_colour.mean() == pytest.approx(found["pca"]["foreground"][image], abs=0.05)


def test_what_cannot_be_read_is_left_out_and_named(drawn, inside):
    assert "own/broken.png is left out" in drawn[2]
    assert "own/text.jpg is left out" in drawn[2]
    assert set(numbers()["left_out"]) == {"own/broken.png", "own/text.jpg"}
    assert not any("broken" in link for link in links())
    assert "0.png, 16 x 16, has no patch=[30, 60]" in drawn[2]
    assert Path("run/visualize/0/similarity.png").is_file()
    assert not Path("run/visualize/0-2/similarity.png").exists()


def test_one_kind_draws_nothing_else(here):
    images(here / "own", 2, (40, 72))
    words = ["visualize", "images=own/0.png"]
    assert run(*words, "ckpt=net.pth", "kinds=channels") == 0
    assert {f.name for f in Path("visualize/0").glob("*.png")} == {"image.png"}
    assert list(numbers("visualize")["results"]["net"]) == ["channels"]
    links("visualize")
    assert run(*words, "ckpt=run", "kinds=[pca]", "patch=null", "out=pca") == 0
    assert {f.stem for f in Path("pca/0").glob("*.png")} == {
        "image", "components", "foreground", "sheet",
    }  # fmt: skip
    links("pca")


def test_checkpoints_over_time_and_side_by_side(here):
    images(here / "own", 1, (40, 72))
    words = ["images=own", "kinds=[attention,channels]"]
    assert run("visualize", "ckpt=run", "over_time=true", *words) == 0
    assert list(numbers()["results"]) == ["step-000003", "step-000006"]
    assert Path("run/visualize/0/step-000003/map-mean.png").is_file()
    assert "0/sheet.png" in links()
    assert run("visualize", "ckpt=[run,net.pth]", *words, "out=both") == 0  # no run is needed
    content = numbers("both")
    assert list(content["results"]) == ["run", "net"]
    one, two = (r["attention"]["images"]["0"]["peak"] for r in content["results"].values())
    assert one != two
    assert two == peaks(textbook("own/0.png", sharp_backbone(0)))
    found = links("both")
    assert {"0/net/mask-mean.png", "channels/entropy-net.png"} <= set(found)
    # two rows of attention and two of masks, one for each, below each other
    sheet, single = (Image.open(f"both/{f}").size for f in ("0/sheet.png", "0/run/map-mean.png"))
    assert sheet[1] > 4 * single[1]


@pytest.fixture
def draw(tmp_path):
    """Draw attention of three files, of which one is larger."""
    images(tmp_path / "own", 2, (40, 72))
    images(tmp_path / "large", 1, (160, 320))
    tiles = [
        ImageTiles(tmp_path / name, str(i))
        for i, name in enumerate(("own/0.png", "own/1.png", "large/0.png"))
    ]

    def call(backbone, **changes):
        options = PanelOptions(("attention", "pca"), None, 2, 0.6, 0.65, None, None)
        extractor = FeatureExtractor(backbone, num_workers=0)
        draw_panels(options._replace(**changes), extractor, "net", "", tiles, tmp_path)
        return tiles

    return call


def test_memory_that_is_not_there_leaves_an_image_out(draw, monkeypatch):
    real = attention.forward

    def little(backbone, x):
        if x.shape[-1] > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(backbone, x)

    monkeypatch.setattr(attention, "forward", little)
    said = "not enough memory for 320 x 160 pixels: try size=160"
    assert [image.left_out for image in draw(sharp_backbone())] == ["", "", said]


def test_more_memory_than_the_machine_has_is_not_tried(draw, monkeypatch):
    monkeypatch.setattr(image_panels, "free_memory", lambda: 10_000)
    with pytest.raises(UserError, match=r"none of 3 can be used; .* 72 x 40 pixels: try size=36"):
        draw(sharp_backbone())


def test_weights_that_are_not_finite(draw):
    backbone = sharp_backbone()
    with torch.no_grad():
        backbone.cls_attn_blocks[1].attn.qkv.bias[0] = torch.nan  # which no patch sees
    with pytest.raises(RunFailed, match=r"own/0\.png.*features that are not finite"):
        draw(backbone)


def test_a_patch_outside_of_all(draw):
    with pytest.raises(UserError, match=r"patch=\[400, 60\] lies outside of every image"):
        draw(sharp_backbone(), patch=[400, 60])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images=own/*.tif"], "no file fits"),
        (["images=empty"], "images=empty"),
        (["images=17"], "images=17: no file fits"),
        (["images=[own/broken.png,own/text.jpg]"], "the first, own/broken.png"),
        (["kinds=[attention,pictures]"], "some of attention, pca, channels, neighbours"),
        (["ckpt=nowhere"], "no such file or run folder"),
        (["ckpt=own"], "without checkpoints"),
        (["ckpt=[run,run]"], "named twice"),
        (["ckpt=own/0.png"], "not a PyTorch file"),
        (["over_time=true", "ckpt=[run,own]"], "one run folder"),
        (["model=xcit_nano_12_p16"], "not xcit_nano_12_p16"),
        (["size=7"], "at least the patch, 8"),
        (["device=cuda:9"], "try device=cpu"),
        (["out=own/0.png"], "name a folder"),
    ],
)
def test_wrong_input_is_answered_in_a_line(inside, refused, words, said):
    Path("empty").mkdir(exist_ok=True)
    refused(said, "visualize", "ckpt=run", "images=own/0.png", *words)


def test_a_real_run_over_time(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    words = ["over_time=true", "images=own/coffee/00.png", "num_workers=0", "cache=false"]
    words += ["eval_data=folder", "eval_data.root=own", "eval_data.resize=32", "eval_data.size=32"]
    kinds = "kinds=[attention,pca,channels,neighbours,prototypes]"
    assert run("visualize", "ckpt=runs/with", kinds, *words) == 0
    found = numbers("runs/with/visualize")["results"]
    steps = [p.stem for p in sorted(Path("runs/with/checkpoints").glob("step-*.ckpt"))]
    assert list(found) == steps
    assert len(steps) > 1
    for each in found.values():
        assert set(each) == {"attention", "pca", "channels", "neighbours", "prototypes"}
        assert 1 <= each["prototypes"]["effective"] <= 32
        assert sum(p["share"] for p in each["prototypes"]["largest"]) <= 1
    grids = {f"{kind}/{step}.png" for kind in ("neighbours", "prototypes") for step in steps}
    assert grids <= set(links("runs/with/visualize"))


def test_images_are_found_and_thinned(tmp_path):
    images(tmp_path / "a" / "deep", 9)
    files, count = image_paths(str(tmp_path / "**" / "*.png"), 4)
    assert count == 9
    assert [f.name for f in files] == ["0.png", "3.png", "5.png", "8.png"]
    both = [str(tmp_path / "a"), str(tmp_path / "a" / "deep" / "0.png")]
    assert image_paths(both, 40)[1] == 9  # each once
    photos, _ = image_paths(None, 40)
    assert {"astronaut", "flower"} <= {f.stem for f in photos}
    odd = tmp_path / "odd [1].png"
    odd.write_bytes((tmp_path / "a/deep/0.png").read_bytes())
    assert image_paths(str(odd), 40)[0] == [odd]
    with pytest.raises(MissingPath, match="pattern in quotes"):
        image_paths(str(tmp_path / "*.gif"), 4)
    with pytest.raises(UserError, match="null"):
        image_paths([], 4)


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
    assert plain_names(["a", "A", "a b", "ä/..", "", "channels"], ["channels"]) == [
        "a", "A-2", "a_b", "image", "image-2", "channels-2",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [64, 100, None])
@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("sides", [(64, 96), (100, 37), (8, 500), (720, 1280), (3, 3), (161, 80)])
def test_sides_are_multiples_of_the_patch(size, patch, sides):
    fitted, _ = fitted_sides(*sides, size, patch)
    scale = 1.0 if size is None else min(1.0, size / max(sides))
    for side, was in zip(fitted, sides, strict=True):
        assert side % patch == 0
        assert size is None or side <= size
        assert abs(side - max(patch, was * scale)) <= patch


def test_an_image_is_read_at_fitted_sides(tmp_path):
    images(tmp_path, 1, (37, 300))
    pixels, sides = read_fitted(tmp_path / "0.png", RGB, 100, 8)
    assert sides == (37, 300)
    assert pixels.shape[:2] == fitted_sides(37, 300, 100, 8)[0]


def test_a_disk_that_is_full(here, monkeypatch, capsys):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("ssl_xcit.eval.viz.album.write_png", full)
    assert run("visualize", "ckpt=run", "out=pictures") == 1
    assert "pictures cannot be written ([Errno 28] No space left" in capsys.readouterr().err
