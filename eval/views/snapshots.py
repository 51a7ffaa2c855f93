"""Pictures over training: what the teacher sees of a few fixed images at moments spread over the
run, left in `RUN/pictures/` for the report, and handed to wandb or TensorBoard where one is on.

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
from typing import Any, NamedTuple

import cv2
import lightning
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ssl_xcit.data.decode import BadImage, open_picture, read_image
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import Pixels, Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.files import write_json
from ssl_xcit.training.loggers import give_images, takes_images
from ssl_xcit.training.memory import is_out_of_memory, release
from ssl_xcit.training.module import DINO

from ..frozen import Frozen
from ..masks import finite, resize_image
from ..settings import number
from . import attention, channels, patches, pictures
from .data_set import evenly
from .pictures import Cell, Picture

log = logging.getLogger(__name__)
FOLDER = "pictures"  # of the run
INDEX = "index.json"
STRENGTH = 0.65  # of the colours over the photograph
MASS = 0.6
QUALITY = 88  # of the JPEGs


class Shown(NamedTuple):
    """An image that is looked at again and again."""

    name: str  # of its source
    label: str | None  # its class
    pixels: Pixels


class Seen(NamedTuple):
    """What one moment shows of the images, in their order."""

    attention: list[Picture]
    pca: list[Picture]
    entropy: list[float]  # of channel attention over ln d, of each block


class Snapshots(lightning.Callback):
    """Attention and components of fixed images at moments spread over the run.

    The images are evenly spaced ones of the labelled test part, or of the training images where
    there are no labels. Rank 0 looks, with the teacher in eval mode and float32. No random number
    is drawn and no statistic moves, so a run with it equals one without; trouble is said once, and
    training goes on.

    Args:
        images: how many.
        moments: how often: before the first step, after the last, and evenly between.
        size: long side in pixels; sides become multiples of the patch.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(self, images: int = 6, moments: int = 8, size: int = 224):
        self.images: int = number("callbacks.snapshots.images", images, int, 1)
        self.moments: int = number("callbacks.snapshots.moments", moments, int, 2)
        self.size: int = number("callbacks.snapshots.size", size, int, 16)
        self.shown: list[Shown] = []
        self.steps: set[int] = set()
        self.done: list[dict[str, Any]] = []  # as the index has them
        self.folder = Path(FOLDER)
        self.warned = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Choose the images; forget moments behind the step that the run goes on from."""
        if not trainer.is_global_zero:
            return
        assert isinstance(module, DINO)
        self.folder = Path(trainer.default_root_dir) / FOLDER
        self.steps = set(moments_of(self.moments, trainer.max_steps))
        try:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            patch = module.teacher.backbone.patch_size
            self.shown = self.chosen(data, max(self.size // patch, 1) * patch, patch)
            self.resume(trainer.global_step)
        except Exception as error:
            self.warn(error)
        self.look(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        """Look where it is time."""
        self.look(trainer, module)

    def chosen(self, data: Any, side: int, patch: int) -> list[Shown]:
        """Images that can be read, the long side at `side`, both multiples of the patch."""
        pair, how = data.eval_data, data.dataset.how
        source = data.dataset.source if pair is None else pair.test
        found, bad = [], []
        for index in evenly(len(source), self.images):
            try:
                pixels = read_sized(source, index, how, side, patch)
            except BadImage as error:
                bad.append(BadImage(f"{source.name(index)}: {error}"))
                continue
            found.append(Shown(source.name(index), class_of(source, index), pixels))
        if bad:
            self.warn(bad[0])
        return found

    def resume(self, step: int) -> None:
        """Keep the moments up to the step, if they show these images; a run that starts has none.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            content = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.done = []
        with suppress(KeyError, TypeError):
            if step and content["images"] == self.about():
                self.done = [one for one in content["moments"] if one["step"] <= step]
        if step and content and content.get("images") != self.about():
            log.warning(
                "%s: the pictures until step %d are of other images than now (%s); they begin anew",
                self.folder, step, ", ".join(one["name"] for one in self.about()) or "none",
            )  # fmt: skip
        kept = {name for one in self.done for name in (*one["attention"], *one["pca"])}
        for pattern in ("attention-*.jpg", "pca-*.jpg"):
            for file in self.folder.glob(pattern):
                if file.name not in kept:
                    file.unlink()
        for entry, shown in zip(self.about(), self.shown, strict=True):
            write_jpeg(pictures.visible(shown.pixels), self.folder / entry["file"])
        self.write_index()

    def about(self) -> list[dict[str, Any]]:
        """The images, as the index has them."""
        return [
            {"name": shown.name, "label": shown.label, "file": f"image-{i}.jpg"}
            for i, shown in enumerate(self.shown)
        ]

    def write_index(self) -> None:
        """Behind the pictures that it names, so all of them are there."""
        write_json({"images": self.about(), "moments": self.done}, self.folder / INDEX)

    def look(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """One moment, if this is one; on rank 0, and nobody waits but at the next step."""
        step = trainer.global_step
        if not self.shown or step not in self.steps:
            return
        if any(one["step"] == step for one in self.done):
            return
        assert isinstance(module, DINO)
        try:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            frozen = Frozen(module.teacher.backbone, data.dataset.how, module.device)
            self.keep(step, frozen, trainer)
        except Exception as error:
            if is_out_of_memory(error):
                release()
            self.warn(error)

    def keep(self, step: int, frozen: Frozen, trainer: lightning.Trainer) -> None:
        """Draw and write a moment; a part of it does not stay."""
        began = time.monotonic()
        seen = self.seen(frozen)
        names = {
            kind: [f"{kind}-{step:07d}-{i}.jpg" for i in range(len(self.shown))]
            for kind in ("attention", "pca")
        }
        moment = {"step": step, "seconds": 0.0, **names, "entropy": seen.entropy}
        try:
            for kind in ("attention", "pca"):
                for name, picture in zip(names[kind], getattr(seen, kind), strict=True):
                    write_jpeg(picture, self.folder / name)
            moment["seconds"] = round(time.monotonic() - began, 4)
            self.done.append(moment)
            self.write_index()
        except BaseException:
            self.done = [one for one in self.done if one is not moment]
            for name in (*names["attention"], *names["pca"]):
                with suppress(OSError):
                    (self.folder / name).unlink()
            raise
        takers = [logger for logger in trainer.loggers if takes_images(logger)]
        if takers:
            sheet = self.sheet(seen)
            for logger in takers:
                give_images(logger, "pictures", [sheet], step)

    def seen(self, frozen: Frozen) -> Seen:
        """One pass for all images of a shape."""
        summary = channels.Summary()
        maps: dict[int, Picture] = {}
        features: dict[int, Tensor] = {}
        with frozen.looking() as backbone:
            for places in self.by_shape():
                images = frozen.images(*(self.shown[i].pixels for i in places))
                with channels.watched(backbone) as found:
                    looked = attention.look(backbone, images)
                finite(looked.patches, *(Path(self.shown[i].name) for i in places))
                for n, i in enumerate(places):
                    summary.add(torch.stack([block[n] for block in found]))
                    picture, heads = pictures.visible(self.shown[i].pixels), looked.attention[n, -1]
                    maps[i] = next(iter(attention.drawn(picture, heads, MASS, STRENGTH))).picture
                    features[i] = looked.patches[n].cpu()
        order = range(len(self.shown))
        colours = self.components([features[i] for i in order])
        return Seen([maps[i] for i in order], colours, summary.numbers()["entropy"])

    def by_shape(self) -> list[list[int]]:
        """Places of images of one shape."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, shown in enumerate(self.shown):
            groups.setdefault(shown.pixels.shape, []).append(i)
        return list(groups.values())

    def components(self, features: Sequence[Float[Tensor, "C h w"]]) -> list[Picture]:
        """The first three over the patches of all images, as colours."""
        moments = patches.Moments(len(features[0]))
        rows = [one.flatten(1).mT for one in features]
        for each in rows:
            moments.add(each)
        found = moments.components()
        scores = torch.cat([patches.scores_of(each, found) for each in rows])
        before = self.colours_before([(one.shape[1], one.shape[2]) for one in features])
        if before is not None:
            scores = aligned(scores, before)
        colours = patches.as_colours(scores).split([len(each) for each in rows])
        drawn = []
        for shown, one, each in zip(self.shown, features, colours, strict=True):
            rgb = np.rint(each.unflatten(0, one.shape[1:]).numpy() * 255).astype(np.uint8)
            drawn.append(pictures.blocky(rgb, *shown.pixels.shape[:2]))
        return drawn

    def colours_before(
        self, grids: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "N components"] | None:
        """Those of the moment before, of the patches of all images; None where there are none."""
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

    def sheet(self, seen: Seen) -> Picture:
        """All of a moment in one: a row an image."""
        rows = []
        for shown, looks, colours in zip(self.shown, seen.attention, seen.pca, strict=True):
            cells = [
                Cell("image", pictures.visible(shown.pixels)),
                Cell("class attention, mean of the heads", looks),
                Cell("components 1 to 3 as RGB", colours),
            ]
            rows.append((shown.label or Path(shown.name).name, cells))
        return pictures.sheet(rows)

    def warn(self, error: Exception) -> None:
        """Once a run."""
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


def class_of(source: Source, index: int) -> str | None:
    """The name of its class; None without classes."""
    if source.labels is None or label_kind(source.labels) != "classes":
        return None
    label = int(source.labels[index])
    return source.class_names[label] if label < len(source.class_names) else str(label)


def read_sized(source: Source, index: int, how: Preprocess, side: int, patch: int) -> Pixels:
    """An image with its long side at `side`, also where it is smaller, and the other at the nearest
    multiple of the patch.

    Raises:
        BadImage: it cannot be read.
    """
    found = open_picture(source.read(index), how)
    scale = side / max(found.height, found.width)
    height, width = (
        min(max(1, round(length * scale / patch)) * patch, side)
        for length in (found.height, found.width)
    )
    return resize_image(found.pixels(max(1.0, 1.0 / scale)), height, width)


def aligned(
    scores: Float[Tensor, "N components"], before: Float[Tensor, "N components"]
) -> Float[Tensor, "N components"]:
    """Scores with their columns in the order and with the signs of the largest sum of correlations
    with those before.
    """

    def unit(values: Tensor) -> Tensor:
        centred = values - values.mean(dim=0)
        return centred / centred.norm(dim=0).clamp_min(1e-12)

    fit = (unit(scores.double()).mT @ unit(before.double())).numpy()
    rows, columns = linear_sum_assignment(-np.abs(fit))
    order = rows[np.argsort(columns)]
    signs = np.where(fit[order, np.arange(len(order))] < 0, -1.0, 1.0)
    return scores[:, torch.from_numpy(order)] * torch.from_numpy(signs).to(scores)


def write_jpeg(picture: Picture, path: Path) -> None:
    """Colours in full, for patches have sharp borders."""
    Image.fromarray(picture).save(path, "JPEG", quality=QUALITY, subsampling=0)
