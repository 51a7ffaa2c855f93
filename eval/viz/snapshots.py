"""Draw pictures over training: attention and components of a few fixed images at moments spread
over the run, left in `RUN/pictures/` for the report, and handed to wandb or TensorBoard if on.

Attention and components are drawn as by `visualize`. Differs: components are given the order and
the signs that fit those of the moment before, so that a colour stays with what it showed while the
features turn. What fits is read from the pictures of that moment, so a run that goes on has the
same colours as one that was never stopped.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import lightning
import numpy as np
import scipy  # parts are imported when they are used first
import torch
from annotated_types import Ge
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssl_xcit.data.decode import open_picture, read_image
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.training.datamodule import data_of
from ssl_xcit.training.loggers import give_images, takes_images
from ssl_xcit.training.memory import is_out_of_memory, release
from ssl_xcit.training.module import Pretraining
from ssl_xcit.utils.files import write_json

from ..features.extractor import FeatureExtractor
from ..tasks.masks import finite, resize_image
from . import attention, channels, patches, pictures
from .dataset import class_name
from .pictures import LabelledPicture, Picture

log = logging.getLogger(__name__)
FOLDER = "pictures"  # of the run
INDEX = "index.json"
STRENGTH = 0.65  # of the colours over the photograph
MASS = 0.6
QUALITY = 88  # of the JPEGs


class FixedImage(NamedTuple):
    """An image that is drawn at every moment."""

    name: str  # of its source
    label: str | None  # its class
    pixels: Pixels


class Panels(NamedTuple):
    """The pictures of one moment, in the order of the images, and its entropy."""

    attention: list[Picture]
    pca: list[Picture]
    entropy: list[float]  # of channel attention over ln d, of each block


class Snapshots(lightning.Callback):
    """Attention and components of fixed images at moments spread over the run.

    The images are evenly spaced ones of the labelled test part, or of the training images where
    there are no labels. Rank 0 draws, with the teacher in eval mode and float32. No random number
    is drawn and no statistic moves, so a run with it equals one without; trouble is a warning,
    once, and training goes on.

    Args:
        images: how many.
        moments: how often: before the first step, after the last, and evenly between, as the run
            was planned.
        size: long side in pixels; sides become multiples of the patch.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(1)] = 6,
        moments: Annotated[int, Ge(2)] = 8,
        size: Annotated[int, Ge(16)] = 224,
    ):
        self.num_images, self.num_moments, self.size = images, moments, size
        self.images: list[FixedImage] = []
        self.steps: set[int] = set()
        self.done: list[dict[str, Any]] = []  # as the index has them
        self.folder = Path(FOLDER)
        self.warned = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Choose the images; forget moments after the step that the run resumes from."""
        if not trainer.is_global_zero:
            return
        assert isinstance(module, Pretraining)
        self.folder = Path(trainer.default_root_dir) / FOLDER
        self.steps = set(moments_of(self.num_moments, trainer.max_steps))
        try:
            data = data_of(trainer)
            patch = module.teacher.backbone.patch_size
            self.images = self.choose(data, max(self.size // patch, 1) * patch, patch)
            self.resume(trainer.global_step)
        except Exception as error:
            self.warn(error)
        self.draw_moment(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        """Draw where it is time."""
        self.draw_moment(trainer, module)

    def choose(self, data: Any, side: int, patch: int) -> list[FixedImage]:
        """Images that can be read, the long side at `side`, both multiples of the patch."""
        pair, preprocess = data.eval_data, data.dataset.preprocess
        source = data.dataset.source if pair is None else pair.test
        images, bad = [], []
        for index in evenly_spaced(len(source), self.num_images):
            try:
                pixels = read_sized(source, index, preprocess, side, patch)
            except BadImage as error:
                bad.append(BadImage(f"{source.name(index)}: {error}"))
                continue
            images.append(FixedImage(source.name(index), class_name(source, index), pixels))
        if bad:
            log.warning("callbacks.snapshots: %s; %d of its images are left out", bad[0], len(bad))
        return images

    def resume(self, step: int) -> None:
        """Keep the moments up to the step, if they show these images; a run that starts has none.
        Raises OSError where the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            content = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.done = []
        with suppress(KeyError, TypeError):
            if step and content["images"] == self.about():
                self.done = [m for m in content["moments"] if m["step"] <= step]
        if step and content and content.get("images") != self.about():
            names = ", ".join(image.name for image in self.images) or "no images"
            message = "%s: snapshot images changed; starting over from step %d with %s"
            log.warning(message, self.folder, step, names)
        kept = {name for m in self.done for name in (*m["attention"], *m["pca"])}
        for pattern in ("attention-*.jpg", "pca-*.jpg"):
            for file in self.folder.glob(pattern):
                if file.name not in kept:
                    file.unlink()
        for entry, image in zip(self.about(), self.images, strict=True):
            write_jpeg(pictures.visible(image.pixels), self.folder / entry["file"])
        self.write_index()

    def about(self) -> list[dict[str, Any]]:
        """The entries of the images in the index."""
        return [
            {"name": image.name, "label": image.label, "file": f"image-{i}.jpg"}
            for i, image in enumerate(self.images)
        ]

    def write_index(self) -> None:
        """Write the index after the pictures that it names, so all of them are there."""
        write_json({"images": self.about(), "moments": self.done}, self.folder / INDEX)

    def draw_moment(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Draw one moment, if this is one; on rank 0, and the others wait only at the next step."""
        step = trainer.global_step
        if not self.images or not (step in self.steps or step == trainer.max_steps):
            return
        if any(moment["step"] == step for moment in self.done):
            return
        assert isinstance(module, Pretraining)
        try:
            data = data_of(trainer)
            backbone = module.teacher.backbone
            extractor = FeatureExtractor(backbone, data.dataset.preprocess, module.device)
            self.keep(step, extractor, trainer)
        except Exception as error:
            if is_out_of_memory(error):
                release()
            self.warn(error)

    def keep(self, step: int, extractor: FeatureExtractor, trainer: lightning.Trainer) -> None:
        """Draw and write a moment, whole or not at all."""
        began = time.monotonic()
        panels = self.draw(extractor)
        names = {
            kind: [f"{kind}-{step:07d}-{i}.jpg" for i in range(len(self.images))]
            for kind in ("attention", "pca")
        }
        moment = {"step": step, "seconds": 0.0, **names, "entropy": panels.entropy}
        try:
            for kind in ("attention", "pca"):
                for name, picture in zip(names[kind], getattr(panels, kind), strict=True):
                    write_jpeg(picture, self.folder / name)
            moment["seconds"] = round(time.monotonic() - began, 4)
            self.done.append(moment)
            self.write_index()
        except BaseException:
            self.done = [m for m in self.done if m is not moment]
            for name in (*names["attention"], *names["pca"]):
                with suppress(OSError):
                    (self.folder / name).unlink()
            raise
        takers = [logger for logger in trainer.loggers if takes_images(logger)]
        if takers:
            sheet = self.sheet(panels)
            for logger in takers:
                give_images(logger, "pictures", [sheet], step)

    def draw(self, extractor: FeatureExtractor) -> Panels:
        """The pictures of a moment, by one pass for all images of a shape."""
        summary = channels.Summary()
        by_shape: dict[tuple[int, ...], list[int]] = {}  # places of the images
        for i, image in enumerate(self.images):
            by_shape.setdefault(image.pixels.shape, []).append(i)
        maps: dict[int, Picture] = {}
        features: dict[int, Tensor] = {}
        with extractor.inference() as backbone:
            for places in by_shape.values():
                images = extractor.images(*(self.images[i].pixels for i in places))
                with channels.recorded(backbone) as matrices:
                    output = attention.forward(backbone, images)
                finite(output.patches, *(Path(self.images[i].name) for i in places))
                for n, i in enumerate(places):
                    summary.add(torch.stack([block[n] for block in matrices]))
                    picture = pictures.visible(self.images[i].pixels)
                    mean, *_ = attention.attention_pictures(
                        picture, output.attention[n, -1], MASS, STRENGTH
                    )
                    maps[i] = mean.picture
                    features[i] = output.patches[n].cpu()
        order = range(len(self.images))
        colours = self.components([features[i] for i in order])
        return Panels([maps[i] for i in order], colours, summary.numbers()["entropy"])

    def components(self, features: Sequence[Float[Tensor, "C _ _"]]) -> list[Picture]:
        """The first three components over the patches of all images, as colours."""
        moments = patches.Moments(len(features[0]))
        images = [tokens.flatten(1).mT for tokens in features]  # (N, C) each
        for tokens in images:
            moments.add(tokens)
        axes = moments.components()
        scores = torch.cat([patches.scores_of(tokens, axes) for tokens in images])
        grids = [(tokens.shape[1], tokens.shape[2]) for tokens in features]
        before = self.colours_before(grids)
        if before is not None:
            scores = aligned(scores, before)
        colours = patches.as_colours(scores).split([len(tokens) for tokens in images])
        drawn = []
        for image, grid, values in zip(self.images, grids, colours, strict=True):
            rgb = np.rint(values.unflatten(0, grid).numpy() * 255).astype(np.uint8)
            drawn.append(pictures.blocky(rgb, *image.pixels.shape[:2]))
        return drawn

    def colours_before(
        self, grids: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "N components"] | None:
        """Colours of the moment before, of the patches of all images; None where there are none."""
        if not self.done:
            return None
        rows = []
        try:
            for name, (h, w) in zip(self.done[-1]["pca"], grids, strict=True):
                picture = read_image(self.folder / name)
                means = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
                rows.append(torch.from_numpy(means.reshape(h * w, 3)).double())
        except (BadImage, ValueError):  # somebody has removed or changed them
            return None
        return torch.cat(rows)

    def sheet(self, panels: Panels) -> Picture:
        """All pictures of a moment in one: a row an image."""
        rows = []
        for image, maps, colours in zip(self.images, panels.attention, panels.pca, strict=True):
            cells = [
                LabelledPicture("image", pictures.visible(image.pixels)),
                LabelledPicture("class attention, mean of the heads", maps),
                LabelledPicture("components 1 to 3 as RGB", colours),
            ]
            rows.append((image.label or Path(image.name).name, cells))
        return pictures.labelled_sheet(rows)

    def warn(self, error: Exception) -> None:
        """Warn, once a run."""
        if not self.warned:
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning(
                "callbacks.snapshots: %s; some of %s are missing, and training goes on",
                reason, self.folder,
            )  # fmt: skip
        self.warned = True


def moments_of(count: int, last: int) -> list[int]:
    """Steps from 0 to the last, evenly spaced, each once."""
    steps = np.linspace(0, max(last, 0), count).round().astype(int)
    return list(dict.fromkeys(steps.tolist()))


def read_sized(source: Source, index: int, preprocess: Preprocess, side: int, patch: int) -> Pixels:
    """An image with its long side at `side`, also where it is smaller, and the other at the nearest
    multiple of the patch; raises BadImage where it cannot be read.
    """
    opened = open_picture(source.read(index), preprocess)
    scale = side / max(opened.height, opened.width)
    height, width = (
        min(max(1, round(length * scale / patch)) * patch, side)
        for length in (opened.height, opened.width)
    )
    return resize_image(opened.pixels(max(1.0, 1.0 / scale)), height, width)


def aligned(
    scores: Float[Tensor, "N components"], before: Float[Tensor, "N components"]
) -> Float[Tensor, "N components"]:
    """Scores, columns in the order and with the signs that correlate most with those before."""

    def unit(values: Tensor) -> Tensor:
        centred = values - values.mean(dim=0)
        return centred / centred.norm(dim=0).clamp_min(1e-12)

    fit = (unit(scores.double()).mT @ unit(before.double())).numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(-np.abs(fit))
    order = rows[np.argsort(columns)]
    signs = np.where(fit[order, np.arange(len(order))] < 0, -1.0, 1.0)
    return scores[:, torch.from_numpy(order)] * torch.from_numpy(signs).to(scores)


def write_jpeg(picture: Picture, path: Path) -> None:
    """Write a JPEG with its colours in full, for patches have sharp borders."""
    Image.fromarray(picture).save(path, "JPEG", quality=QUALITY, subsampling=0)
