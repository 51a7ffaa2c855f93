"""Read and write frames: videos with PyAV (bindings of FFmpeg's libraries), and folders of images.

Frames are read one after another. Times are whole ticks of a time base and go through unchanged.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ssl_xcit.data.folders import image_files
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import MissingPath, UserError

from ..tasks.masks import resize_image
from .pictures import fitted_sides, read_fitted, write_png

BT709, LIMITED = 1, 1  # code points of ITU-T H.273; 16..235
QUALITY = {"crf": "18", "preset": "veryfast"}  # of x264; 18 is hardly told from the original
NOTE = ".film"  # in a folder of frames that a film has left


class Frame(NamedTuple):
    """A frame of a clip, or what is drawn of it."""

    pixels: Pixels
    time: int  # ticks from the first frame
    duration: int  # ticks


class Selection(NamedTuple):
    """Which frames of a clip are wanted, and as what."""

    preprocess: Preprocess  # channels of the pixels, and how many pixels a frame may have
    patch: int  # of the network
    size: int | None  # long side in pixels, at most; None: as it is
    every: int  # of so many frames one is taken
    max_seconds: float  # what comes later is left out


class Video:
    """The first picture stream of a video file, to be gone through again and again.

    Frames that cannot be decoded are left out. `sides`: height and width of each, multiples of the
    patch; `time_base`: seconds of a tick; `rate`: frames a second, on average; `total`: about how
    many there are; `problems`: what was wrong the last time.
    """

    def __init__(self, path: Path, selection: Selection):
        self.av, self.path, self.every = pyav(), path, selection.every
        channels, most = selection.preprocess.channels, selection.preprocess.max_pixels
        if channels not in (1, 3):
            raise UserError(f"video={path}: frames have 3 channels, and the model {channels}")
        self.format = "gray" if channels == 1 else "rgb24"
        with self.opened() as container:
            stream = container.streams.video[0]
            rate: Fraction = stream.average_rate or stream.guessed_rate or Fraction(25)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > most:
                size = f"{width} x {height}, more than {most:,} pixels"
                raise UserError(f"video={path}: frames of {size}; max_pixels=... takes them")
            self.time_base: Fraction = stream.time_base
            self.promised, self.announced = stream.frames, (container.duration or 0) / 1e6
            first = next(self.decoded(container), None)
            if first is None:
                raise UserError(f"video={path}: not one frame can be decoded; is it whole?")
            shape = (first.height, round(first.width * (stream.sample_aspect_ratio or 1)))
        self.turns = round(first.rotation / 90) % 4  # a quarter each, to the left
        height, width = shape[::-1] if self.turns % 2 else shape
        self.sides, _ = fitted_sides(height, width, selection.size, selection.patch)
        self.rate, self.limit = rate / self.every, selection.max_seconds / self.time_base
        self.tick = max(1, round(1 / (rate * self.time_base)))  # of a frame without duration
        times: list[int] = []  # headers often lie
        with self.opened() as container, suppress(self.av.error.FFmpegError, OSError):
            times.extend(packet.pts or 0 for packet in container.demux(video=0) if packet.size)
        start = min(times, default=0)
        self.total = max(1, ceil(sum(time - start < self.limit for time in times) / self.every))

    def opened(self) -> Any:
        """The container; raises UserError where it is none with pictures."""
        reason: Any = "sound without pictures, or of an unknown codec"
        try:
            container = self.av.open(str(self.path))
            stream = next(iter(container.streams.video), None)
            if stream is not None and stream.codec_context is not None and stream.time_base:
                stream.thread_type = "AUTO"
                return container
        except FileNotFoundError as error:
            raise MissingPath(f"video={self.path}: no such file or folder") from error
        except (self.av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"video={self.path}: not a video, or cut short ({reason}); name a video file or a "
            "folder of frames"
        )

    def decoded(self, container: Any) -> Iterator[Any]:
        """Frames as the library has them, as far as the file goes; packets are counted."""
        self.num_packets, self.num_undecodable, self.broken = 0, 0, ""
        try:
            for packet in container.demux(video=0):
                self.num_packets += packet.size > 0
                try:
                    frames = packet.decode()
                except self.av.error.FFmpegError:
                    self.num_undecodable += 1
                else:
                    yield from frames
        except (self.av.error.FFmpegError, OSError) as error:
            self.broken = f"; it breaks off ({error.strerror})"

    def frames(self, step: int = 1) -> Iterator[Frame]:
        """All of them, or every so many; from the start, once more each time."""
        self.problems: list[str] = []
        start, time, end, count = 0, -1, 0, 0
        with self.opened() as container:
            for count, frame in enumerate(self.decoded(container), start=1):
                start = (frame.pts or 0) if count == 1 else start
                time = max(time + 1, end if frame.pts is None else frame.pts - start)
                if time >= self.limit:
                    return
                duration = frame.duration or self.tick
                end = time + duration
                if (count - 1) % (self.every * step) == 0:
                    yield Frame(self.pixels(frame), time, duration * self.every)
        seconds = float(end * self.time_base)
        short = not self.promised and self.announced - seconds > max(1.0, 0.05 * self.announced)
        if short or self.num_undecodable or self.broken or self.num_packets < self.promised:
            self.problems.append(
                f"{self.path}: {count} of {max(self.promised, self.num_packets)} frames could be "
                f"decoded, {seconds:.1f} of {self.announced:.1f} s{self.broken}"
            )

    def pixels(self, frame: Any) -> Pixels:
        """Upright, at the clip's size."""
        height, width = self.sides[::-1] if self.turns % 2 else self.sides
        fitted = frame.reformat(width, height, self.format, interpolation="BICUBIC").to_ndarray()
        return np.ascontiguousarray(np.rot90(fitted.reshape(height, width, -1), self.turns))


class Frames:
    """Image files of a folder in their natural order (2 before 10), a frame each; see `Video`.

    The first that can be read decides the size, which others are brought to. One that cannot be
    read is left out, and the one before stays longer.
    """

    def __init__(self, folder: Path, selection: Selection, rate: Fraction):
        self.path, self.selection, self.every = folder, selection, selection.every
        self.rate, self.time_base = rate / self.every, 1 / rate
        try:
            names = sorted(image_files(folder), key=natural_key)
        except MissingPath as error:  # which calls it root
            raise MissingPath(str(error).replace("root=", "video=", 1)) from error
        count = max(1, round(min(len(names), selection.max_seconds * rate)))
        self.files = [folder / name for name in names[: count : self.every]]
        self.total, self.sides = len(self.files), (0, 0)  # those of the first
        if next(self.frames(), None) is None:
            raise UserError(
                f"video={folder}: none of {len(self.files)} frames can be read; {self.problems[0]}"
            )

    def frames(self, step: int = 1) -> Iterator[Frame]:
        """See `Video`; files between are not read."""
        preprocess, patch, size, *_ = self.selection
        self.problems: list[str] = []
        fitted = []
        for place, file in list(enumerate(self.files))[::step]:
            try:
                pixels, _ = read_fitted(file, preprocess, size, patch)
            except BadImage as error:
                self.problems.append(f"{file} is left out: {error}")
                continue
            height, width, _ = pixels.shape
            self.sides = self.sides if any(self.sides) else (height, width)
            if (height, width) != self.sides:
                fitted.append(file)
            yield Frame(resize_image(pixels, *self.sides), place * self.every, self.every)
        if fitted:
            self.problems.append(
                f"{len(fitted)} frames are not {self.sides[1]} x {self.sides[0]} as the first and "
                f"were brought to its size, starting with {fitted[0]}"
            )


Clip: TypeAlias = Video | Frames


def natural_key(name: str) -> list[Any]:
    """For sorting: runs of digits by their value."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)] + [name]


def pyav() -> Any:
    """The library; raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"films need PyAV ({error}): pip install 'ssl-xcit[video]'; folders of frames do not"
        ) from error
    # a level, as older torchvisions set, lets decoding threads wait for the interpreter to log
    # while the interpreter waits for them to end
    av.logging.set_level(None)
    return av


def write_mp4(path: Path, clip: Clip, frames: Iterable[Frame]) -> None:
    """Write an H.264 file (yuv420p, BT.709) with the clip's rate and time base. What ends it early,
    as Ctrl-C, leaves a film of the frames so far. Errors of the disk are OSErrors.
    """
    av = pyav()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if "libx264" not in av.codecs_available:
            raise UserError("this PyAV has no libx264, PyPI's has; out=FOLDER makes PNG files")
        stream = container.add_stream("libx264", rate=clip.rate, options=dict(QUALITY))
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base, context.color_range = clip.time_base, LIMITED
        context.color_primaries = context.color_trc = context.colorspace = BT709
        try:
            for pixels, time, duration in frames:
                if not context.is_open:
                    stream.height, stream.width, _ = pixels.shape
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED
                )
                frame.pts, frame.time_base, frame.duration = time, clip.time_base, duration
                container.mux(stream.encode(frame))
        finally:
            if context.is_open:
                container.mux(stream.encode(None))


def frames_in(folder: Path) -> list[Path]:
    """Files of a folder that are named as a film's frames."""
    return [f for f in folder.glob("frame-*.png") if re.fullmatch(r"frame-\d{6,}\.png", f.name)]


def write_pngs(folder: Path, frames: Iterable[Frame]) -> None:
    """Write PNG files `frame-000001.png` in a folder; those of an earlier film are removed."""
    (folder / NOTE).write_text("Its frames are replaced by the next film.\n")
    for file in frames_in(folder):
        file.unlink()
    for number, frame in enumerate(frames, start=1):
        write_png(frame.pixels, folder / f"frame-{number:06d}.png")
