"""Paint attention or principal components over the frames of a video, in colours that mean the same
in every frame.

Each frame by itself would flicker: components change order and sign, and a range of colours of its
own makes a flat map look like a sharp one. So frames sampled evenly from the whole video decide the
components and ranges first; then every frame is drawn by itself. The same frame has the same
colours at any time, and nothing is smoothed.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TypeAlias

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
from .pictures import BRIGHTEST, Picture, enlarged, overlay, stretched, visible
from .video import Clip, Frame, write_mp4, write_pngs

log = logging.getLogger(__name__)
NUM_PATCHES = 512  # of a sampled frame, whose scores decide the range of colours


Draw: TypeAlias = Callable[[Picture, AttentionPass, int], Picture]  # of frame i of a batch


def attention_colours(
    samples: Iterable[AttentionPass], block: int, head: int | None, strength: float
) -> Draw:
    """Draw class attention of a block, 1 or 2, and a head, from 1 (None: their mean), over the
    frame; all frames share one range of colours, from the least weight of the samples, frames of
    the whole clip, to their 0.995 quantile.
    """

    def maps(output: AttentionPass) -> Float[np.ndarray, "B h w"]:
        heads = output.attention[:, block - 1]
        chosen = heads.mean(dim=1) if head is None else heads[:, head - 1]
        return chosen.cpu().numpy()

    values = np.concatenate([maps(output).ravel() for output in samples])
    low, high = float(values.min()), float(np.quantile(values, BRIGHTEST))

    def draw(picture: Picture, output: AttentionPass, i: int) -> Picture:
        scaled = stretched(maps(output)[i], low, high)
        return overlay(picture, enlarged(scaled, *picture.shape[:2]), strength)

    return draw


def component_colours(samples: Iterable[AttentionPass], dim: int) -> Draw:
    """Draw the first three principal components of the samples' patches as red, green and blue; all
    frames share the components and their ranges.

    Of the samples only sums are kept, and a fixed number of patches each.
    """
    moments, random = patches.Moments(dim), np.random.default_rng(0)
    kept: list[Tensor] = []
    for output in samples:
        for features in output.patches:
            rows = features.flatten(1).mT.cpu()
            moments.add(rows)
            kept.append(rows[torch.from_numpy(random.permutation(len(rows))[:NUM_PATCHES])])
    components = moments.components()
    scores = patches.scores_of(torch.cat(kept), components).numpy()
    low, high = np.quantile(scores, patches.CLIPPED, axis=0)
    width = np.maximum(high - low, 1e-12)

    def draw(picture: Picture, output: AttentionPass, i: int) -> Picture:
        grid = output.patches.shape[2:]
        scores = patches.scores_of(output.patches[i].flatten(1).mT, components).numpy()
        colours = ((scores - low) / width).clip(0.0, 1.0).reshape(*grid, -1).astype(np.float32)
        smooth = cv2.resize(colours, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        return np.rint(smooth * 255).astype(np.uint8)

    return draw


def sampled(extractor: FeatureExtractor, clip: Clip, most: int) -> Iterator[AttentionPass]:
    """Passes over at most so many frames, evenly spaced; raises UserError if none is readable."""
    step = ceil(clip.total / most)
    frames = track(clip.frames(step), "settling colours", ceil(clip.total / step), extractor.show)
    output = None
    for _, output in forward_frames(extractor, clip, frames):
        yield output
    if output is None:
        reason = "; ".join(["", *clip.problems[:1]])
        raise UserError(f"video={clip.path}: no frame that is sampled can be read{reason}")


def forward_frames(
    extractor: FeatureExtractor, clip: Clip, frames: Iterable[Frame]
) -> Iterator[tuple[list[Frame], AttentionPass]]:
    """Frames in batches, with the backbone's pass over them; raises UserError where the memory does
    not suffice, RunFailed where features are not finite.
    """
    each = iter(frames)
    while batch := list(islice(each, extractor.batch_size)):
        try:
            with extractor.inference() as backbone:
                output = attention.forward(backbone, extractor.images(*(f.pixels for f in batch)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            height, width = clip.sides
            half = f"size={max(clip.sides) // 2}"
            if len(batch) > 1:
                half = f"batch_size={len(batch) // 2}"
            raise UserError(
                f"not enough memory for {len(batch)} frames of {width} x {height}: try {half}"
            ) from error
        finite(output.patches, clip.path)
        finite(output.attention, clip.path)
        yield batch, output


def write_film(
    extractor: FeatureExtractor, clip: Clip, draw: Draw, side_by_side: bool, out: Path
) -> list[int]:
    """Draw and write every frame, with the frame itself on the left or not; at which tick each
    ends.

    A film has its name when it is whole. Ctrl-C leaves what is done as `NAME.part.mp4`, which
    plays.
    """
    ends: list[int] = []

    def drawn() -> Iterator[Frame]:
        frames = track(clip.frames(), "film", clip.total, extractor.show)
        for batch, output in forward_frames(extractor, clip, frames):
            for i, frame in enumerate(batch):
                original = visible(frame.pixels)
                picture = draw(original, output, i)
                if side_by_side:
                    picture = np.concatenate((original, picture), axis=1)
                yield frame._replace(pixels=picture)
                ends.append(frame.time + frame.duration)

    place = out
    try:
        if is_folder(out):
            write_pngs(out, drawn())
        else:
            with replacing(out) as part:
                try:
                    write_mp4(part, clip, drawn())
                except KeyboardInterrupt:
                    place = part.replace(out.with_name(f"{out.stem}.part.mp4")) if ends else out
                    raise
    except KeyboardInterrupt:
        if ends:
            log.warning("%s has the first %d of %d frames", place, len(ends), clip.total)
        raise
    return ends


def is_folder(out: Path) -> bool:
    """Whether PNG files are written there, and not a film."""
    return out.suffix.lower() != ".mp4" or out.is_dir()
