"""Training augmentation of classification (XCiT, arXiv:2106.09681, appendix B, after DeiT's,
arXiv:2012.12877): crop, flip, RandAugment, all of them torchvision's.

Random erasing comes later, on the normalised batch (`task.py`), for its noise is normal there.

Differs: the published RandAugment is timm's, `rand-m9-mstd0.5-inc1`. Torchvision's with 11 bins has
the same strengths at the same magnitude (rotation 27 degrees, shear 0.27, translation 41 % of a
side, factors 1 - 0.81 or 1 + 0.81, solarisation above 25 at magnitude 9), and so increases with it
as timm's "inc" does, but the magnitude is the same for each image (timm's has a standard deviation
of 0.5), posterisation keeps 4 bits at magnitude 9 where timm's keeps 1, and inversion and additive
solarisation are missing, where torchvision has the identity.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ssl_xcit.data.multicrop import Radius, Scale
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.task import Target
from ssl_xcit.utils.validation import Count, NonNegative, Share

MAGNITUDES = 11  # as timm, whose strengths are tenths of the largest
SMALL = 32  # pixels of images that are cropped with padding
FILL = (124, 116, 104)  # behind what is moved: ImageNet's mean colour
BICUBIC = v2.InterpolationMode.BICUBIC
Magnitude = Annotated[int, Ge(0), Le(MAGNITUDES - 1)]
NumOps = Annotated[int, Ge(0)]


@dataclass
class ClassificationAugment:
    """Random resized crop, flip, RandAugment or, where it is off, colour jitter.

    Images of 1 or 3 channels are augmented in Pillow; those of others are only cropped and flipped.
    All random numbers come from torch's global generator.
    """

    size: Count = 224  # side of the crop in pixels
    scale: Scale = (0.08, 1.0)  # share of the image's area in a crop
    ratio: Radius = (3 / 4, 4 / 3)  # width by height of the part that is cropped
    flip_prob: Share = 0.5  # probability of a left-right flip
    padding: Annotated[int, Ge(0)] = 4  # of images of `size` x `size`, at most 32: shifted crops
    rand_augment_ops: NumOps = 2  # how many operations are drawn; 0: colour jitter instead
    rand_augment_magnitude: Magnitude = 9  # strength in tenths of the largest
    rand_augment_prob: Share = 0.5  # probability that a drawn operation is applied, as timm has it
    jitter: NonNegative = 0.4  # brightness, contrast, saturation: factors 1 - x to 1 + x

    def __post_init__(self) -> None:
        """Build the transforms."""
        scale, ratio = tuple(self.scale), tuple(self.ratio)
        self.resized_crop = v2.RandomResizedCrop(self.size, scale, ratio, BICUBIC)
        self.shifted_crop = v2.RandomCrop(self.size, self.padding)
        self.flip = v2.RandomHorizontalFlip(self.flip_prob)
        self.colours = {channels: self.colours_of(channels) for channels in (1, 3)}

    def colours_of(self, channels: int) -> v2.Transform:
        """Return RandAugment or colour jitter for images of 1 or 3 channels."""
        if not self.rand_augment_ops:
            return v2.ColorJitter(self.jitter, self.jitter, self.jitter)
        fill = FILL if channels == 3 else sum(FILL) // 3
        one = v2.RandAugment(1, self.rand_augment_magnitude, MAGNITUDES, BICUBIC, fill)
        return v2.Compose(
            [v2.RandomApply([one], self.rand_augment_prob) for _ in range(self.rand_augment_ops)]
        )

    def fitted_to(self, preprocess: Preprocess) -> "ClassificationAugment":
        """Return it unchanged.

        Raises:
            UserError: images have so many channels that colours cannot be augmented.
        """
        channels = preprocess.channels
        if channels not in (1, 3) and (self.rand_augment_ops or self.jitter):
            raise UserError(
                f"images have {channels} channels, and RandAugment and colour jitter take 1 or 3: "
                "set augment.rand_augment_ops=0 and augment.jitter=0"
            )
        return self

    def __call__(self, pixels: Pixels, target: Target) -> tuple[UInt8[Tensor, "C h w"], Any]:
        """Return a (C, size, size) crop and the target as a tensor."""
        small = pixels.shape[:2] == (self.size, self.size) and self.size <= SMALL
        crop = self.shifted_crop if small else self.resized_crop
        channels = pixels.shape[-1]
        if channels in self.colours:
            picture = self.flip(crop(Image.fromarray(pixels if channels > 1 else pixels[..., 0])))
            image = v2.functional.pil_to_tensor(self.colours[channels](picture))
        else:
            planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            image = self.flip(crop(torch.from_numpy(planes)))
        return image, torch.as_tensor(np.asarray(target))
