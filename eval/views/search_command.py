"""The command `search`: the nearest neighbours of images in a file of `ssl-xcit embed`, as a table
and as a picture.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, ListConfig
from rich.table import Table

from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.folders import folder
from ssl_xcit.data.preprocess import of_weights, resize_center_crop
from ssl_xcit.data.sources import Files
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import replacing, writable_folder, written_to
from ssl_xcit.models.weights import checkpoint_path, load_backbone
from ssl_xcit.table import console
from ssl_xcit.terminal import say

from ..embedded import Opened
from ..feature_cache import weights_digest
from ..features import KINDS, extract, parts_of
from ..frozen import Frozen, placed
from ..search import is_exact, nearest, nearest_in, ordered, similarities
from ..settings import number
from .grids import Cell, Row, grid
from .pictures import Picture, visible, write_png

MOST_ROWS = 40  # of the picture


def main(cfg: DictConfig) -> None:
    """`ssl-xcit search`: prints neighbours, writes a picture or JSON."""
    number("k", cfg.k, int, 1)
    out = None if cfg.out is None else Path(str(cfg.out)).expanduser()
    if out is not None:
        if out.suffix not in (".png", ".json"):
            raise UserError(f"out={cfg.out}: a picture ending in .png, or a file ending in .json")
        writable_folder(out.parent)  # now, not after the search
    opened = Opened(Path(str(cfg.index)).expanduser())
    files = queries_of(cfg)
    frozen = looked_with(cfg, opened)
    features, rows = query_features(frozen, files, opened.about)
    k = min(cfg.k, len(opened.names))
    similarity, indices = neighbours(opened, features, k)
    if opened.index is not None and not is_exact(opened.index):
        say("an approximate index: some neighbours may be missing")
    found = []
    for place, row in enumerate(rows):
        near = [
            {"rank": rank, "similarity": round(float(s), 6), "name": opened.names[int(i)]}
            for rank, (s, i) in enumerate(zip(similarity[place], indices[place], strict=True), 1)
            if i >= 0
        ]
        found.append({"image": str(files[row]), "neighbours": near})
    print_neighbours(found)
    if out is not None:
        with written_to(out):
            if out.suffix == ".json":
                with replacing(out) as part:
                    part.write_text(
                        json.dumps({"index": str(opened.path), "found": found}, indent=2)
                    )
            else:
                write_png(sheet(found[:MOST_ROWS], frozen, opened), out)
        say(f"written: {out}")
    if len(rows) < len(files):
        unread = sorted(set(range(len(files))) - set(rows.tolist()))
        names = ", ".join(str(files[i]) for i in unread[:5])
        raise UserError(f"{len(unread)} of {len(files)} images cannot be read: {names}")


def queries_of(cfg: DictConfig) -> list[Path]:
    """Files that are named, or those of a folder.

    Raises:
        MissingPath: one is not there.
    """
    given = cfg.image if isinstance(cfg.image, ListConfig) else [cfg.image]
    files: list[Path] = []
    for word in given:
        path = Path(str(word)).expanduser()
        if path.is_dir():
            source = folder(str(path))
            files += [Path(source.name(i)) for i in range(len(source))]
        elif path.is_file():
            files.append(path)
        else:
            raise MissingPath(f"image={path}: no such file or folder")
    return files


def looked_with(cfg: DictConfig, opened: Opened) -> Frozen:
    """The weights that made the file, reading images as they did.

    Raises:
        UserError: they are not there any more, or are others.
    """
    about = opened.about
    word = about.get("ckpt") if cfg.ckpt is None else cfg.ckpt
    here = Path(about.get("folder", "."))
    if cfg.ckpt is None and not Path(str(word)).exists() and (here / str(word)).exists():
        word = here / str(word)
    try:
        path = checkpoint_path(str(word))
    except MissingPath as error:
        raise MissingPath(
            f"the weights that made {opened.path}, {word}, are not there: name them with ckpt=..."
        ) from error
    backbone = load_backbone(path, about.get("which", "teacher"))
    digest = weights_digest(backbone)
    if digest != about.get("weights"):
        raise UserError(
            f"{opened.path} was made by weights with the SHA-256 {str(about.get('weights'))[:12]}, "
            f"and {path} has {digest[:12]}: name the same with ckpt=..."
        )
    how = of_weights(about["preprocess"])
    return Frozen(backbone, how, placed(backbone, str(cfg.device))[0], num_workers=0)


def query_features(
    frozen: Frozen, files: Sequence[Path], about: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """As the file's own features were made; which files could be read."""
    kind = str(about["features"])
    source = Files([str(file) for file in files])
    try:
        found, rows = extract(frozen, source, about["resize"], about["size"], parts_of([kind]))
    except UserError as error:
        raise UserError(f"image: {error}") from error
    features = np.concatenate([found[part] for part in KINDS[kind]], axis=1)
    return features.astype(about["dtype"]).astype(np.float32), rows


def neighbours(opened: Opened, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places, the most similar first; exact but in an index that is not."""
    if opened.index is not None:
        return nearest_in(opened.index, features, k)
    _, indices = nearest(opened.bank, features, k)
    return ordered(similarities(opened.bank, features, indices), indices)


def print_neighbours(found: Sequence[dict[str, Any]]) -> None:
    """A table for each image."""
    for one in found:
        table = Table(title=one["image"], title_justify="left")
        for heading in ("", "cosine"):
            table.add_column(heading, justify="right")
        table.add_column("image", overflow="fold")
        for near in one["neighbours"]:
            table.add_row(str(near["rank"]), f"{near['similarity']:.3f}", near["name"])
        console().print(table)


def sheet(found: Sequence[dict[str, Any]], frozen: Frozen, opened: Opened) -> Picture:
    """A row for each image: itself, then its neighbours; grey where a file is not there."""
    about, here = opened.about, Path(opened.about.get("folder", "."))

    def picture(name: str) -> Picture:
        for path in (Path(name), here / name):
            try:
                pixels = decode(path.read_bytes(), frozen.how)
                return visible(resize_center_crop(pixels, about["resize"], about["size"]))
            except (OSError, BadImage):
                continue
        return np.full((about["size"], about["size"], 3), 128, np.uint8)

    rows = []
    for one in found:
        asked = Cell(picture(one["image"]), "query", Path(one["image"]).name)
        cells = [
            Cell(picture(near["name"]), f"{near['similarity']:.3f}", Path(near["name"]).name)
            for near in one["neighbours"][:12]
        ]
        rows.append(Row("", asked, cells))
    return grid(rows)
