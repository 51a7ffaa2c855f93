"""Read frames: video files and folders of frames behind one small protocol.

PyAV (bindings of FFmpeg's libraries) reads videos; it is imported where it is needed, for only
films need it. Frames are read one after another, so memory does not grow with their number. Times
are whole ticks of a time base and go through unchanged, also where frames are unevenly spaced.
"""

import re
from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.folders import image_files
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import MissingPath, UserError

from ..tasks.masks import resize_image
from .pictures import fitted_sides, read_fitted

LEAST_MISSING = 1.0  # seconds by which a film without a count of frames is called cut short


class Frame(NamedTuple):
    """A frame of a clip."""

    pixels: Pixels
    time: int  # ticks from the first frame
    duration: int  # ticks


@runtime_checkable
class Clip(Protocol):
    """Frames that can be gone through again and again.

    Attributes:
        sides: height and width of every frame, multiples of the patch.
        time_base: seconds of a tick.
        rate: frames a second, on average.
        count: frames of the last time.
        problems: what was wrong with it the last time.
    """

    sides: tuple[int, int]
    time_base: Fraction
    rate: Fraction
    count: int
    problems: list[str]

    def expected(self) -> int:
        """About how many frames there are, without decoding any."""
        ...

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[Frame]:
        """All of them, or those at some places; from the start, once more each time."""
        ...


class Selection(NamedTuple):
    """Which frames of a clip are wanted, and how large."""

    size: int | None  # long side in pixels, at most; None: as it is
    every: int  # of so many frames one is taken
    max_seconds: float | None  # what comes later is left out; None: nothing


def pyav() -> Any:
    """The library; raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"films need PyAV ({error}): pip install 'ssl-xcit[video]'; out=FOLDER and "
            "video=FOLDER_OF_FRAMES do without"
        ) from error
    return av


class Video:
    """The first picture stream of a video file.

    Frames that cannot be decoded are left out; where the file breaks off the clip ends.

    Args:
        path: the file.
        preprocess: channels of the pixels, and how many pixels a frame may have.
        patch: of the network.
        selection: which frames, how large.

    Raises:
        MissingPath: no such file.
        UserError: no video, no frame in it, or too large ones.
    """

    def __init__(self, path: Path, preprocess: Preprocess, patch: int, selection: Selection):
        self.av = pyav()
        self.path = path
        self.preprocess = preprocess
        self.selection = selection
        self.count = 0
        self.problems: list[str] = []
        if preprocess.channels not in (1, 3):
            raise UserError(
                f"video={path}: frames have 3 channels, and the model {preprocess.channels}"
            )
        with self.opened() as container:
            stream = container.streams.video[0]
            self.time_base: Fraction = stream.time_base
            self.rate: Fraction = stream.average_rate or stream.guessed_rate or Fraction(25)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > preprocess.max_pixels:
                raise UserError(
                    f"video={path}: frames of {width} x {height}, more than "
                    f"{preprocess.max_pixels:,} pixels; max_pixels=... takes them"
                )
            aspect = stream.sample_aspect_ratio or Fraction(1)
            first = next(self.decoded(container), None)
            if first is None:
                raise UserError(f"video={path}: not one frame can be decoded; is it whole?")
        self.turns = round(first.rotation / 90) % 4  # a quarter each, to the left
        shape = (first.height, round(first.width * aspect))
        height, width = shape[::-1] if self.turns % 2 else shape
        self.sides, _ = fitted_sides(height, width, selection.size, patch)
        self.tick = max(1, round(1 / (self.rate * self.time_base)))  # of a frame without duration
        self.rate = self.rate / selection.every

    def opened(self) -> Any:
        """The container; raises UserError where it is none with pictures."""
        try:
            container = self.av.open(str(self.path))
        except FileNotFoundError as error:
            raise MissingPath(f"video={self.path}: no such file or folder") from error
        except (self.av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"video={self.path}: not a video, or cut short ({reason}); name a video file or a "
                "folder of frames"
            ) from error
        if not container.streams.video:
            container.close()
            raise UserError(f"video={self.path}: sound without pictures; name a video file")
        stream = container.streams.video[0]
        if stream.codec_context is None or not stream.time_base:
            container.close()
            raise UserError(f"video={self.path}: not a video, or cut short (an unknown codec)")
        stream.thread_type = "AUTO"
        return container

    def packets(self, container: Any) -> Iterator[Any]:
        """As far as the file goes; those with content are counted."""
        self.num_packets = self.undecodable = 0
        self.broken = ""
        try:
            for packet in container.demux(container.streams.video[0]):
                self.num_packets += packet.size > 0
                yield packet
        except (self.av.error.FFmpegError, OSError) as error:
            self.broken = f"; it breaks off ({error.strerror})"

    def decoded(self, container: Any) -> Iterator[Any]:
        """Frames as the library has them; what cannot be decoded is left out."""
        for packet in self.packets(container):
            try:
                frames = packet.decode()
            except self.av.error.FFmpegError:
                self.undecodable += 1
                continue
            yield from frames

    def expected(self) -> int:
        """Packets, which are read and not decoded."""
        with self.opened() as container:
            times = [packet.pts for packet in self.packets(container) if packet.size]
        first = min((time for time in times if time is not None), default=0)  # a recording's clock
        wanted = [
            time for time in times if not self.late((first if time is None else time) - first)
        ]
        return max(1, -(-len(wanted) // self.selection.every))

    def late(self, time: int) -> bool:
        """Whether a tick lies behind what is wanted."""
        most = self.selection.max_seconds
        return most is not None and float(time * self.time_base) >= most

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[Frame]:
        """See `Clip`."""
        self.problems, self.count = [], 0
        first = last = None
        end = seen = 0
        with self.opened() as container:
            stream = container.streams.video[0]
            for seen, frame in enumerate(self.decoded(container), start=1):
                time = frame.pts
                if time is None:
                    time = self.tick * (seen - 1) + (first or 0)
                first = time if first is None else first
                time -= first
                if last is not None and time <= last:  # some files step back
                    time = last + 1
                last = time
                if self.late(time):
                    return
                duration = frame.duration or self.tick
                end = time + duration
                if (seen - 1) % self.selection.every:
                    continue
                place, self.count = self.count, self.count + 1
                if wanted is None or place in wanted:
                    yield Frame(self.pixels(frame), time, duration * self.selection.every)
            self.judge(stream.frames, container.duration, seen, float(end * self.time_base))

    def judge(self, frames: int, duration: int | None, seen: int, seconds: float) -> None:
        """Say what is missing of what the file promises.

        Args:
            frames: by the header; 0 where it does not say.
            duration: likewise, in microseconds.
            seen: frames that could be decoded.
            seconds: how long they last.
        """
        announced = (duration or 0) / 1e6
        if self.undecodable or self.broken or self.num_packets < frames:
            total = max(frames, self.num_packets)
            self.problems.append(
                f"{self.path}: {seen} of {total} frames could be decoded{self.broken}"
            )
        elif not frames and announced - seconds > max(LEAST_MISSING, 0.05 * announced):
            self.problems.append(
                f"{self.path}: {seen} frames, {seconds:.1f} s of the announced {announced:.1f} s"
            )

    def pixels(self, frame: Any) -> Pixels:
        """Upright, at the clip's size."""
        height, width = self.sides[::-1] if self.turns % 2 else self.sides
        pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        pixels = np.ascontiguousarray(np.rot90(pixels, self.turns))
        if self.preprocess.channels == 1:
            return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
        return pixels


class Frames:
    """Image files of a folder in their natural order (2 before 10), a frame each.

    The first that can be read decides the size, which others are brought to. One that cannot be
    read is left out, and the one before stays longer.

    Args:
        folder: with images, also below.
        preprocess: from files to pixels.
        patch: of the network.
        selection: which frames, how large.
        rate: frames a second.

    Raises:
        MissingPath: no images there.
        UserError: none can be read.
    """

    def __init__(
        self, folder: Path, preprocess: Preprocess, patch: int, selection: Selection, rate: Fraction
    ):
        try:
            names = sorted(image_files(folder), key=natural_key)
        except MissingPath as error:  # which calls it root
            raise MissingPath(str(error).replace("root=", "video=", 1)) from error
        self.preprocess = preprocess
        self.size, self.patch = selection.size, patch
        self.rate, self.time_base = rate / selection.every, 1 / rate
        self.every = selection.every
        most = selection.max_seconds
        count = len(names) if most is None else min(len(names), max(1, round(float(most * rate))))
        self.files = [folder / name for name in names[:count]][:: selection.every]
        self.count = 0
        self.problems: list[str] = []
        reason = ""
        for file in self.files:
            try:
                pixels, self.shape = read_fitted(file, preprocess, self.size, patch)
            except BadImage as error:
                reason = reason or f"{file}: {error}"
                continue
            self.sides = (pixels.shape[0], pixels.shape[1])
            return
        raise UserError(f"video={folder}: none of {len(self.files)} frames can be read; {reason}")

    def expected(self) -> int:
        """Files."""
        return len(self.files)

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[Frame]:
        """See `Clip`; of a folder only the wanted files are read."""
        self.problems, self.count = [], 0
        fitted = []
        for place, file in enumerate(self.files):
            if wanted is not None and place not in wanted:
                continue
            try:
                pixels, shape = read_fitted(file, self.preprocess, self.size, self.patch)
            except BadImage as error:
                self.problems.append(f"{file} is left out: {error}")
                continue
            if shape != self.shape:
                fitted.append(file)
            self.count += 1
            yield Frame(resize_image(pixels, *self.sides), place * self.every, self.every)
        if fitted:
            height, width = self.shape
            self.problems.append(
                f"{len(fitted)} frames are not {width} x {height} as the first and were brought to "
                f"its size, starting with {fitted[0]}"
            )


def natural_key(name: str) -> list[Any]:
    """For sorting: runs of digits by their value."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)] + [name]
