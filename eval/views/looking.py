"""One checkpoint's way through the images that are looked at: what is drawn of each, and what is
counted.

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
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor, nn

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.preprocess import Pixels
from ssl_xcit.errors import UserError
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.terminal import track
from ssl_xcit.training.memory import is_out_of_memory

from ..frozen import Frozen
from ..masks import finite
from . import album, attention, channels, patches, pictures
from .album import Section, Tile
from .attention import Looked
from .clicks import write_features
from .pictures import Cell, Drawn, Picture

log = logging.getLogger(__name__)
THUMB = 224  # long side of small pictures


def least_memory(backbone: XCiT, height: int, width: int) -> int:
    """Bytes below which no pass can stay: the first convolution's output, half of the sides, and
    what GELU makes of it. (Measured: 2.3 times that output for 12 megapixels, more for few.)
    """
    first = backbone.patch_embed.get_submodule("proj.0.0")
    assert isinstance(first, nn.Conv2d)
    return 2 * 4 * first.out_channels * (height // 2) * (width // 2)


def free_memory() -> float:
    """Bytes that this machine, or the container, can give, as Linux tells; elsewhere no limit."""
    found = [math.inf]
    with suppress(OSError, ValueError, IndexError):
        words = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
        found.append(1024 * int(words[0]))
    with suppress(OSError, ValueError):  # `max` where there is none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


@dataclass
class Shot:
    """An image, and what was drawn of it.

    Args:
        file: as it was found.
        name: its folder in the output.
        tiles: by checkpoint, the image itself first.
        left_out: why it cannot be used; empty where it can.
    """

    file: Path
    name: str
    tiles: dict[str, list[Tile]] = field(default_factory=dict)
    left_out: str = ""


@dataclass
class Pass:
    """One checkpoint's way through all images: what it draws and what it counts.

    Args:
        cfg: the settings.
        kinds: of pictures that are wanted.
        frozen: the backbone.
        label: of the checkpoint.
        inside: folder of its pictures below an image's; empty for the only checkpoint.
        out: folder of the page.
        features: of the patches of all images.
    """

    cfg: DictConfig
    kinds: Sequence[str]
    frozen: Frozen
    label: str
    inside: str
    out: Path
    features: patches.Collected
    summary: channels.Summary = field(default_factory=channels.Summary)
    used: list[Shot] = field(default_factory=list)
    attention: dict[str, Any] = field(default_factory=dict)
    similar: int = 0  # images that have the patch which others are compared with

    def take(self, shot: Shot, backbone: XCiT) -> None:
        """Draw what one image needs alone, and keep what is needed of it later.

        Raises:
            BadImage: it cannot be read, or is too large for the memory.
        """
        cfg = self.cfg
        pixels, sides = pictures.read_fitted(
            shot.file, self.frozen.how, cfg.size, backbone.patch_size
        )
        looked, matrices = self.look(pixels, backbone)
        finite(looked.patches, shot.file)
        finite(looked.attention, shot.file)
        picture = pictures.visible(pixels)
        title, used = f"{sides[1]} x {sides[0]}", f"{picture.shape[1]} x {picture.shape[0]}"
        title += f" as {used}" if used != title else ""
        self.write(shot, Drawn("Image", title, "image", picture))
        if "attention" in self.kinds:
            heads, itself = looked.attention[0, cfg.block - 1], looked.itself[0, cfg.block - 1]
            for drawn in attention.drawn(picture, heads, cfg.mass, cfg.overlay):
                self.write(shot, drawn)
            self.attention[shot.name] = {
                "peak": [round(v, 4) for v in attention.peak(heads).tolist()],
                "weight_on_class_token": [round(v, 6) for v in itself.tolist()],
            }
        if "pca" in self.kinds:
            self.features.add(looked.patches[0])
            self.keep_features(shot, looked.patches[0])
            if cfg.patch is not None:
                self.compare(shot, picture, sides, looked.patches[0])
        if matrices:
            self.summary.add(torch.stack(matrices)[:, 0])
        self.used.append(shot)

    def look(self, pixels: Pixels, backbone: XCiT) -> tuple[Looked, list[Tensor]]:
        """What one pass shows of an image, and the matrices of its channel attention.

        Raises:
            BadImage: it is too large for the memory.
        """
        height, width, _ = pixels.shape
        trouble = (
            f"not enough memory for {width} x {height} pixels: try size={max(height, width) // 2}"
        )
        on_cpu = torch.device(self.frozen.device).type == "cpu"
        if on_cpu and least_memory(backbone, height, width) > free_memory():
            raise BadImage(trouble)  # Linux would give it, and then end the process
        watch: AbstractContextManager[list[Tensor]] = nullcontext([])
        if "channels" in self.kinds:
            watch = channels.watched(backbone)
        try:
            with watch as matrices:
                return attention.look(backbone, self.frozen.images(pixels)), matrices
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BadImage(trouble) from error

    def keep_features(self, shot: Shot, features: Float[Tensor, "C h w"]) -> None:
        """For the page, where a patch can be clicked."""
        image = shot.tiles[self.label][0]
        file = image.file.removesuffix(".png") + "-features.js"
        write_features(features, self.out / file)
        shot.tiles[self.label][0] = image._replace(features=file)

    def compare(
        self, shot: Shot, picture: Picture, sides: tuple[int, int], features: Float[Tensor, "C h w"]
    ) -> None:
        """Draw the similarity to the chosen patch, where the image has it."""
        patch, grid = list(self.cfg.patch), (features.shape[1], features.shape[2])
        place = patches.place_of(patch, sides, grid)
        if place is None:
            log.warning("%s, %d x %d, has no patch=%s", shot.file, sides[1], sides[0], patch)
            return
        self.similar += 1
        drawn = patches.drawn_similarity(picture, features, place, self.cfg.overlay)
        self.write(shot, drawn)

    def write(self, shot: Shot, drawn: Drawn) -> None:
        """A picture with its thumbnail, noted as the image's."""
        parts = (shot.name, self.inside, f"{drawn.name}.png")
        tile = Tile(drawn.kind, drawn.title, "/".join(part for part in parts if part))
        album.write_tile(drawn.picture, self.out, tile, THUMB)
        shot.tiles.setdefault(self.label, []).append(tile)

    def components(self) -> dict[str, Any]:
        """Draw colours and foreground of all images together."""
        maps = self.features.maps(self.cfg.threshold)
        for shot, colours, kept in zip(self.used, maps.colours, maps.foreground, strict=True):
            picture = pictures.read_png(self.out / shot.tiles[self.label][0].file)
            for drawn in patches.drawn_components(picture, colours, kept):
                self.write(shot, drawn)
        shares = [round(float(kept.double().mean()), 6) for kept in maps.foreground]
        return {
            "explained": [round(v, 6) for v in maps.explained],
            "threshold": round(maps.threshold, 6),
            "foreground": {s.name: share for s, share in zip(self.used, shares, strict=True)},
        }


def look_through(
    cfg: DictConfig,
    kinds: Sequence[str],
    frozen: Frozen,
    label: str,
    inside: str,
    shots: Sequence[Shot],
    out: Path,
) -> tuple[dict[str, Any], channels.Summary]:
    """Draw every image that can be read; the numbers and the channel attention of a checkpoint.

    Raises:
        UserError: no image can be used, or none has the patch.
    """
    waiting = [shot for shot in shots if not shot.left_out]
    with TemporaryFile(dir=out) as file, frozen.looking() as backbone:
        collected = patches.Collected(file, backbone.embed_dim)
        done = Pass(cfg, kinds, frozen, label, inside, out, collected)
        for shot in track(waiting, label, show=frozen.show):
            try:
                done.take(shot, backbone)
            except BadImage as bad:
                shot.left_out = str(bad)
        for shot in waiting:
            if shot.left_out:
                log.warning("%s is left out: %s", shot.file, shot.left_out)
        if not done.used:
            reason = f"the first, {shots[0].file}: {shots[0].left_out}"
            raise UserError(f"images: none of {len(shots)} can be used; {reason}")
        if cfg.patch is not None and collected.grids and not done.similar:
            raise UserError(f"patch={list(cfg.patch)} lies outside of every image")
        found: dict[str, Any] = {}
        if done.attention:
            found["attention"] = {"block": cfg.block, "images": done.attention}
        if collected.grids:
            found["pca"] = done.components()
        if done.summary.count:
            found["channels"] = done.summary.numbers()
    return found, done.summary


def image_section(shot: Shot, labels: Sequence[str], out: Path) -> Section:
    """All that was drawn of an image; side by side, a row of one kind for each checkpoint."""
    kinds = dict.fromkeys(tile.kind for tile in shot.tiles[labels[0]])
    rows = []
    for kind in list(kinds)[1:]:
        for label in labels:
            image, *others = shot.tiles[label]
            shown = [image, *(tile for tile in others if tile.kind == kind)]
            cells = [Cell(tile.title, pictures.read_png(out / tile.thumb)) for tile in shown]
            rows.append((f"{kind}, {label}" if len(labels) > 1 else kind, cells))
    sheet = None
    if rows:
        sheet = f"{shot.name}/sheet.png"
        pictures.write_png(pictures.sheet(rows), out / sheet)
    groups = [(label if len(labels) > 1 else "", shot.tiles[label]) for label in labels]
    return Section(shot.name, sheet, groups)
