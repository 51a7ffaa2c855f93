"""The command `film`: attention or principal components over a video."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.files import writable_folder, writable_or_here, written_to
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Positive, Share, Text

from ..checkpoints import expected_architecture, folder_of
from ..features.extractor import FeatureExtractor
from ..viz.attention import AttentionPass, Block
from ..viz.film import Draw, attention_colours, component_colours, is_folder, sampled, write_film
from ..viz.video import NOTE, Clip, Frames, Selection, Video, frames_in, pyav

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilmSettings:
    """`conf/film.yaml`."""

    main: str
    ckpt: Text
    which: Network
    video: Text
    kind: Literal["attention", "pca"]
    head: Count | None
    block: Block
    overlay: Share
    side_by_side: bool
    size: Count | None
    every: Count
    max_seconds: Positive | None
    fps: Annotated[float, Ge(0.001), Lt(1001)]
    samples: Count
    out: Text | None
    batch_size: Count
    max_pixels: Count
    device: str
    model: Node | None = None  # it may be left out


def colours_of(settings: FilmSettings, backbone: XCiT) -> Callable[[Iterable[AttentionPass]], Draw]:
    """What decides the colours of a kind of film by samples; raises UserError for a head that the
    model does not have, or a size below its patch.
    """
    head, size, heads = settings.head, settings.size, backbone.architecture["num_heads"]
    if head is not None and head > heads:
        raise UserError(f"head={head}: the model has heads 1 to {heads}; null is their mean")
    if size is not None and size < backbone.patch_size:
        raise UserError(f"size={size} must be at least the patch, {backbone.patch_size}")
    if settings.kind == "pca":
        return partial(component_colours, dim=backbone.embed_dim)
    return partial(attention_colours, block=settings.block, head=head, strength=settings.overlay)


def open_clip(settings: FilmSettings, video: Path, extractor: FeatureExtractor) -> Clip:
    """The video, or the folder of frames."""
    backbone, s = extractor.backbone, settings
    selection = Selection(
        extractor.preprocess, backbone.patch_size, s.size, s.every, s.max_seconds or inf
    )
    if video.is_dir():
        return Frames(video, selection, Fraction(s.fps).limit_denominator(1001))
    return Video(video, selection)


def out_path(settings: FilmSettings, video: Path, ckpt: Path) -> Path:
    """A file ending in .mp4, or a folder, in a place that can be written; raises UserError for
    another ending, the video itself, or no place to write to.
    """
    head = "" if settings.head is None or settings.kind == "pca" else f"-head-{settings.head}"
    name = f"{video.resolve().name if video.is_dir() else video.stem}-{settings.kind}{head}.mp4"
    if settings.out:
        out = Path(str(settings.out)).expanduser()
    else:
        out = writable_or_here(folder_of(ckpt), "film") / name
    if not is_folder(out):
        if out.resolve() == video.resolve():
            raise UserError(f"out={out}: that is the video itself; take another name")
        pyav()
        writable_folder(out.parent)
        return out
    if out.suffix and not out.is_dir():
        raise UserError(f"out={out} must be a file ending in .mp4, or a folder for PNG files")
    if video.is_dir() and out.resolve() == video.resolve():
        raise UserError(f"out={out}: that is the folder of the frames; take another one")
    if frames_in(out) and not (out / NOTE).is_file():
        raise UserError(
            f"out={out} holds frame-*.png that no film has left there, and would lose them; take "
            "another folder"
        )
    writable_folder(out)
    return out


def main(settings: FilmSettings) -> None:
    """`ssl-xcit film`: writes one film, or PNG files."""
    s = settings
    ckpt, video = checkpoint_path(str(s.ckpt)), Path(str(s.video)).expanduser()
    backbone = load_backbone(ckpt, s.which, expected_architecture(s.model))
    colours = colours_of(s, backbone)
    extractor = FeatureExtractor(
        backbone, of_weights(backbone.preprocess, s.max_pixels), placed(backbone, s.device)[0],
        s.batch_size, show=shown_in_terminal(),
    )  # fmt: skip
    clip = open_clip(s, video, extractor)
    out = out_path(s, video, ckpt)
    height, width = clip.sides
    say(f"{ckpt}: {model_name(backbone.architecture)}, {s.which}")
    began = time.monotonic()
    draw = colours(sampled(extractor, clip, s.samples))
    with written_to(out):
        ends = write_film(extractor, clip, draw, s.side_by_side, out)
    for problem in clip.problems:
        log.warning("%s", problem)
    say(
        f"written: {out}, {len(ends)} frames of {width * (1 + s.side_by_side)} x {height}, "
        f"{float(max(ends, default=0) * clip.time_base):.1f} s, in {time.monotonic() - began:.0f} s"
    )
