"""Search a file of features by images, and draw the nearest of each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_xcit.data.decode import decode
from ssl_xcit.data.folders import folder
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import of_weights, resize_center_crop
from ssl_xcit.data.sources import Files
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.utils.validation import Text

from ..features.cache import weights_digest
from ..features.extract import KINDS, extract, parts_of
from ..features.extractor import FeatureExtractor
from ..features.neighbors import nearest, nearest_in
from ..features.store import FeatureIndex
from .grids import GridCell, GridRow, grid
from .pictures import Picture, missing_picture, visible

MOST_ROWS, MOST_COLUMNS = 40, 12  # of the picture


def query_files(words: Sequence[Text]) -> list[Path]:
    """Files that are named, and those of folders; raises MissingPath where one is not there."""
    files: list[Path] = []
    for word in words:
        path = Path(str(word)).expanduser()
        if path.is_dir():
            source = folder(str(path))
            files += [Path(source.name(i)) for i in range(len(source))]
        elif path.is_file():
            files.append(path)
        else:
            raise MissingPath(f"image={path}: no such file or folder")
    return files


def extractor_of(index: FeatureIndex, ckpt: Text | None, device: str) -> FeatureExtractor:
    """The weights that made the file, where they were or at `ckpt`, reading images as they did;
    raises UserError where they are not there any more, or are others.
    """
    about = index.about
    path = Path(str(about.get("ckpt") if ckpt is None else ckpt))
    here = Path(about.get("folder", "."))
    if ckpt is None and not path.exists() and (here / path).exists():
        path = here / path
    try:
        file = checkpoint_path(str(path))
    except MissingPath as error:
        raise MissingPath(
            f"the weights that made {index.path}, {path}, are not there: name them with ckpt=..."
        ) from error
    backbone = load_backbone(file, about.get("which", "teacher"))
    digest = weights_digest(backbone)
    if digest != about.get("weights"):
        raise UserError(
            f"{index.path} was made by weights with the SHA-256 {str(about.get('weights'))[:12]}, "
            f"and {file} has {digest[:12]}: name the same with ckpt=..."
        )
    preprocess = of_weights(about["preprocess"])
    return FeatureExtractor(backbone, preprocess, placed(backbone, device)[0], num_workers=0)


def query_features(
    extractor: FeatureExtractor, files: Sequence[Path], about: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Features made as those of the file were, and rows of the images that could be read."""
    kind = str(about["features"])
    source = Files([str(file) for file in files])
    try:
        parts, rows = extract(extractor, source, about["resize"], about["size"], parts_of([kind]))
    except UserError as error:
        raise UserError(f"image: {error}") from error
    features = np.concatenate([parts[part] for part in KINDS[kind]], axis=1)
    return features.astype(about["dtype"]).astype(np.float32), rows


def nearest_names(index: FeatureIndex, features: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
    """Rank, cosine and name of the nearest to each query; exact but in an index that is not."""
    if index.index is not None:
        cosines, places = nearest_in(index.index, features, k)
    else:
        cosines, places = nearest(index.bank, features, k)
    return [
        [
            {"rank": rank, "similarity": round(float(cosine), 6), "name": index.names[int(i)]}
            for rank, (cosine, i) in enumerate(zip(*pair, strict=True), 1)
            if i >= 0
        ]
        for pair in zip(cosines, places, strict=True)
    ]


def search_sheet(
    results: Sequence[dict[str, Any]], extractor: FeatureExtractor, index: FeatureIndex
) -> Picture:
    """A row for each of `MOST_ROWS` queries: itself, then its neighbours; grey: a missing file."""
    about, here = index.about, Path(index.about.get("folder", "."))

    def picture(name: str) -> Picture:
        for path in (Path(name), here / name):
            try:
                pixels = decode(path.read_bytes(), extractor.preprocess)
                return visible(resize_center_crop(pixels, about["resize"], about["size"]))
            except (OSError, BadImage):
                continue
        return missing_picture(about["size"])

    rows = []
    for result in results[:MOST_ROWS]:
        query = GridCell(picture(result["image"]), "query", Path(result["image"]).name)
        cells = [
            GridCell(picture(near["name"]), f"{near['similarity']:.3f}", Path(near["name"]).name)
            for near in result["neighbours"][:MOST_COLUMNS]
        ]
        rows.append(GridRow("", query, cells))
    return grid(rows)
