"""What the readers of detection data make: images with their objects, by part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]  # left, top, right, bottom
MAX_SIDE = 2**24  # pixels, as 32 bits of floating point tell them apart


class Object(NamedTuple):
    """An annotated object."""

    name: str  # of its class
    box: Box
    crowd: bool = False
    segmentation: str | None = None  # json of polygons or runs as COCO has them; None: a box only
    area: float = 0.0  # in pixels, as annotated; 0: not known


@dataclass
class Record:
    """An image with its objects."""

    file: str  # below the folder of the images
    height: int = 0  # in pixels, as annotated; 0: not known
    width: int = 0  # likewise
    objects: list[Object] = field(default_factory=list)


@dataclass
class Part:
    """The images for training or for testing."""

    folder: Path
    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Found(NamedTuple):
    """What a layout has in a folder."""

    parts: dict[str, Part]  # `train` and `test`, or `train` alone
    names: list[str] | None  # of classes in their order; None: those of the objects
    shares: bool = False  # whether coordinates are shares of the image's sides, or else pixels


def clipped(box: Sequence[float], height: float, width: float) -> Box:
    """Return the part of a box inside the image; of a size of 0, which is not known, all of it.

    Raises:
        ValueError: nothing is left, or it has no area.
    """
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise ValueError("box with numbers that are not finite")
    left, top, right, bottom = (float(v) for v in box)
    if not (left < right and top < bottom):
        raise ValueError("box of no area")
    if height and width:
        left, right = max(left, 0.0), min(right, float(width))
        top, bottom = max(top, 0.0), min(bottom, float(height))
        if not (left < right and top < bottom):
            raise ValueError("box outside the image")
    return left, top, right, bottom


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Return a row of json, empty if it is no mapping."""
    return row if isinstance(row, Mapping) else {}


def is_polygon(points: Any) -> bool:
    """Whether these are coordinates of three points or more."""
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(v, int | float) and math.isfinite(v) for v in points)
    )
