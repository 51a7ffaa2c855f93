"""`ssl-xcit film`: what the frames show, their times and colours, and what damaged or wrong input
leads to. Films are decoded again; errors are those of two compressions.
"""

import itertools
import shutil
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from av.video.stream import VideoStream
from commands import run
from overlays import P, close, overlaid
from PIL import Image
from sklearn.decomposition import PCA
from tiny_run import sharp_backbone

from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.eval.viz import attention
from ssl_xcit.eval.viz.video import Selection, Video, natural_key

H, W = 64, 96
TIMES = [0, 40, 60, 140, 180, 380, 420, 460, 500, 540]  # milliseconds


def pan(count=10):
    """A window that moves over a photograph and comes back: the last frame is the first."""
    photograph = Image.open(dict(photographs())["astronaut"]).convert("RGB").resize((256, 256))
    lefts = [12 * min(i, count - 1 - i) for i in range(count)]
    return [np.asarray(photograph.crop((x, 2 * x, x + W, 2 * x + H))) for x in lefts]


def write(path, frames, times=None, turn=None, faststart=False):
    """An H.264 file with times in milliseconds, nearly without loss."""
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "g": "5"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn is not None:
            stream.set_display_rotation(turn)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 40 * i if times is None else times[i]
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read(path):
    """Pixels and times in milliseconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pixels = np.stack([f.to_ndarray(format="rgb24").astype(float) for f in frames])
    return pixels, [round(1000 * float(f.time)) for f in frames]


def seen(frames):
    """Mean attention (N, h, w) and patch features (N, h * w, C), one frame at a time."""
    backbone = sharp_backbone(0)
    maps, features = [], []
    for pixels in frames:
        x = normalise(torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            maps.append(backbone.attention(x)[0].numpy())
            features.append(backbone.forward_features(x).patches[0].flatten(1).T.numpy())
    return np.stack(maps), np.stack(features)


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="session")
def walk(tmp_path_factory):
    """A video."""
    file = tmp_path_factory.mktemp("walk") / "walk.mp4"
    write(file, pan(), TIMES)
    return file


@pytest.fixture
def clip(here, walk):
    shutil.copy(walk, here)
    return read("walk.mp4")[0]


FILM = ["film", "ckpt=net.pth"]


def shoot(*words):
    return run(*FILM, *words)


def test_attention_with_the_times_of_the_video(clip, capsys):
    assert shoot("video=walk.mp4", "batch_size=3") == 0
    said = capsys.readouterr().out
    assert "written: film/walk-attention.mp4, 10 frames of 96 x 64, 0.6 s" in said
    got, times = read("film/walk-attention.mp4")
    assert times == TIMES
    with av.open("film/walk-attention.mp4") as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.colorspace == 1  # BT.709, as the pixels are
    maps = seen(clip)[0]
    close(got, overlaid(clip, maps.mean(1)))
    assert not list(Path("film").glob(".*"))
    assert shoot("video=walk.mp4", "head=3", "block=2", "overlay=0.65", "out=three.mp4") == 0
    close(read("three.mp4")[0], overlaid(clip, maps[:, 2]))


def test_components_of_the_whole_video(clip, monkeypatch):
    """No more passes are alive than that of a batch and the one before."""
    alive, most, real = weakref.WeakSet(), [], attention.forward

    def forward(backbone, x):
        output = real(backbone, x)
        alive.add(output.patches)
        most.append(len(alive))
        return output

    monkeypatch.setattr(attention, "forward", forward)
    assert shoot("video=walk.mp4", "kind=pca", "out=pca.mp4", "batch_size=2") == 0
    assert len(most) == 10
    assert max(most) <= 2
    got, times = read("pca.mp4")
    assert times == TIMES
    features = seen(clip)[1]
    rows = features.reshape(-1, features.shape[-1]).astype(float)
    found = PCA(3).fit(rows)
    axes = found.components_
    signs = np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])
    scores = found.transform(rows) * signs
    low, high = np.quantile(scores, (0.01, 0.99), axis=0)
    expected = 255 * ((scores - low) / (high - low)).clip(0, 1)
    close(got, expected.reshape(len(clip), H // P, W // P, 3), 20.0)


@pytest.mark.parametrize("kind", ["attention", "pca"])
def test_the_same_frame_has_the_same_colours_at_any_time(kind):
    """Between two equal frames stand others that have stronger maps; black frames around."""
    frames = pan(12)
    dark = [np.full_like(frames[0], 9)] * 2
    write("clip.mp4", [*frames[:1], *dark, *frames, *dark, *frames[:1]])
    assert shoot("video=clip.mp4", f"kind={kind}", "out=a.mp4", "samples=5", "batch_size=2") == 0
    got, _ = read("a.mp4")
    same = [0, 3, 14, 17]  # pan's last is its first
    assert np.abs(got[same] - got[0]).mean((1, 2, 3)).max() < 4
    assert np.abs(got[8] - got[0]).mean() > 8  # and others differ


def test_side_by_side_and_a_selection_of_frames(clip):
    words = ["side_by_side=true", "every=2", "max_seconds=0.4", "size=48", "out=both.mp4"]
    assert shoot("video=walk.mp4", *words) == 0
    got, times = read("both.mp4")
    assert times == [0, 60, 180]
    assert got.shape == (3, 32, 96, 3)
    small = [Image.fromarray(f.astype(np.uint8)).resize((48, 32)) for f in clip[[0, 2, 4]]]
    assert np.abs(got[:, :, :48] - np.stack(small)).mean() < 6


@pytest.mark.skipif(
    not hasattr(VideoStream, "set_display_rotation"),
    reason="PyAV writes turned videos since 17.1",
)
@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_video_that_is_to_be_turned(turn):
    frames = pan(3)
    write("turned.mp4", frames, turn=turn)
    assert shoot("video=turned.mp4", "side_by_side=true", "out=up.mp4") == 0
    got, _ = read("up.mp4")
    upright = np.rot90(np.stack(frames), turn // 90, axes=(1, 2))
    assert got.shape[1:3] == (upright.shape[1], 2 * upright.shape[2])
    assert np.abs(got[:, :, : upright.shape[2]] - upright).mean() < 6


def test_frames_of_a_folder(capsys):
    folder = Path("frames")
    folder.mkdir()
    frames = pan(12)
    for i, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"f{i}.png")
    (folder / "f5.png").write_bytes(b"no image")
    Image.fromarray(frames[7]).resize((48, 32)).save(folder / "f7.png")
    (folder / "notes.txt").write_text("no frame")
    assert shoot("video=frames", "fps=10", "side_by_side=true", "out=f.mp4") == 0
    error = capsys.readouterr().err
    assert "frames/f5.png is left out" in error
    assert "1 frames are not 96 x 64 as the first" in error
    assert "starting with frames/f7.png" in error
    got, times = read("f.mp4")
    assert times == [100 * i for i in range(12) if i != 5]  # f10 behind f9
    expected = np.stack([f for i, f in enumerate(frames) if i != 5])
    assert np.abs(got[:, :, :W] - expected).mean((1, 2, 3)).max() < 12  # one of them enlarged
    assert sorted(["f10", "f9", "F1", "f1"], key=natural_key) == ["F1", "f1", "f9", "f10"]


def test_pngs_and_no_pyav(clip, monkeypatch, capsys, refused):
    for folder in ("frames", "pictures"):
        Path(folder).mkdir()
    for i, pixels in enumerate(clip[:4]):
        Image.fromarray(pixels.astype(np.uint8)).save(f"frames/{i}.png")
    Path("pictures/frame-000009.png").write_bytes(b"of an earlier film")
    Path("pictures/frame.png").write_bytes(b"somebody's")
    refused("no film has left there", *FILM, "video=frames", "out=pictures")
    assert Path("pictures/frame-000009.png").is_file()
    Path("pictures/.film").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    assert shoot("video=frames", "out=pictures") == 0
    assert "4 frames of 96 x 64, 0.2 s" in capsys.readouterr().out
    names = sorted(f.name for f in Path("pictures").glob("[!.]*"))
    assert names == [*(f"frame-00000{i}.png" for i in (1, 2, 3, 4)), "frame.png"]
    got = np.stack([np.asarray(Image.open(f"pictures/{name}"), float) for name in names[:4]])
    close(got, overlaid(clip[:4], seen(clip[:4])[0].mean(1)))
    for words in (["video=walk.mp4"], ["video=frames", "out=x.mp4"]):
        refused("pip install 'ssl-xcit[video]'", *FILM, *words)


def test_damaged_videos(capsys, refused):
    frames = np.stack(pan(40))
    write("whole.mp4", frames, faststart=True)
    content = Path("whole.mp4").read_bytes()
    middle = len(content) // 2
    Path("cut.mp4").write_bytes(content[: len(content) * 6 // 10])
    Path("hole.mp4").write_bytes(content[:middle] + bytes(1500) + content[middle + 1500 :])
    for name, most in (("cut", 6), ("hole", 12)):  # versions conceal what is missing otherwise
        assert shoot(f"video={name}.mp4", "side_by_side=true", f"out={name}-film.mp4") == 0
        got, times = read(f"{name}-film.mp4")
        assert 10 < len(got) < 40
        assert f"{name}.mp4: {len(got)} of 40 frames could be decoded" in capsys.readouterr().err
        kept = np.array(times)[:-2] // 40
        assert np.abs(got[:-2, :, :W] - frames[kept]).mean() < most
    write("behind.mp4", pan(10))  # whose index stands at its end
    Path("behind.mp4").write_bytes(Path("behind.mp4").read_bytes()[:-500])
    refused("not a video, or cut short", *FILM, "video=behind.mp4")


@pytest.mark.parametrize("film_frames", [4, 0])
def test_ctrl_c_leaves_what_is_done_as_a_film(clip, monkeypatch, capsys, film_frames):
    real, calls = attention.forward, itertools.count()

    def forward(*args):
        if next(calls) == 2 + film_frames:  # two samples of one frame each
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(attention, "forward", forward)
    Path("a.mp4").write_bytes(b"an earlier film")
    assert shoot("video=walk.mp4", "out=a.mp4", "batch_size=1", "samples=2") == 130
    said = "a.part.mp4 has the first 4 of 10 frames" in capsys.readouterr().err
    assert said == Path("a.part.mp4").exists() == bool(film_frames)
    if film_frames:
        assert read("a.part.mp4")[1] == TIMES[:4]
    assert Path("a.mp4").read_bytes() == b"an earlier film"
    assert not list(Path().glob(".*"))


def test_no_room_on_the_disk_or_in_memory(clip, monkeypatch, capsys, refused):
    Path(".a.mp4.part").symlink_to("/dev/full")
    assert shoot("video=walk.mp4", "out=a.mp4") == 1
    assert "a.mp4 cannot be written ([Errno 28]" in capsys.readouterr().err
    assert not list(Path().glob("*a.mp4*"))
    no_memory = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(attention, "forward", Mock(side_effect=no_memory))
    refused("8 frames of 96 x 64: try batch_size=4", *FILM, "video=walk.mp4")


def test_seconds_count_from_the_first_frame_of_a_recording():
    write("late.ts", pan(), [3_600_000 + 40 * i for i in range(10)])
    clip = Video(Path("late.ts"), Selection(RGB, P, 64, 1, 0.2))
    assert clip.total == len(list(clip.frames())) == 5


@pytest.fixture(scope="session")
def wrong(tiny, walk, tmp_path_factory):
    """Weights, the video, and files that are none."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copy(walk, folder)
    shutil.copy(tiny / "net.pth", folder)
    (folder / "text.mp4").write_text("no video")
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad/0.png").write_bytes(b"no image")
    with av.open(str(folder / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["video=nowhere.mp4"], "no such file or folder"),
        (["video=text.mp4"], "not a video"),
        (["video=sound.m4a"], "sound without pictures"),
        (["video=empty"], "video=empty: no images in it"),
        (["video=bad"], "none of 1 frames can be read; bad/0.png"),
        (["max_pixels=100"], "more than 100 pixels"),
        (["kind=mask"], "attention or pca"),
        (["head=5"], "heads 1 to 4"),
        (["size=7"], "at least the patch, 8"),
        (["device=cuda:9"], "try device=cpu"),
        (["ckpt=nowhere"], "no such file or run folder"),
        (["model=xcit_nano_12_p16"], "not xcit_nano_12_p16"),
        (["out=walk.mp4"], "that is the video itself"),
        (["out=film.avi"], "ending in .mp4"),
        (["out=net.pth/a.mp4"], "no folder to write to"),
    ],
)
def test_wrong_input_is_answered_in_a_line(wrong, monkeypatch, refused, words, said):
    monkeypatch.chdir(wrong)
    refused(said, *FILM, "video=walk.mp4", *words)
    assert not Path("film").exists()
