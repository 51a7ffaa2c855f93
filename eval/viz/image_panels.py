"""Draw panels of single images for one checkpoint, and measure what they show.

Images come one after another, and patch features wait in a file until the components of all are
known. So the memory needed grows with the size of one image alone.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.memory import is_out_of_memory
from ssl_xcit.utils.terminal import track

from ..features.extractor import FeatureExtractor
from ..tasks.masks import finite
from . import attention, channels, patches, pictures
from .album import Section, Tile, write_tile
from .attention import AttentionPass
from .patch_similarity import write_features
from .pictures import Drawn, LabelledPicture, Picture

log = logging.getLogger(__name__)
KINDS = ("attention", "pca", "channels")
THUMB = 224  # long side of small pictures


class PanelOptions(NamedTuple):
    """How single images are drawn."""

    kinds: Sequence[str]  # some of `KINDS`
    size: int | None  # long side at most, in pixels; None: as the files are
    block: int  # of class attention, 1 or 2
    mass: float  # share of the attention that a mask holds
    overlay: float  # strength of the colours over the photograph
    patch: Sequence[int | float] | None  # [row, column] that others are compared with; None: none
    threshold: float | None  # of the foreground; None: Otsu's


def least_memory(backbone: XCiT, height: int, width: int) -> int:
    """Bytes that a pass needs at least: the first convolution's output, half of the sides, and
    what GELU makes of it. (Measured: 2.3 times that output for 12 megapixels, more for few.)
    """
    first = backbone.patch_embed.get_submodule("proj.0.0")
    assert isinstance(first, nn.Conv2d)
    return 2 * 4 * first.out_channels * (height // 2) * (width // 2)


def free_memory() -> float:
    """Bytes that this machine, or the container, can give, as Linux tells; elsewhere no limit."""
    limits = [math.inf]
    with suppress(OSError, ValueError, IndexError):
        words = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
        limits.append(1024 * int(words[0]))
    with suppress(OSError, ValueError):  # `max` where there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


@dataclass
class ImageTiles:
    """An image, and the pictures made from it."""

    file: Path  # its path
    name: str  # its folder in the output
    tiles: dict[str, list[Tile]] = field(default_factory=dict)  # by checkpoint, itself first
    left_out: str = ""  # why it cannot be used; empty where it can


@dataclass
class ImagePanels:
    """The panels of one checkpoint, drawn image by image, and their numbers."""

    options: PanelOptions  # how they are drawn
    extractor: FeatureExtractor  # the backbone
    label: str  # of the checkpoint
    inside: str  # folder of its pictures below an image's; empty for the only checkpoint
    out: Path  # folder of the page
    features: patches.PatchStore  # of the patches of all images
    summary: channels.Summary = field(default_factory=channels.Summary)
    used: list[ImageTiles] = field(default_factory=list)
    attention: dict[str, Any] = field(default_factory=dict)
    num_similar: int = 0  # images that have the patch which others are compared with

    def draw(self, image: ImageTiles, backbone: XCiT) -> None:
        """Draw what one image needs alone, and keep what is needed of it later; raises BadImage
        where it cannot be read, or is too large for the memory.
        """
        options = self.options
        pixels, sides = pictures.read_fitted(
            image.file, self.extractor.preprocess, options.size, backbone.patch_size
        )
        output, matrices = self.forward(pixels, backbone)
        finite(output.patches, image.file)
        finite(output.attention, image.file)
        picture = pictures.visible(pixels)
        title, used = f"{sides[1]} x {sides[0]}", f"{picture.shape[1]} x {picture.shape[0]}"
        title += f" as {used}" if used != title else ""
        self.write(image, Drawn("Image", title, "image", picture))
        if "attention" in options.kinds:
            heads = output.attention[0, options.block - 1]
            itself = output.on_class_token[0, options.block - 1]
            panels = attention.attention_pictures(picture, heads, options.mass, options.overlay)
            for drawn in panels:
                self.write(image, drawn)
            self.attention[image.name] = {
                "peak": [round(v, 4) for v in attention.peak(heads).tolist()],
                "weight_on_class_token": [round(v, 6) for v in itself.tolist()],
            }
        if "pca" in options.kinds:
            self.features.add(output.patches[0])
            self.keep_features(image, output.patches[0])
            if options.patch is not None:
                self.compare(image, picture, sides, output.patches[0])
        if matrices:
            self.summary.add(torch.stack(matrices)[:, 0])
        self.used.append(image)

    def forward(self, pixels: Pixels, backbone: XCiT) -> tuple[AttentionPass, list[Tensor]]:
        """One pass over an image, and its channel attention; raises BadImage without memory."""
        height, width, _ = pixels.shape
        message = (
            f"not enough memory for {width} x {height} pixels: try size={max(height, width) // 2}"
        )
        on_cpu = torch.device(self.extractor.device).type == "cpu"
        if on_cpu and least_memory(backbone, height, width) > free_memory():
            raise BadImage(message)  # Linux would give it, and then end the process
        recorder: AbstractContextManager[list[Tensor]] = nullcontext([])
        if "channels" in self.options.kinds:
            recorder = channels.recorded(backbone)
        try:
            with recorder as matrices:
                return attention.forward(backbone, self.extractor.images(pixels)), matrices
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BadImage(message) from error

    def keep_features(self, image: ImageTiles, features: Float[Tensor, "C h w"]) -> None:
        """Write patch features for the page, where a patch can be clicked."""
        tile = image.tiles[self.label][0]
        file = tile.file.removesuffix(".png") + "-features.js"
        write_features(features, self.out / file)
        image.tiles[self.label][0] = tile._replace(features=file)

    def compare(
        self,
        image: ImageTiles,
        picture: Picture,
        sides: tuple[int, int],
        features: Float[Tensor, "C h w"],
    ) -> None:
        """Draw the similarity to the chosen patch, where the image has it."""
        assert self.options.patch is not None
        patch, grid = list(self.options.patch), (features.shape[1], features.shape[2])
        place = patches.place_of(patch, sides, grid)
        if place is None:
            log.warning("%s, %d x %d, has no patch=%s", image.file, sides[1], sides[0], patch)
            return
        self.num_similar += 1
        self.write(
            image, patches.similarity_picture(picture, features, place, self.options.overlay)
        )

    def write(self, image: ImageTiles, drawn: Drawn) -> None:
        """Write a picture with its thumbnail, and note it as the image's."""
        parts = (image.name, self.inside, f"{drawn.name}.png")
        tile = Tile(drawn.kind, drawn.title, "/".join(part for part in parts if part))
        write_tile(drawn.picture, self.out, tile, THUMB)
        image.tiles.setdefault(self.label, []).append(tile)

    def components(self) -> dict[str, Any]:
        """Draw colours and foreground of all images together; their numbers."""
        maps = self.features.maps(self.options.threshold)
        for image, colours, kept in zip(self.used, maps.colours, maps.foreground, strict=True):
            picture = pictures.read_png(self.out / image.tiles[self.label][0].file)
            for drawn in patches.component_pictures(picture, colours, kept):
                self.write(image, drawn)
        shares = [round(float(kept.double().mean()), 6) for kept in maps.foreground]
        return {
            "explained": [round(v, 6) for v in maps.explained],
            "threshold": round(maps.threshold, 6),
            "foreground": {i.name: share for i, share in zip(self.used, shares, strict=True)},
        }


def draw_panels(
    options: PanelOptions,
    extractor: FeatureExtractor,
    label: str,
    inside: str,
    images: Sequence[ImageTiles],
    out: Path,
) -> tuple[dict[str, Any], channels.Summary]:
    """Draw every image that can be read; the numbers and the channel attention of a checkpoint.
    Raises UserError where no image can be used, or none has the patch.
    """
    waiting = [image for image in images if not image.left_out]
    with TemporaryFile(dir=out) as file, extractor.inference() as backbone:
        store = patches.PatchStore(file, backbone.embed_dim)
        panels = ImagePanels(options, extractor, label, inside, out, store)
        for image in track(waiting, label, show=extractor.show):
            try:
                panels.draw(image, backbone)
            except BadImage as bad:
                image.left_out = str(bad)
        for image in waiting:
            if image.left_out:
                log.warning("%s is left out: %s", image.file, image.left_out)
        if not panels.used:
            reason = f"the first, {images[0].file}: {images[0].left_out}"
            raise UserError(f"images: none of {len(images)} can be used; {reason}")
        if options.patch is not None and store.grids and not panels.num_similar:
            raise UserError(f"patch={list(options.patch)} lies outside of every image")
        numbers: dict[str, Any] = {}
        if panels.attention:
            numbers["attention"] = {"block": options.block, "images": panels.attention}
        if store.grids:
            numbers["pca"] = panels.components()
        if panels.summary.count:
            numbers["channels"] = panels.summary.numbers()
    return numbers, panels.summary


def image_section(image: ImageTiles, labels: Sequence[str], out: Path) -> Section:
    """All pictures of an image; side by side, a row of one kind for each checkpoint."""
    kinds = dict.fromkeys(tile.kind for tile in image.tiles[labels[0]])
    rows = []
    for kind in list(kinds)[1:]:
        for label in labels:
            first, *others = image.tiles[label]
            tiles = [first, *(tile for tile in others if tile.kind == kind)]
            cells = [LabelledPicture(t.title, pictures.read_png(out / t.thumb)) for t in tiles]
            rows.append((f"{kind}, {label}" if len(labels) > 1 else kind, cells))
    sheet = None
    if rows:
        sheet = f"{image.name}/sheet.png"
        pictures.write_png(pictures.labelled_sheet(rows), out / sheet)
    groups = [(label if len(labels) > 1 else "", image.tiles[label]) for label in labels]
    return Section(image.name, sheet, groups)
