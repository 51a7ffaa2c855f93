"""Draw docs/crops.png: the fused crops beside torchvision's, with the same parameters.

    python tools/make_crops.py

Upper rows: each operation alone on the same crop, by torchvision and by the fused implementation.
Lower rows: whole random crops, unpaired, to compare the distributions by eye.
"""

from pathlib import Path

import cv2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.fused import FusedMultiCrop, Views, cut, finish, recolour
from ssl_xcit.data.multicrop import TorchvisionMultiCrop
from ssl_xcit.data.photos import photographs

ROOT = Path(__file__).resolve().parent.parent
NAMED = dict(photographs())
BOX = (40, 60, 300, 320)


def views(**changes) -> Views:
    unchanged = {
        "boxes": np.zeros((1, 4), np.int64), "flip": np.array([False]),
        "jitter": np.array([True]), "order": np.arange(4)[None],
        "factors": np.array([[1.0, 1.0, 1.0, 0.0]]), "grey": np.array([False]),
        "blur": np.zeros(1), "solarise": np.array([False]),
    }  # fmt: skip
    return Views(**{**unchanged, **changes})


def factor(step: int, value: float) -> dict[str, np.ndarray]:
    factors = np.array([[1.0, 1.0, 1.0, 0.0]])
    factors[0, step] = value
    return {"factors": factors}


def steps(image: np.ndarray):
    """Yield (title, torchvision's, ours)."""
    crop = cut(image, BOX, 224)
    picture = Image.fromarray(image[BOX[0] : BOX[2], BOX[1] : BOX[3]])
    resized = picture.resize((224, 224), Image.Resampling.BICUBIC)
    yield "resize", resized, crop
    for title, theirs, changes in (
        ("brightness 1.4", F.adjust_brightness(resized, 1.4), factor(0, 1.4)),
        ("contrast 0.6", F.adjust_contrast(resized, 0.6), factor(1, 0.6)),
        ("saturation 0.8", F.adjust_saturation(resized, 0.8), factor(2, 0.8)),
        ("hue +0.1", F.adjust_hue(resized, 0.1), factor(3, 0.1)),
        ("grey", F.to_grayscale(resized, 3), {"grey": np.array([True])}),
        ("blur 2.0", resized.filter(ImageFilter.GaussianBlur(2.0)), {"blur": np.array([2.0])}),
        ("solarise", F.solarize(resized, 128), {"solarise": np.array([True])}),
    ):
        drawn = views(**changes)
        yield title, theirs, finish(recolour([crop], drawn)[0], drawn, 0)


def main() -> None:
    image = cv2.resize(
        decode(NAMED["astronaut"].read_bytes()), (500, 375), interpolation=cv2.INTER_AREA
    )
    others = [decode(NAMED[name].read_bytes()) for name in ("chelsea", "coffee", "flower")]
    figure, axes = plt.subplots(6, 8, figsize=(13, 10.4), layout="constrained")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for column, (title, theirs, ours) in enumerate(steps(image)):
        axes[0, column].imshow(theirs)
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].imshow(ours)
    for row, augment in ((2, TorchvisionMultiCrop()), (4, FusedMultiCrop())):
        for column in range(8):
            source = [image, *others][column % 4]
            large, small = augment(open_picture(source), 100 + column)
            axes[row, column].imshow(large[column % 2])
            axes[row + 1, column].imshow(small[0])
    for row, label in enumerate(
        ["torchvision", "fused", "torchvision", "(local)", "fused", "(local)"]
    ):
        axes[row, 0].set_ylabel(label)
    out = ROOT / "docs" / "crops.png"
    figure.savefig(out, dpi=60)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
