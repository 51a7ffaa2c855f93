"""Patch features as colours: principal components over several images, and cosine similarity.

After DINOv2 (arXiv:2304.07193, section 7.6, figure 1): the first three components are red, green
and blue, and a threshold on the first one parts foreground from background. Differs: components are
those of all patches of all images together, so a colour means the same in each; the threshold is
Otsu's by default, and which side is the foreground is decided by the border of the images. Only
sums are kept while images come (C x C numbers), so their number is not limited by memory.
"""

from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn.functional import normalize

from .pictures import (
    BRIGHTEST,
    Drawn,
    Picture,
    blocky,
    enlarged,
    highlighted,
    overlay,
    stretched,
    with_frame,
)

KIND = "Patch features"
NUM_COMPONENTS = 3
NUM_BINS = 256  # of the histogram that Otsu's threshold is taken from
CLIPPED = (0.01, 0.99)  # quantiles of a component that become 0 and 1 of its colour


class Components(NamedTuple):
    """Scores of a feature x are axes (x - mean)."""

    mean: Float[Tensor, " C"]
    axes: Float[Tensor, "components C"]  # of length 1, the largest variance first
    explained: Float[Tensor, " components"]  # share of the variance along each


class Moments:
    """Sums over features in float64, from which their principal components follow."""

    def __init__(self, dim: int):
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N C"]) -> None:
        """Add the sums of more features."""
        exact = features.detach().cpu().double()
        self.count += len(exact)
        self.total += exact.sum(dim=0)
        self.products += exact.mT @ exact

    def components(self) -> Components:
        """The first three, each with its largest entry (the first of equal ones) positive."""
        mean = self.total / max(1, self.count)
        covariance = self.products / max(1, self.count) - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        axes = vectors.mT.flip(0)[:NUM_COMPONENTS]
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        axes = torch.where(largest < 0, -axes, axes)
        variance = values.flip(0).clamp_min(0.0)
        return Components(mean, axes, variance[:NUM_COMPONENTS] / variance.sum().clamp_min(1e-30))


def scores_of(
    features: Float[Tensor, "N C"], components: Components
) -> Float[Tensor, "N components"]:
    """Scores of features along the components."""
    return (features.cpu().double() - components.mean) @ components.axes.mT


def otsu(values: Float[Tensor, " N"]) -> float:
    """Otsu's threshold (1979), above the last bin of the lower class; no equal value is above."""
    rows = values.numpy()
    return float(threshold_otsu(rows, NUM_BINS) + np.ptp(rows) / (2 * NUM_BINS))


def border_of(grid: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The patches along the four sides."""
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def oriented(
    first: Float[Tensor, " N"], border: Bool[Tensor, " N"], threshold: float | None
) -> tuple[float, float]:
    """(sign, least): the foreground is where sign * first > least, with the first component's
    scores and a threshold of so many deviations from their mean (None: Otsu's). Of the two signs
    the one whose foreground has the smaller share of its patches on the border.
    """
    if threshold is None:
        at = otsu(first)
        sides = [(1.0, at), (-1.0, -at)]
    else:
        at = threshold * float(first.std(correction=0))
        sides = [(1.0, at), (-1.0, at)]

    def on_border(side: tuple[float, float]) -> float:
        inside = side[0] * first > side[1]
        return float(border[inside].double().mean()) if inside.any() else 1.0

    return min(sides, key=on_border)


def as_colours(scores: Float[Tensor, "N components"]) -> Float[Tensor, "N components"]:
    """Scores as 0..1 between the quantiles of each component."""
    low, high = np.quantile(scores.numpy(), CLIPPED, axis=0)
    width = np.maximum(high - low, 1e-12)
    return (scores - torch.from_numpy(low)).div(torch.from_numpy(width)).clamp(0.0, 1.0)


def place_of(
    patch: Sequence[int | float], size: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int] | None:
    """Row and column in the grid of [row, column]; None where it lies outside the image. Whole
    numbers are pixels of the file of `size` (upright, from 0); with a decimal point they are
    fractions 0..1 of height and width.
    """
    pixels = all(type(value) is int for value in patch)
    place = []
    for value, side, count in zip(patch, size, grid, strict=True):
        if not 0 <= value <= (side - 1 if pixels else 1.0):
            return None
        share = (value + 0.5) / side if pixels else value
        place.append(min(int(share * count), count - 1))
    return place[0], place[1]


def similarity(patches: Float[Tensor, "C h w"], place: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Cosine of the angle between each patch's feature and that of the patch at `place`."""
    unit = normalize(patches, dim=0)
    return torch.einsum("chw,c->hw", unit, unit[:, place[0], place[1]])


class Maps(NamedTuple):
    """Components and foreground of several images."""

    colours: list[Float[Tensor, "_ _ components"]]  # 0..1
    foreground: list[Bool[Tensor, "_ _"]]
    explained: list[float]  # share of the variance along each component
    threshold: float  # of the foreground, on the first component with its sign turned


class PatchStore:
    """Patch features of several images, which wait in a file until the components are known."""

    def __init__(self, file: IO[bytes], dim: int):
        self.file = file
        self.moments = Moments(dim)
        self.grids: list[tuple[int, int]] = []

    def add(self, features: Float[Tensor, "C h w"]) -> None:
        """Add those of the next image."""
        rows = features.cpu().flatten(1).mT.float().contiguous()
        self.moments.add(rows)
        self.file.write(rows.numpy().tobytes())
        self.grids.append((features.shape[1], features.shape[2]))

    def scores(self, components: Components) -> Iterator[Float[Tensor, "N components"]]:
        """Scores of each image, in the order they came."""
        dim = len(components.mean)
        self.file.seek(0)
        for h, w in self.grids:
            rows = np.frombuffer(bytearray(self.file.read(4 * h * w * dim)), np.float32)
            yield scores_of(torch.from_numpy(rows).view(-1, dim), components)

    def maps(self, threshold: float | None) -> Maps:
        """Colour and part all images together; for the threshold see `oriented`."""
        components = self.moments.components()
        scores = torch.cat(list(self.scores(components)))
        border = torch.cat([border_of(grid).flatten() for grid in self.grids])
        sign, least = oriented(scores[:, 0], border, threshold)
        scores[:, 0] *= sign
        counts = [h * w for h, w in self.grids]
        colours, above = as_colours(scores).split(counts), (scores[:, 0] > least).split(counts)
        return Maps(
            [one.unflatten(0, grid) for one, grid in zip(colours, self.grids, strict=True)],
            [one.unflatten(0, grid) for one, grid in zip(above, self.grids, strict=True)],
            components.explained.tolist(),
            least,
        )


def component_pictures(
    picture: Picture, colours: Float[Tensor, "h w components"], foreground: Bool[Tensor, "h w"]
) -> Iterator[Drawn]:
    """The colours alone, then the foreground of the picture."""
    height, width, _ = picture.shape
    rgb = np.rint(colours.numpy() * 255).astype(np.uint8)
    title = "components 1 to 3 as RGB"
    yield Drawn(KIND, title, "components", blocky(rgb, height, width))
    mask = blocky(foreground.numpy().astype(np.uint8), height, width) > 0
    title = f"foreground, {mask.mean():.0%} of the area"
    yield Drawn(KIND, title, "foreground", highlighted(picture, mask))


def similarity_picture(
    picture: Picture, features: Float[Tensor, "C h w"], place: tuple[int, int], strength: float
) -> Drawn:
    """Similarity as colours over the picture, with a frame around the patch at `place`."""
    values = similarity(features, place).cpu().numpy()
    height, width, _ = picture.shape
    low, high = float(values.min()), float(np.quantile(values, BRIGHTEST))
    colours = overlay(picture, enlarged(stretched(values, low, high), height, width), strength)
    rows, columns = height // values.shape[0], width // values.shape[1]
    top, left = place[0] * rows, place[1] * columns
    framed = with_frame(colours, (top, left, top + rows, left + columns))
    return Drawn(KIND, f"similarity to the frame, {low:.2f} to {high:.2f}", "similarity", framed)
