"""One image to V crops: 2 global views and L local ones (SwAV's multi-crop as in DINO,
arXiv:2104.14294, appendix).

An augmentation is a function of (picture, seed) that returns uint8 pixels; normalisation happens
once a batch, on the device that trains. `fused.py` has the fast form, and `TorchvisionMultiCrop`
is the reference: Pillow and torchvision, in the published order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Len, Predicate
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ssl_xcit.data.picture import Picture
from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count, Positive, Share, Words

Large = UInt8[np.ndarray, "G size size channels"]
Small = UInt8[np.ndarray, "L small small channels"]


def ascending(values: Sequence[float]) -> bool:
    """Whether the first of two numbers is not above the second."""
    return values[0] <= values[1]


Scale = Annotated[
    Sequence[Annotated[float, Gt(0), Le(1)]],
    Len(2, 2),
    Predicate(ascending),
    Words("[low,high] with 0 < low <= high <= 1"),
]
Radius = Annotated[
    Sequence[Positive], Len(2, 2), Predicate(ascending), Words("[low,high] with 0 < low <= high")
]
Jitter = Annotated[
    Sequence[Share],
    Len(4, 4),
    Predicate(lambda jitter: jitter[3] <= 0.5),
    Words("4 numbers: three of 0 to 1, and hue of 0 to 0.5"),
]
Probabilities = Annotated[Sequence[Share], Len(3, 3), Words("3 probabilities, 0 to 1")]
STAGED = ("global_size", "local_size", "num_local")  # what may change with the step
SEQUENCES = ("global_scale", "local_scale", "jitter", "blur_prob", "blur_radius", "solarise_prob")
BLUR_SIZE = 224  # global crops that `blur_radius` is for


class Replaced(NamedTuple):
    """An image that could not be used."""

    place: int  # in the source
    name: str
    reason: str


class Crops(NamedTuple):
    """The crops of an image, or of a batch when stacked (leading B)."""

    global_crops: UInt8[Tensor, "*B G size size channels"]
    local_crops: UInt8[Tensor, "*B L small small channels"]
    indices: int | Tensor  # which images these are
    replaced: tuple[Replaced, ...] = ()  # bad ones that others stand for


@runtime_checkable
class MultiCrop(Protocol):
    """What the loader calls: crops as a pure function of the picture and a seed."""

    global_size: int

    def check(self, channels: int) -> str | None:
        """Return a warning about images of so many channels; None: there is none.

        Raises:
            UserError: such images cannot be augmented.
        """
        ...

    def __call__(self, picture: Picture, seed: int) -> tuple[Large, Small]:
        """Return crops of the picture, the same for the same seed; raises BadImage."""
        ...


@dataclass
class Recipe:
    """DINO's multi-crop by its numbers.

    Each crop: random resized crop (aspect 3/4 to 4/3), flip 0.5, colour jitter in random order,
    grey, blur, solarise (threshold 128).
    """

    global_size: Count = 224  # side of the two global crops in pixels
    local_size: Count = 96  # side of the local crops
    num_local: Annotated[int, Ge(0)] = 8  # L
    global_scale: Scale = (0.4, 1.0)  # share of the image's area in a global crop
    local_scale: Scale = (0.05, 0.4)  # the same for local crops
    # strength of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (turns)
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: Share = 0.8  # probability of the jitter
    grey_prob: Share = 0.2  # probability of grey
    # probability of blur for global crop 1, global crop 2, local crops
    blur_prob: Probabilities = (1.0, 0.1, 0.5)
    # standard deviation of the blur in pixels where global crops have 224, in proportion elsewhere
    blur_radius: Radius = (0.1, 2.0)
    solarise_prob: Probabilities = (0.0, 0.2, 0.0)  # as `blur_prob`, for solarisation
    # parts of the run that have other numbers, each `until` a share of it; the rest is as above.
    # Memory is needed for the largest
    stages: Sequence[Mapping[str, float]] = ()

    def __post_init__(self) -> None:
        """Make the recipes of the stages, and plain tuples of sequences: reading OmegaConf's lists
        takes as long as making a crop.

        Raises:
            UserError: a stage without an end above that of the one before, or with other numbers
                than the sizes and the number of local crops.
        """
        for name in SEQUENCES:
            setattr(self, name, tuple(getattr(self, name)))
        last, self.parts = 0.0, list[tuple[float, "Recipe"]]()
        for stage in self.stages:
            until = stage.get("until", 0.0)
            numbers: dict[str, Any] = {k: v for k, v in stage.items() if k in STAGED}
            counts = all(type(v) is int and v >= (k != "num_local") for k, v in numbers.items())
            if not (last < until <= 1.0 and counts and len(numbers) == len(stage) - 1 > 0):
                raise UserError(
                    f"augment.stages: {dict(stage)} is not a stage: it needs until, a share of the "
                    f"run above that of the stage before (here {last:g}), and whole numbers for "
                    f"some of {', '.join(STAGED)}, such as {{until:0.5,global_size:32}}"
                )
            self.parts.append((until, replace(self, stages=(), **numbers)))
            last = until

    def blur_std(self) -> tuple[float, float]:
        """Return the lowest and the highest standard deviation of the blur in pixels."""
        low, high = self.blur_radius
        return low * self.global_size / BLUR_SIZE, high * self.global_size / BLUR_SIZE

    def at(self, share: float) -> "Recipe":
        """Return the recipe of the stage, or this one."""
        return next((recipe for until, recipe in self.parts if share < until), self)

    def described(self, total_steps: int) -> str:
        """Return the sizes and numbers of crops by step; empty without stages."""
        if not self.parts:
            return ""

        def sizes(recipe: "Recipe") -> str:
            local = f" + {recipe.num_local} x {recipe.local_size}" * (recipe.num_local > 0)
            return f"2 x {recipe.global_size}{local}"

        steps = range(total_steps)
        ends = [
            f"{sizes(recipe)} until step {sum(n / total_steps < until for n in steps):,}"
            for until, recipe in self.parts
        ]
        return ", ".join([*ends, f"then {sizes(self)}"])


def crops_at(augment: MultiCrop, share: float) -> MultiCrop:
    """Return the crops that are made when such a share of the run is done."""
    at: Callable[[float], MultiCrop] | None = getattr(augment, "at", None)
    return augment if at is None else at(share)


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside, and restore its state behind."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class RandomBlur(nn.Module):
    """With probability `p` Pillow's Gaussian blur, its std in pixels uniform in `radius`."""

    def __init__(self, p: float, radius: Sequence[float] = (0.1, 2.0)):
        super().__init__()
        self.p = p
        self.radius = radius

    def forward(self, image: Image.Image) -> Image.Image:
        """Blur the image, or return it as it is."""
        if torch.rand(()) >= self.p:
            return image
        radius = torch.empty(()).uniform_(*self.radius).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


@dataclass
class TorchvisionMultiCrop(Recipe):
    """The recipe through Pillow and torchvision, bicubic: the reference."""

    def __post_init__(self) -> None:
        """Build the transforms."""
        from torchvision.transforms import v2  # the usual recipe does without

        super().__post_init__()

        def view(size: int, scale: Sequence[float], which: int) -> v2.Transform:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(
                        size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC
                    ),
                    v2.RandomHorizontalFlip(0.5),
                    v2.RandomApply([v2.ColorJitter(*self.jitter)], p=self.jitter_prob),
                    v2.RandomGrayscale(self.grey_prob),
                    RandomBlur(self.blur_prob[which], self.blur_std()),
                    v2.RandomSolarize(128, p=self.solarise_prob[which]),
                ]
            )

        self.global_views = [view(self.global_size, self.global_scale, which) for which in (0, 1)]
        self.local_view = view(self.local_size, self.local_scale, 2)

    def check(self, channels: int) -> str | None:
        """Takes RGB only."""
        if channels != 3:
            raise UserError(
                f"augment=torchvision takes RGB, and the images have {channels} channels: "
                "augment=fused"
            )
        return None

    def __call__(self, picture: Picture, seed: int) -> tuple[Large, Small]:
        """Return (2, global, global, 3) and (L, local, local, 3) crops, the same for a seed."""
        image = Image.fromarray(picture.pixels())
        with torch_seed(seed):
            large = [np.asarray(view(image)) for view in self.global_views]
            small = [np.asarray(self.local_view(image)) for _ in range(self.num_local)]
        empty = np.empty((0, self.local_size, self.local_size, 3), np.uint8)
        return np.stack(large), np.stack(small) if small else empty
