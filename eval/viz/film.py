"""Paint attention or principal components over the frames of a video, in colours that mean the same
in every frame.

Each frame by itself would flicker: components change order and sign, and a range of colours of its
own makes a flat map look like a sharp one. So frames sampled evenly from the whole video decide the
components and ranges first; then every frame is drawn by itself. The same frame has the same
colours at any time, and nothing is smoothed.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.training.memory import is_out_of_memory
from ssl_xcit.utils.files import replacing
from ssl_xcit.utils.terminal import track

from ..features.extractor import FeatureExtractor
from ..tasks.masks import finite
from . import attention, patches
from .attention import AttentionPass
from .dataset import evenly_spaced
from .pictures import BRIGHTEST, Picture, enlarged, overlay, stretched, visible
from .video_reader import Clip, Frame, Video
from .video_writer import Mp4Writer, PngWriter

log = logging.getLogger(__name__)
NUM_PATCHES = 512  # of a sampled frame, whose scores decide the range of colours


@runtime_checkable
class Paint(Protocol):
    """Draws frames, after samples have decided what colours mean."""

    def add_sample(self, output: AttentionPass) -> None:
        """Add a batch of one or more samples."""
        ...

    def fit(self) -> None:
        """Decide what colours mean, after the last sample."""
        ...

    def draw(self, picture: Picture, output: AttentionPass, i: int) -> Picture:
        """The picture of frame i of a batch."""
        ...


class AttentionPaint:
    """Draws class attention over the frame; all frames share one range of colours, from the least
    weight of the samples to their 0.995 quantile.

    Args:
        block: 1 or 2.
        head: from 1; None: the mean of the heads.
        strength: of the colours over the frame.
    """

    def __init__(self, block: int, head: int | None, strength: float):
        self.block, self.head, self.strength = block, head, strength
        self.values: list[np.ndarray] = []
        self.low = self.high = 0.0

    def maps(self, output: AttentionPass) -> Float[np.ndarray, "B h w"]:
        """The weights of the chosen head, or the mean."""
        heads = output.attention[:, self.block - 1]
        chosen = heads.mean(dim=1) if self.head is None else heads[:, self.head - 1]
        return chosen.cpu().numpy()

    def add_sample(self, output: AttentionPass) -> None:
        """See `Paint`."""
        self.values.append(self.maps(output).ravel())

    def fit(self) -> None:
        """See `Paint`."""
        values = np.concatenate(self.values)
        self.low, self.high = float(values.min()), float(np.quantile(values, BRIGHTEST))
        self.values = []

    def draw(self, picture: Picture, output: AttentionPass, i: int) -> Picture:
        """See `Paint`."""
        scaled = stretched(self.maps(output)[i], self.low, self.high)
        return overlay(picture, enlarged(scaled, *picture.shape[:2]), self.strength)


class ComponentsPaint:
    """Draws the first three principal components of the samples' patches as red, green and blue;
    all frames share the components and their ranges.

    Of the samples only sums are kept, and a fixed number of patches each.
    """

    def __init__(self, dim: int):
        self.moments = patches.Moments(dim)
        self.random = np.random.default_rng(0)
        self.samples: list[Tensor] = []

    def add_sample(self, output: AttentionPass) -> None:
        """See `Paint`."""
        for features in output.patches:
            rows = features.flatten(1).mT.cpu()
            self.moments.add(rows)
            some = self.random.permutation(len(rows))[:NUM_PATCHES]
            self.samples.append(rows[torch.from_numpy(some)])

    def fit(self) -> None:
        """See `Paint`."""
        self.components = self.moments.components()
        scores = patches.scores_of(torch.cat(self.samples), self.components).numpy()
        self.low, high = np.quantile(scores, patches.CLIPPED, axis=0)
        self.width = np.maximum(high - self.low, 1e-12)
        self.samples = []

    def draw(self, picture: Picture, output: AttentionPass, i: int) -> Picture:
        """See `Paint`."""
        h, w = output.patches.shape[2:]
        scores = patches.scores_of(output.patches[i].flatten(1).mT, self.components).numpy()
        colours = ((scores - self.low) / self.width).clip(0.0, 1.0).reshape(h, w, -1)
        size = (picture.shape[1], picture.shape[0])
        smooth = cv2.resize(colours.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        return np.rint(smooth * 255).astype(np.uint8)


class FilmOptions(NamedTuple):
    """How a film is made."""

    video: str  # as it was named, for messages
    samples: int  # frames that decide what colours mean
    side_by_side: bool  # the frame itself on the left


def fit_colours(options: FilmOptions, extractor: FeatureExtractor, clip: Clip, paint: Paint) -> int:
    """Decide colours by frames from the whole clip; about how many frames it has.

    Raises:
        UserError: no frame that is sampled can be read.
    """
    total = clip.expected()
    places = evenly_spaced(total, options.samples)
    frames = track(clip.frames(set(places)), "settling colours", len(places), extractor.show)
    count = 0
    for batch, output in forward_frames(options, extractor, frames):
        paint.add_sample(output)
        count += len(batch)
    if not count:
        reason = f"; {clip.problems[0]}" if clip.problems else ""
        raise UserError(f"video={options.video}: no frame that is sampled can be read{reason}")
    paint.fit()
    return max(clip.count, count) if isinstance(clip, Video) else total


def forward_frames(
    options: FilmOptions, extractor: FeatureExtractor, frames: Iterable[Frame]
) -> Iterator[tuple[list[Frame], AttentionPass]]:
    """Frames in batches, with the backbone's pass over them.

    Raises:
        UserError: the memory does not suffice.
        RunFailed: features that are not finite.
    """
    for batch in in_batches(frames, extractor.batch_size):
        try:
            with extractor.inference() as backbone:
                output = attention.forward(backbone, extractor.images(*(f.pixels for f in batch)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            height, width, _ = batch[0].pixels.shape
            less = (
                f"batch_size={len(batch) // 2}"
                if len(batch) > 1
                else f"size={max(height, width) // 2}"
            )
            raise UserError(
                f"not enough memory for {len(batch)} frames of {width} x {height}: try {less}"
            ) from error
        finite(output.patches, Path(options.video))
        finite(output.attention, Path(options.video))
        yield batch, output


def in_batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of so many frames, the last of fewer."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def write_film(
    options: FilmOptions,
    extractor: FeatureExtractor,
    clip: Clip,
    paint: Paint,
    out: Path,
    total: int,
) -> tuple[int, int]:
    """Draw and write every frame; how many there were, and how many ticks they last.

    A film has its name when it is whole. Ctrl-C leaves what is done as `NAME.part.mp4`, which
    plays.
    """
    writer: Mp4Writer | PngWriter
    with ExitStack() as stack:
        if as_pngs := out.suffix.lower() != ".mp4" or out.is_dir():
            writer = PngWriter(out)
        else:
            part, (height, width) = stack.enter_context(replacing(out)), clip.sides
            sides = (height, width * (1 + options.side_by_side))
            writer = Mp4Writer(part, sides, clip.rate, clip.time_base)
            stack.callback(writer.close)
        end, frames = 0, track(clip.frames(), "film", total, extractor.show)
        try:
            for batch, output in forward_frames(options, extractor, frames):
                for i, frame in enumerate(batch):
                    picture = visible(frame.pixels)
                    drawn = paint.draw(picture, output, i)
                    if options.side_by_side:
                        drawn = np.concatenate((picture, drawn), axis=1)
                    writer.add(drawn, frame.time, frame.duration)
                    end = frame.time + frame.duration
            writer.finish()
        except KeyboardInterrupt:
            if as_pngs:
                log.warning("%s has %d of %d frames", out, writer.count, total)
            elif writer.count:
                writer.finish()
                unfinished = part.replace(out.with_name(f"{out.stem}.part.mp4"))
                log.warning("%s has the first %d of %d frames", unfinished, writer.count, total)
            raise
    return writer.count, end
