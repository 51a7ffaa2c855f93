"""Write frames: an H.264 film that browsers play, or PNG files.

Colours are converted to BT.709 and the file says so; times go through as whole ticks.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from ssl_xcit.errors import UserError

from .pictures import Picture, write_png
from .video_reader import pyav

BT709, LIMITED = 1, 1  # code points of ITU-T H.273; 16..235
NOTE = ".film"  # in a folder of frames that a film has left
QUALITY = {"crf": "18", "preset": "veryfast"}  # of x264; 18 is hardly told from the original


class Mp4Writer:
    """Write an H.264 file (mp4, yuv420p, BT.709).

    Args:
        path: of any name.
        sides: even height and width.
        rate: frames a second on average.
        time_base: seconds of a tick.

    Raises:
        OSError: the file cannot be written, here and later.
        UserError: this PyAV makes no H.264.
    """

    def __init__(self, path: Path, sides: tuple[int, int], rate: Fraction, time_base: Fraction):
        self.av = pyav()
        self.time_base = time_base
        self.container = self.av.open(
            str(path), "w", format="mp4", options={"movflags": "+faststart"}
        )
        try:
            stream = self.container.add_stream("libx264", rate=rate, options=dict(QUALITY))
        except ValueError as error:
            self.container.close()
            raise UserError(
                "this PyAV was built without libx264: pip install --force-reinstall av has it; "
                "out=FOLDER makes PNG files"
            ) from error
        stream.height, stream.width, stream.pix_fmt = *sides, "yuv420p"
        context = stream.codec_context
        context.time_base = time_base
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED
        self.stream = stream
        self.count = 0
        self.open = True

    def add(self, picture: Picture, time: int, duration: int) -> None:
        """Add a frame, later than the one before."""
        rgb = self.av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = rgb.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
        frame.pts, frame.time_base, frame.duration = time, self.time_base, duration
        with self.as_os_error():
            self.container.mux(self.stream.encode(frame))
        self.count += 1

    def finish(self) -> None:
        """Make the file playable with the frames so far."""
        with self.as_os_error():
            self.container.mux(self.stream.encode(None))
        self.close()

    def close(self) -> None:
        """Close the file, whatever it holds."""
        if self.open:
            self.open = False
            with self.as_os_error():
                self.container.close()

    @contextmanager
    def as_os_error(self) -> Iterator[None]:
        """Raise the library's errors as OSError."""
        try:
            yield
        except self.av.error.FFmpegError as error:
            raise OSError(str(error)) from error


def frames_in(folder: Path) -> list[Path]:
    """Files of a folder that are named as a film's frames."""
    return [f for f in folder.glob("frame-*.png") if re.fullmatch(r"frame-\d{6,}\.png", f.name)]


class PngWriter:
    """Write PNG files `frame-000001.png` in a folder; those of an earlier film are removed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        (folder / NOTE).write_text("Its frames are replaced by the next film.\n")
        for file in frames_in(folder):
            file.unlink()

    def add(self, picture: Picture, time: int, duration: int) -> None:
        """Write the next file."""
        self.count += 1
        write_png(picture, self.folder / f"frame-{self.count:06d}.png")

    def finish(self) -> None:
        """Do nothing: every file is whole already."""
