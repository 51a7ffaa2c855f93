"""Load the images of a data set as the evaluators read them, with or without labels: neighbours,
prototypes and maps are made of these.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from jaxtyping import Float, Int64

from ssl_xcit.data.decode import decode
from ssl_xcit.data.folders import folder
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path

from ..checkpoints import (
    checkpoints_in,
    folder_of,
    image_sides_of_task,
    transfer_data_of_run,
)
from ..features.cache import cached
from ..features.extractor import FeatureExtractor
from .pictures import Picture, missing_picture, visible

RESIZE, SIZE = 256, 224  # where a setting has none


class DataSet(NamedTuple):
    """Images to search, and others of the same set to query with; None: there is one set only.

    They are read with the short side at `resize` pixels and the central square of `size`.
    """

    images: Source
    others: Source | None
    name: str
    resize: int
    size: int


def of_pair(pair: LabelledPair) -> DataSet:
    """The training images to search, the test images to query with."""
    others = None if pair.test is pair.train else pair.test
    return DataSet(pair.train, others, pair.name, pair.resize, pair.size)


def load_data_set(eval_data: Mapping[str, Any] | None, ckpt: Any) -> DataSet:
    """The images that `eval_data` names; a run or a folder without labels gives its images without.
    Raises UserError where it names none.
    """
    chosen = HydraConfig.get().runtime.choices["eval_data"]
    settings = eval_data or {}
    try:
        pair: LabelledPair | None = instantiate(settings) if settings else None
    except InstantiationException as error:
        no_labels = isinstance(error.__cause__, UserError)
        no_labels &= not isinstance(error.__cause__, MissingPath)
        if chosen != "folder" or settings["test_root"] is not None or not no_labels:
            raise  # else images lie there, but not one folder a class
        root = settings["root"]
        return DataSet(folder(root), None, str(root), settings["resize"], settings["size"])
    if pair is not None:
        return of_pair(pair)
    if chosen != "of_run":
        raise UserError(
            "the images of a data set are needed: eval_data=photos, or eval_data.root=DIR"
        )
    return training_images(ckpt)


def training_images(ckpt: Any) -> DataSet:
    """The images that a run without labelled ones was trained on, from the choices in its
    `run.json`; as in `checkpoints.data_of_run` nothing in that file is instantiated by itself.
    """
    first = checkpoints_in(ckpt)[0]
    run_dir = folder_of(checkpoint_path(first))
    name = f"training images of {run_dir}"
    run = json.loads((run_dir / "run.json").read_text())
    if "transfer" in run["choices"]:
        images = transfer_data_of_run(first).train.images
        return DataSet(images, None, name, *image_sides_of_task(first))
    overrides = [o for o in run["overrides"] if re.match(r"data\.[a-z]\w*=", o)]
    cfg = compose("pretrain", overrides=[f"data={run['choices']['data']}", *overrides])
    sides = cfg.get("eval_data") or {}
    return DataSet(
        instantiate(cfg.data.source),
        None,
        name,
        sides.get("resize", RESIZE),
        sides.get("size", SIZE),
    )


def has_classes(source: Source) -> bool:
    """Whether its images have one class each."""
    return source.labels is not None and label_kind(source.labels) == "classes"


def class_name(source: Source, row: int) -> str | None:
    """The class of an image by name, or by number where classes have none; None without classes."""
    if source.labels is None or not has_classes(source):
        return None
    label, names = int(source.labels[row]), source.class_names
    return names[label] if label < len(names) else str(label)


def rows_of(source: Source, files: Sequence[Path]) -> dict[Path, int]:
    """Rows of the files that are images of a source."""
    wanted = {file.resolve(): file for file in files}
    names = {path.name for file in files for path in (file, file.resolve())}
    rows = {}
    for row in range(len(source)):
        name = source.name(row)
        if os.path.basename(name) in names:  # a path is only followed where it may be one of them
            file = wanted.get(Path(name).resolve())
            if file is not None:
                rows[file] = row
    return rows


@dataclass(frozen=True)
class ImageFeatures:
    """Images of a source that could be read, with their class tokens."""

    source: Source  # the images
    rows: Int64[np.ndarray, " N"]  # which of them; index i here is image rows[i] there
    features: Float[np.ndarray, "N C"]  # (N, C) class tokens; may be a memory map
    extractor: FeatureExtractor  # says how their files are read
    resize: int  # short side in pixels
    size: int  # of the central square

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Of its file, or its place in the set."""
        return self.source.name(int(self.rows[i]))

    def short_name(self, i: int) -> str:
        """The name without folders."""
        return os.path.basename(self.name(i))

    def class_of(self, i: int) -> str | None:
        """See `class_name`."""
        return class_name(self.source, int(self.rows[i]))

    def picture(self, i: int) -> Picture:
        """The pixels that the backbone saw; grey where the file cannot be read any more."""
        try:
            pixels = decode(self.source.read(int(self.rows[i])), self.extractor.preprocess)
        except BadImage:
            return missing_picture(self.size)
        return visible(resize_center_crop(pixels, self.resize, self.size))


def image_features(
    extractor: FeatureExtractor, source: Source, data: DataSet, title: str
) -> ImageFeatures:
    """Class tokens of all images of a source that can be read, from the disk where they are kept;
    raises UserError where none can be read, RunFailed where a feature is not finite.
    """
    parts, rows = cached(extractor, source, data.resize, data.size, title=title)
    return ImageFeatures(source, rows, parts["cls"], extractor, data.resize, data.size)
