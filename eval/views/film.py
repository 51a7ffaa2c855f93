"""The command `film`: attention or principal components over a video, in colours that mean the same
in every frame.

Each frame by itself would flicker: components change order and sign, and a range of colours of its
own makes a flat map look like a sharp one. So frames sampled evenly from the whole video are looked
at first, and fix components and ranges; then every frame is drawn by itself. The same frame has the
same colours at any time, and nothing is smoothed.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.files import replacing, writable_folder, writable_or_here, written_to
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say, track
from ssl_xcit.training.memory import is_out_of_memory

from ..frozen import Frozen, placed
from ..masks import finite
from ..run import expected, folder_of
from ..settings import number, switch
from . import attention, patches
from .attention import BRIGHTEST, Looked
from .clips import Clip, Frame, Frames, Selection, Video, pyav
from .data_set import evenly
from .movies import NOTE, Movie, Sheets, frames_in
from .pictures import Picture, enlarged, overlay, stretched, visible

log = logging.getLogger(__name__)
KINDS = ("attention", "pca")
KEPT = 512  # patches of a sampled frame whose scores decide the range of colours


@runtime_checkable
class Paint(Protocol):
    """What is drawn of a frame, after samples have decided what colours mean."""

    def take(self, looked: Looked) -> None:
        """Another sample, as a batch of one or more."""
        ...

    def settle(self) -> None:
        """There are no more samples."""
        ...

    def draw(self, picture: Picture, looked: Looked, i: int) -> Picture:
        """Of frame i of a batch."""
        ...


class AttentionPaint:
    """Class attention over the frame; all frames share one range of colours, from the least weight
    of the samples to the 0.995 quantile of theirs.

    Args:
        block: 1 or 2.
        head: from 1; None: the mean of the heads.
        strength: of the colours over the frame.
    """

    def __init__(self, block: int, head: int | None, strength: float):
        self.block, self.head, self.strength = block, head, strength
        self.values: list[np.ndarray] = []
        self.low = self.high = 0.0

    def maps(self, looked: Looked) -> Float[np.ndarray, "B h w"]:
        """The weights that are shown."""
        heads = looked.attention[:, self.block - 1]
        chosen = heads.mean(dim=1) if self.head is None else heads[:, self.head - 1]
        return chosen.cpu().numpy()

    def take(self, looked: Looked) -> None:
        """See `Paint`."""
        self.values.append(self.maps(looked).ravel())

    def settle(self) -> None:
        """See `Paint`."""
        values = np.concatenate(self.values)
        self.low, self.high = float(values.min()), float(np.quantile(values, BRIGHTEST))
        self.values = []

    def draw(self, picture: Picture, looked: Looked, i: int) -> Picture:
        """See `Paint`."""
        scaled = stretched(self.maps(looked)[i], self.low, self.high)
        return overlay(picture, enlarged(scaled, *picture.shape[:2]), self.strength)


class ComponentsPaint:
    """The first three principal components of the samples' patches as red, green and blue; all
    frames share the components and their ranges.

    Of the samples only sums are kept, and a fixed number of patches each.

    Args:
        dim: width of the patch features.
    """

    def __init__(self, dim: int):
        self.moments = patches.Moments(dim)
        self.random = np.random.default_rng(0)
        self.kept: list[Tensor] = []

    def take(self, looked: Looked) -> None:
        """See `Paint`."""
        for features in looked.patches:
            rows = features.flatten(1).mT.cpu()
            self.moments.add(rows)
            some = self.random.permutation(len(rows))[:KEPT]
            self.kept.append(rows[torch.from_numpy(some)])

    def settle(self) -> None:
        """See `Paint`."""
        self.found = self.moments.components()
        scores = patches.scores_of(torch.cat(self.kept), self.found).numpy()
        self.low, high = np.quantile(scores, patches.CLIPPED, axis=0)
        self.width = np.maximum(high - self.low, 1e-12)
        self.kept = []

    def draw(self, picture: Picture, looked: Looked, i: int) -> Picture:
        """See `Paint`."""
        h, w = looked.patches.shape[2:]
        scores = patches.scores_of(looked.patches[i].flatten(1).mT, self.found).numpy()
        colours = ((scores - self.low) / self.width).clip(0.0, 1.0).reshape(h, w, -1)
        size = (picture.shape[1], picture.shape[0])
        smooth = cv2.resize(colours.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        return np.rint(smooth * 255).astype(np.uint8)


def check(cfg: DictConfig) -> None:
    """Refuse settings that no film can be made with.

    Raises:
        UserError: the first of them.
    """
    if cfg.kind not in KINDS:
        raise UserError(f"kind={cfg.kind}: attention or pca")
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    if type(cfg.block) is not int or cfg.block not in (1, 2):
        raise UserError(f"block={cfg.block}: 1 or 2, of the two class-attention blocks")
    for name in ("every", "samples", "batch_size", "max_pixels"):
        number(name, cfg[name], int, 1)
    for name in ("size", "head"):
        if cfg[name] is not None:
            number(name, cfg[name], int, 1)
    number("fps", cfg.fps, low=0.001, high=1001.0)
    if cfg.max_seconds is not None:
        number("max_seconds", cfg.max_seconds)
    if type(cfg.overlay) not in (int, float) or not 0.0 <= cfg.overlay <= 1.0:
        raise UserError(f"overlay={cfg.overlay}: a share of at most 1, such as 0.65")
    switch("side_by_side", cfg.side_by_side)


def paint_of(cfg: DictConfig, backbone: XCiT) -> Paint:
    """What the settings ask for.

    Raises:
        UserError: a head that the model does not have, or a size below its patch.
    """
    heads = backbone.architecture["num_heads"]
    if cfg.head is not None and cfg.head > heads:
        raise UserError(f"head={cfg.head}: the model has heads 1 to {heads}; null is their mean")
    if cfg.size is not None and cfg.size < backbone.patch_size:
        raise UserError(f"size={cfg.size}: at least the patch, {backbone.patch_size}")
    if cfg.kind == "pca":
        return ComponentsPaint(backbone.embed_dim)
    return AttentionPaint(cfg.block, cfg.head, float(cfg.overlay))


def clip_of(cfg: DictConfig, frozen: Frozen) -> Clip:
    """The video, opened."""
    path = Path(str(cfg.video)).expanduser()
    selection = Selection(cfg.size, cfg.every, cfg.max_seconds)
    patch = frozen.backbone.patch_size
    if path.is_dir():
        rate = Fraction(cfg.fps).limit_denominator(1001)
        return Frames(path, frozen.how, patch, selection, rate)
    return Video(path, frozen.how, patch, selection)


def out_path(cfg: DictConfig, ckpt: Path) -> Path:
    """A file ending in .mp4, or a folder; where it goes is made.

    Raises:
        UserError: another ending, the video itself, or no place to write to.
    """
    video = Path(str(cfg.video)).expanduser()
    head = "" if cfg.head is None or cfg.kind == "pca" else f"-head-{cfg.head}"
    name = f"{video.resolve().name if video.is_dir() else video.stem}-{cfg.kind}{head}.mp4"
    if cfg.out:
        out = Path(str(cfg.out)).expanduser()
    else:
        out = writable_or_here(folder_of(ckpt), "film") / name
    if out.suffix.lower() == ".mp4" and not out.is_dir():
        if out.resolve() == video.resolve():
            raise UserError(f"out={out}: that is the video itself; take another name")
        pyav()
        writable_folder(out.parent)
        return out
    if out.suffix and not out.is_dir():
        raise UserError(f"out={out}: a file ending in .mp4, or a folder for PNG files")
    if video.is_dir() and out.resolve() == video.resolve():
        raise UserError(f"out={out}: the folder of the frames; take another")
    if frames_in(out) and not (out / NOTE).is_file():
        raise UserError(
            f"out={out}: holds frame-*.png that no film has left there, and would lose them; take "
            "another folder"
        )
    writable_folder(out)
    return out


def main(cfg: DictConfig) -> None:
    """`ssl-xcit film`: writes one film, or PNG files."""
    check(cfg)
    ckpt = checkpoint_path(str(cfg.ckpt))
    backbone = load_backbone(ckpt, cfg.which, expected(cfg))
    paint = paint_of(cfg, backbone)
    how = of_weights(backbone.preprocess, cfg.max_pixels)
    frozen = Frozen(
        backbone, how, placed(backbone, str(cfg.device))[0], cfg.batch_size,
        show=shown_in_terminal(),
    )  # fmt: skip
    clip = clip_of(cfg, frozen)
    out = out_path(cfg, ckpt)
    height, width = clip.sides
    say(f"{ckpt}: {model_name(backbone.architecture)}, {cfg.which}")
    began = time.monotonic()
    total = sample(cfg, frozen, clip, paint)
    with written_to(out):
        made, ticks = shoot(cfg, frozen, clip, paint, out, total)
    for problem in clip.problems:
        log.warning("%s", problem)
    seconds = float(ticks * clip.time_base)
    say(
        f"written: {out}, {made} frames of {width * (1 + cfg.side_by_side)} x {height}, "
        f"{seconds:.1f} s, in {time.monotonic() - began:.0f} s"
    )


def sample(cfg: DictConfig, frozen: Frozen, clip: Clip, paint: Paint) -> int:
    """Look at frames from the whole clip, so that colours are settled; how many frames it has,
    about.
    """
    total = clip.expected()
    places = evenly(total, cfg.samples)
    frames = track(clip.frames(set(places)), "settling colours", len(places), frozen.show)
    taken = 0
    for batch, looked in looked_at(cfg, frozen, frames):
        paint.take(looked)
        taken += len(batch)
    if not taken:
        reason = f"; {clip.problems[0]}" if clip.problems else ""
        raise UserError(f"video={cfg.video}: no frame that is sampled can be read{reason}")
    paint.settle()
    return max(clip.count, taken) if isinstance(clip, Video) else total


def looked_at(
    cfg: DictConfig, frozen: Frozen, frames: Iterable[Frame]
) -> Iterator[tuple[list[Frame], Looked]]:
    """Frames in batches, with what the backbone sees in them.

    Raises:
        UserError: the memory does not suffice.
        RunFailed: features that are not finite.
    """
    for batch in in_batches(frames, frozen.batch_size):
        try:
            with frozen.looking() as backbone:
                looked = attention.look(backbone, frozen.images(*(f.pixels for f in batch)))
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
        finite(looked.patches, Path(str(cfg.video)))
        finite(looked.attention, Path(str(cfg.video)))
        yield batch, looked


def in_batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of so many, the last of fewer."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def shoot(
    cfg: DictConfig, frozen: Frozen, clip: Clip, paint: Paint, out: Path, total: int
) -> tuple[int, int]:
    """Draw and write every frame; how many there were, and how many ticks they last.

    A film has its name when it is whole. Ctrl-C leaves what is done as `NAME.part.mp4`, which
    plays.
    """
    if out.suffix.lower() != ".mp4" or out.is_dir():
        sheets = Sheets(out)
        try:
            return draw_all(cfg, frozen, clip, paint, sheets, total)
        except KeyboardInterrupt:
            log.warning("%s has %d of %d frames", out, sheets.count, total)
            raise
    height, width = clip.sides
    unfinished = out.with_name(f"{out.stem}.part.mp4")
    with replacing(out) as part:
        sides = (height, width * (1 + cfg.side_by_side))
        movie = Movie(part, sides, clip.rate, clip.time_base)
        try:
            return draw_all(cfg, frozen, clip, paint, movie, total)
        except KeyboardInterrupt:
            if movie.count:
                movie.finish()
                part.replace(unfinished)
                log.warning("%s has the first %d of %d frames", unfinished, movie.count, total)
            raise
        finally:
            movie.close()


def draw_all(
    cfg: DictConfig, frozen: Frozen, clip: Clip, paint: Paint, film: Movie | Sheets, total: int
) -> tuple[int, int]:
    """See `shoot`."""
    frames = track(clip.frames(), "film", total, frozen.show)
    end = 0
    for batch, looked in looked_at(cfg, frozen, frames):
        for i, frame in enumerate(batch):
            picture = visible(frame.pixels)
            drawn = paint.draw(picture, looked, i)
            if cfg.side_by_side:
                drawn = np.concatenate((picture, drawn), axis=1)
            film.add(drawn, frame.time, frame.duration)
            end = frame.time + frame.duration
    film.finish()
    return film.count, end
