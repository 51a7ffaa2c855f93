"""DAVIS-2017 video object segmentation by propagating labels along frozen patch features.

After DINO (arXiv:2104.14294, section 4.2.2) and Jabri et al. 2020 (arXiv:2006.14613): the first
frame's mask is given. In each later frame a patch takes the labels of its `topk` nearest patches of
the first and the last `num_context` frames, no farther than `neighbourhood` rows and columns away,
weighted by exp(cosine / temperature). A label's map is upsampled, stretched to 0..1 as in DINO's
code, and the highest takes the pixel. Differs from that code: sides are rounded down to multiples
of the patch (there 64), frames are resized bicubically, maps upsampled to the full size at once,
and of patches that tie for the last place one is taken.

Scores as DAVIS-2017 has them (Perazzi et al. 2016; Pont-Tuset et al. 2017): region Jaccard J and
boundary measure F of each object of the first frame, mean over its frames without the first and the
last, then over the objects of all sequences.
"""

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from skimage.morphology import disk
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from ssl_xcit.data.preprocess import MAX_PIXELS, Pixels
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import Count, Positive, Text

from ..evaluators.protocol import Task
from ..features.extractor import FeatureExtractor
from ..statistics import grouped
from .masks import (
    IGNORED,
    Directory,
    Mask,
    Pair,
    check_not_below,
    existing_folder,
    finite,
    read_names,
    read_pair,
    resize_image,
    resize_mask,
)

TOLERANCE = 0.008  # of the image's diagonal: how far apart two boundaries may lie and still match
PATCH_ROWS = 8  # of patches whose labels are propagated at once
Region = Bool[np.ndarray, "H W"]


def propagate(
    query: Float[Tensor, "C h w"],
    context: Float[Tensor, "T C h w"],
    labels: Float[Tensor, "T L h w"],
    radius: int,
    topk: int,
    temperature: float,
) -> Float[Tensor, "L h w"]:
    """Each patch's labels from its `topk` nearest context patches within `radius` rows and columns.

    Features have norm 1; weights are softmax(cosine / temperature) over the nearest.
    """
    h, w = query.shape[1:]
    row, column = (torch.arange(length, device=query.device) for length in (h, w))
    far_column = (column[:, None] - column).abs() > radius  # (w, w)
    parts = []
    for top in range(0, h, PATCH_ROWS):
        bottom = min(top + PATCH_ROWS, h)
        near = slice(max(0, top - radius), min(h, bottom + radius))
        cosine = torch.einsum("crx,tcsy->rxtsy", query[:, top:bottom], context[:, :, near])
        far_row = (row[top:bottom, None] - row[near]).abs() > radius
        far = far_row[:, None, :, None] | far_column[None, :, None, :]  # (r, w, s, w)
        cosine = cosine.masked_fill_(far[:, :, None], -torch.inf).flatten(2)
        values, places = cosine.topk(min(topk, cosine.shape[-1]), dim=-1)
        nearest = labels[:, :, near].transpose(0, 1).flatten(1)[:, places]  # (L, r, w, topk)
        parts.append(torch.einsum("rxk,lrxk->lrx", (values / temperature).softmax(-1), nearest))
    return torch.cat(parts, dim=1)


def painted(labels: Float[Tensor, "L h w"], size: tuple[int, int]) -> Mask:
    """The label of each pixel: maps upsampled bilinearly, stretched to 0..1, the highest taken."""
    maps = interpolate(labels[None], size, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    stretched = torch.where(high > low, (maps - low) / span, maps)
    return stretched.argmax(0).to(torch.uint8).cpu().numpy()


def jaccard(predicted: Region, true: Region) -> float:
    """Intersection over union; 1 where both are empty."""
    union = (predicted | true).sum()
    return float((predicted & true).sum() / union) if union else 1.0


def boundary(region: Region) -> Region:
    """Pixels whose right, lower or lower right neighbour is not of the same side."""
    beyond = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    right, below, across = beyond[:-1, 1:], beyond[1:, :-1], beyond[1:, 1:]
    return (region != right) | (region != below) | (region != across)


def boundary_f(predicted: Region, true: Region) -> float:
    """F = 2 P R / (P + R): share P of the predicted boundary near the true one, R the reverse.

    Near: within ceil(0.008 diagonal) pixels. A boundary that is missing misses nothing.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*true.shape))
    around = disk(radius).astype(np.uint8)
    shares = []
    for one, other in ((predicted, true), (true, predicted)):
        edge = boundary(one)
        reached = cv2.dilate(boundary(other).astype(np.uint8), around).astype(bool)
        shares.append(float(reached[edge].mean()) if edge.any() else 1.0)
    precision, recall = shares
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def frame_features(
    extractor: FeatureExtractor, backbone: XCiT, image: Pixels, size: int, path: Path
) -> Float[Tensor, "C h w"]:
    """Patch features of norm 1; the short side at `size`, both rounded down to whole patches."""
    p, short = backbone.patch_size, min(image.shape[:2])
    height, width = (max(p, side * size // short // p * p) for side in image.shape[:2])
    if height * width > MAX_PIXELS:
        raise UserError(f"{path}: {height} x {width} pixels with its short side at {size}")
    images = extractor.images(resize_image(image, height, width))
    return normalize(finite(backbone.forward_features(images).patches[0].float(), path), dim=0)


def find_frames(home: Path, sequence: str) -> list[Pair]:
    """Frames of a sequence with their masks, in order; raises MissingPath for no frames, or one
    without mask, UserError for fewer than three, of which none would be scored.
    """
    folder = home / "JPEGImages" / "480p" / sequence
    frames = sorted(folder.glob("*.jpg"))
    if not frames:
        raise MissingPath(f"{folder}: no frames (00000.jpg, ...) in it")
    if len(frames) < 3:
        raise UserError(
            f"{folder}: {len(frames)} frames; the first and the last are not scored, so at least "
            "three are needed"
        )
    masks = home / "Annotations" / "480p" / sequence
    pairs = [Pair(frame, masks / f"{frame.stem}.png") for frame in frames]
    for pair in pairs:
        if not pair.mask.is_file():
            raise MissingPath(f"{pair.mask}: no mask for {pair.image}; add it to the annotations")
    return pairs


class VideoSegmentation(Task):
    """J, F and their mean in percent: `davis_j`, `davis_f`, `davis_jf`. Raises MissingPath where
    files are missing, UserError where a sequence has fewer than three frames.

    Args:
        root: JPEGImages/480p/SEQUENCE/00000.jpg, Annotations/480p/SEQUENCE/00000.png (indices;
            255 is background) and ImageSets/2017/val.txt, which names the sequences.
        size: short side of the frames in pixels.
        num_context: last frames that labels come from, besides the first.
        neighbourhood: rows and columns of patches that labels travel at most.
        topk: nearest patches that labels come from.
        temperature: of their weights.
    """

    def __init__(
        self,
        root: Directory,
        size: Count = 480,
        num_context: Annotated[int, Ge(0)] = 7,
        neighbourhood: Annotated[int, Ge(0)] = 12,
        topk: Count = 5,
        temperature: Positive = 0.1,
        name: Text = "davis",
    ):
        home = existing_folder(root)
        names = list(dict.fromkeys(read_names(home / "ImageSets" / "2017" / "val.txt")))
        self.sequences = [find_frames(home, name) for name in names]
        self.name = name
        self.size = size
        self.num_context = num_context
        self.nearest = (neighbourhood, topk, temperature)

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where frames are smaller than a patch."""
        check_not_below(self.size, extractor.backbone.patch_size, "video")

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Propagate labels through every sequence, score every object."""
        self.check(extractor)
        videos = track(self.sequences, "video segmentation", show=extractor.show)
        with extractor.inference() as backbone:
            scores = [self.scores(extractor, backbone, frames) for frames in videos]
        j, f = np.concatenate(scores).T
        sequence = np.repeat(np.arange(len(scores)), [len(objects) for objects in scores])
        yield f"{self.name}_j", grouped(j, sequence)
        yield f"{self.name}_f", grouped(f, sequence)
        yield f"{self.name}_jf", grouped((j + f) / 2, sequence)

    def scores(
        self, extractor: FeatureExtractor, backbone: XCiT, frames: list[Pair]
    ) -> Float[np.ndarray, "objects 2"]:
        """J and F of every object of a sequence, means over its frames."""
        image, mask = read_pair(frames[0], extractor.preprocess)
        first = np.where(mask == IGNORED, np.uint8(0), mask)
        objects = range(1, int(first.max()) + 1)
        if not objects:
            raise UserError(f"{frames[0].mask}: the first frame's mask has no object to follow")
        features = frame_features(extractor, backbone, image, self.size, frames[0].image)
        small = torch.from_numpy(resize_mask(first, features.shape[1], features.shape[2]).copy())
        given = one_hot(small.long(), len(objects) + 1).permute(2, 0, 1).to(features)
        start, recent = (features, given), deque[tuple[Tensor, Tensor]](maxlen=self.num_context)
        rows = []
        for frame in frames[1:-1]:
            image, true = read_pair(frame, extractor.preprocess)
            if true.shape != first.shape:
                raise UserError(f"{frame.image}: another size than the first frame's")
            features = frame_features(extractor, backbone, image, self.size, frame.image)
            context, labels = map(torch.stack, zip(start, *recent, strict=True))
            maps = propagate(features, context, labels, *self.nearest)
            recent.append((features, maps))
            predicted = painted(maps, (true.shape[0], true.shape[1]))
            regions = [(predicted == o, true == o) for o in objects]
            rows.append([(jaccard(*pair), boundary_f(*pair)) for pair in regions])
        return np.mean(rows, axis=0)
