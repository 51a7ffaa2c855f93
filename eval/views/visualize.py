"""The command `visualize`: pictures of what backbones see, and one page that shows them.

For each image and checkpoint: class attention of the heads and of their mean with the masks that
hold a share of it, principal components of the patches as colours, similarity to one patch. For
each checkpoint: its channel attention, and the entropy of that over depth. On request, for each
checkpoint and the images of a data set: nearest neighbours, and the images of each prototype.
Checkpoints are looked through one at a time.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.files import (
    replacing,
    sha256_of,
    sweep,
    writable_folder,
    writable_or_here,
    write_json,
    written_to,
)
from ssl_xcit.models.weights import checkpoint_path, checkpoints_of, load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.run_folder import versions
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say

from ..frozen import Frozen, placed
from ..run import (
    cache_folder,
    check_comparable,
    checkpoints_in,
    expected,
    folder_of,
    short_names,
)
from ..settings import number, several, switch
from . import album, channels, patches, pictures
from .clicks import script
from .data_set import images_of
from .looking import Shot, image_section, look_through
from .searching import TITLES, draw_grids, in_words, without_heads
from .searching import sections as searching_sections

log = logging.getLogger(__name__)
OF_IMAGES = ("attention", "pca", "channels")
FILES = ("channels", *TITLES, "index.html", "visualize.json")  # beside the images' folders


@dataclass
class Found:
    """What came out of all checkpoints, by their labels.

    Args:
        numbers: as `visualize.json` has them.
        summaries: of channel attention.
        grids: label -> kind -> file.
    """

    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    summaries: dict[str, channels.Summary] = field(default_factory=dict)
    grids: dict[str, dict[str, str]] = field(default_factory=dict)


def check(cfg: DictConfig) -> list[str]:
    """Refuse settings that nothing can be drawn with; the kinds of pictures that are wanted.

    Raises:
        UserError: the first of them.
    """
    kinds = several("kinds", cfg.kinds, str)
    if any(kind not in (*OF_IMAGES, *TITLES) for kind in kinds):
        raise UserError(f"kinds={cfg.kinds}: some of {', '.join((*OF_IMAGES, *TITLES))}")
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    if type(cfg.block) is not int or cfg.block not in (1, 2):
        raise UserError(f"block={cfg.block}: 1 or 2, of the two class-attention blocks")
    for name in ("max_images", "columns", "num_prototypes", "batch_size", "max_pixels"):
        number(name, cfg[name], int, 1)
    for name, low in (("size", 1), ("num_workers", 0)):
        if cfg[name] is not None:
            number(name, cfg[name], int, low)
    if cfg.teacher_temp is not None:
        number("teacher_temp", cfg.teacher_temp)
    switch("over_time", cfg.over_time)
    for name, least in (("mass", 1e-6), ("overlay", 0.0)):
        value = cfg[name]
        if type(value) not in (int, float) or not least <= value <= 1.0:
            raise UserError(f"{name}={value}: a share of at most 1, such as 0.6")
    if type(cfg.threshold) not in (int, float, type(None)) or not math.isfinite(cfg.threshold or 0):
        raise UserError(f"threshold={cfg.threshold}: deviations from the mean, or null for Otsu's")
    if cfg.patch is not None:
        patches.check_patch(list(cfg.patch) if isinstance(cfg.patch, ListConfig) else [cfg.patch])
    return list(dict.fromkeys(kinds))


def chosen(cfg: DictConfig) -> dict[str, Path]:
    """Checkpoints by what tells them apart.

    Raises:
        UserError: `over_time` of something else than one run folder.
    """
    wanted = checkpoints_in(cfg.ckpt)
    if not cfg.over_time:
        paths = [checkpoint_path(ckpt) for ckpt in wanted]
        check_comparable(paths, ())  # none is named twice
        return dict(zip(short_names(paths), paths, strict=True))
    paths = checkpoints_of(Path(wanted[0])) if len(wanted) == 1 else []
    if not paths:
        raise UserError(
            f"over_time=true, ckpt={cfg.ckpt}: one run folder with checkpoints/step-*.ckpt; "
            "callbacks.checkpoints of a run says how many are kept"
        )
    return {path.stem: path for path in paths}


def looked_into(
    cfg: DictConfig, paths: Mapping[str, Path]
) -> tuple[dict[str, str], dict[str, Preprocess], dict[str, XCiT]]:
    """Models and preprocessing by label, and the backbone where there is only one.

    Every file is read before any work, so that a wrong one is told at once; of several one is held
    at a time.

    Raises:
        UserError: one cannot be used, they take different images, or `size` is below a patch.
    """
    models, hows, backbones = {}, {}, {}
    for label, path in paths.items():
        backbone = load_backbone(path, cfg.which, expected(cfg))
        models[label] = model_name(backbone.architecture)
        hows[label] = of_weights(backbone.preprocess, cfg.max_pixels)
        if cfg.size is not None and cfg.size < backbone.patch_size:
            raise UserError(f"size={cfg.size}: at least the patch, {backbone.patch_size}")
        if len(paths) == 1:
            backbones[label] = backbone
    check_comparable(list(paths.values()), list(hows.values()))
    return models, hows, backbones


def wanted_files(cfg: DictConfig, kinds: Sequence[str]) -> list[Path]:
    """The images to look at; none where the data set's own are asked with."""
    if cfg.images is None and not any(kind in OF_IMAGES for kind in kinds):
        return []
    images = cfg.images
    if images is not None:
        images = [str(i) for i in images] if isinstance(images, ListConfig) else str(images)
    files, count = pictures.found_images(images, cfg.max_images)
    if count > len(files):
        log.warning("%d of %d images are shown: max_images=%d", len(files), count, cfg.max_images)
    return files


def out_folder(cfg: DictConfig, path: Path) -> Path:
    """Where everything goes; made, and without what a killed process left.

    Raises:
        UserError: `out` is a file, or cannot be written.
    """
    if cfg.out:
        out = Path(str(cfg.out)).expanduser()
        try:
            writable_folder(out)
        except UserError as error:
            raise UserError(f"out={error}; name a folder that can be written") from error
    else:
        out = writable_or_here(folder_of(path), "visualize")
    sweep(out)
    return out


def main(cfg: DictConfig) -> None:
    """`ssl-xcit visualize`: writes pictures, `index.html` and `visualize.json`."""
    kinds = check(cfg)
    paths = chosen(cfg)
    models, hows, backbones = looked_into(cfg, paths)
    lacking = without_heads(cfg, kinds, paths)
    if len(lacking) == len(paths):
        kinds.remove("prototypes")
    files = wanted_files(cfg, kinds)
    data = images_of(cfg) if any(kind in TITLES for kind in kinds) else None
    out = out_folder(cfg, next(iter(paths.values())))
    with written_to(out):
        names = pictures.folder_names([file.stem for file in files], FILES)
        shots = [Shot(file, name) for file, name in zip(files, names, strict=True)]
        found = Found()
        folders = pictures.folder_names(list(paths), ["sheet.png"]) if len(paths) > 1 else [""]
        for label, folder in zip(paths, folders, strict=True):
            backbone = backbones.get(label) or load_backbone(paths[label], cfg.which)
            frozen = Frozen(
                backbone, hows[label], placed(backbone, str(cfg.device))[0], cfg.batch_size,
                cfg.num_workers, show=shown_in_terminal(), cache=cache_folder(cfg.cache),
            )  # fmt: skip
            numbers = found.numbers.setdefault(label, {})
            if any(kind in OF_IMAGES for kind in kinds):
                done = look_through(cfg, kinds, frozen, label, folder, shots, out)
                numbers |= done[0]
                found.summaries[label] = done[1]
            in_data = [k for k in kinds if k in TITLES]
            if label in lacking and "prototypes" in in_data:
                in_data.remove("prototypes")
            if data is not None and in_data:
                asked = None if cfg.images is None else [s.file for s in shots if not s.left_out]
                told, grids = draw_grids(
                    cfg, in_data, frozen, paths[label], data, asked, folder or "grid", out
                )
                numbers |= told
                found.grids[label] = grids
                for kind in grids:
                    before = f"{label}, " if len(paths) > 1 else ""
                    say(f"{before}{kind}: {in_words(kind, told[kind])}")
        shown = [shot for shot in shots if shot.tiles and not shot.left_out]
        write_page(cfg, kinds, models, paths, shown, found, out)
        write_numbers(cfg, models, paths, shots, found.numbers, out)
        count = sum(len(tiles) for shot in shown for tiles in shot.tiles.values())
        num_grids = sum(len(each) for each in found.grids.values())
        parts = [f"{count} pictures of {len(shown)} image{'s' * (len(shown) != 1)}"] * bool(shown)
        parts += [f"{num_grids} grid{'s' * (num_grids != 1)}"] * bool(num_grids)
        say(f"written: {', '.join(parts)}; open {out / 'index.html'}")


def write_numbers(
    cfg: DictConfig,
    models: Mapping[str, str],
    paths: Mapping[str, Path],
    shots: Sequence[Shot],
    numbers: Mapping[str, Any],
    out: Path,
) -> None:
    """`visualize.json`: what was looked at by what, and what came out."""
    write_json(
        {
            "weights": {
                label: {"file": str(path), "sha256": sha256_of(path), "model": models[label]}
                for label, path in paths.items()
            },
            "which": cfg.which,
            "images": {shot.name: str(shot.file) for shot in shots if not shot.left_out},
            "left_out": {str(shot.file): shot.left_out for shot in shots if shot.left_out},
            "results": numbers,
            "overrides": list(HydraConfig.get().overrides.task),
            "versions": versions(),
        },
        out / "visualize.json",
    )


def write_page(
    cfg: DictConfig,
    kinds: Sequence[str],
    models: Mapping[str, str],
    paths: Mapping[str, Path],
    shown: Sequence[Shot],
    found: Found,
    out: Path,
) -> None:
    """`index.html`, with what the pictures mean."""
    words = [f"{paths[label]}: {model}, {cfg.which}" for label, model in models.items()]
    if "attention" in kinds:
        words.append(
            f"Class attention of block {cfg.block} of 2, each map in its own range of colours; the "
            "peak is the largest weight over the mean weight. A mask is the fewest patches that "
            f"hold {cfg.mass:.0%} of the weight."
        )
    if "pca" in kinds:
        words.append(
            "Components are those of the patches of all images together, so within a checkpoint a "
            "colour means the same everywhere; between checkpoints it does not."
        )
    parts = searching_sections(found.numbers, found.grids)
    if "channels" in kinds:
        parts.append(channels.section(found.numbers, found.summaries, out))
    parts += [image_section(shot, list(paths), out) for shot in shown]
    clicked = script(float(cfg.overlay)) if "pca" in kinds else ""
    title = "What the backbone sees" if len(models) == 1 else "What the backbones see"
    with replacing(out / "index.html") as part:
        part.write_text(album.page(title, words, parts, clicked), encoding="utf-8")
