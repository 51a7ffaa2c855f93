"""The images that neighbours and prototypes are looked for in: those of `eval_data`, looked at as
the evaluators look at them, with or without labels.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from jaxtyping import Float, Int64
from omegaconf import DictConfig

from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.folders import folder
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.weights import checkpoint_path

from ..feature_cache import cached
from ..frozen import Frozen
from ..run import checkpoints_in, folder_of
from .pictures import Picture, visible

NO_IMAGES = "the images of a data set are needed: eval_data=photos, or eval_data.root=DIR"
RESIZE, SIZE = 256, 224  # where a setting has none


class DataSet(NamedTuple):
    """Images to search, and others of the same set to ask with; None: there is one set only.

    They are looked at with the short side at `resize` pixels and the central square of `size`.
    """

    images: Source
    others: Source | None
    name: str
    resize: int
    size: int


def images_of(cfg: DictConfig) -> DataSet:
    """What `eval_data` names; a run or a folder without labels gives its images without.

    Raises:
        UserError: it names none.
    """
    chosen = HydraConfig.get().runtime.choices["eval_data"]
    settings: Any = cfg.get("eval_data") or {}
    try:
        pair: LabelledPair | None = instantiate(settings) if settings else None
    except InstantiationException as error:
        no_labels = isinstance(error.__cause__, UserError)
        no_labels &= not isinstance(error.__cause__, MissingPath)
        if chosen != "folder" or settings.test_root is not None or not no_labels:
            raise  # else images lie there, but not one folder a class
        return DataSet(
            folder(settings.root), None, str(settings.root), settings.resize, settings.size
        )
    if pair is not None:
        others = None if pair.test is pair.train else pair.test
        return DataSet(pair.train, others, pair.name, pair.resize, pair.size)
    if chosen != "of_run":
        raise UserError(NO_IMAGES)
    return training_images(cfg.ckpt)


def training_images(ckpt: Any) -> DataSet:
    """Those that a run without labelled images was trained on, from the choices in its `run.json`;
    as in `run.data_of_run` nothing in that file is instantiated by itself.
    """
    run_dir = folder_of(checkpoint_path(checkpoints_in(ckpt)[0]))
    run = json.loads((run_dir / "run.json").read_text())
    overrides = [o for o in run["overrides"] if re.match(r"data\.[a-z]\w*=", o)]
    cfg = compose("pretrain", overrides=[f"data={run['choices']['data']}", *overrides])
    view = cfg.get("eval_data") or {}
    return DataSet(
        instantiate(cfg.data.source),
        None,
        f"training images of {run_dir}",
        view.get("resize", RESIZE),
        view.get("size", SIZE),
    )


def class_name(source: Source, row: int) -> str | None:
    """The class of an image by name, or by number where classes have none; None without classes."""
    if source.labels is None or label_kind(source.labels) != "classes":
        return None
    label, names = int(source.labels[row]), source.class_names
    return names[label] if label < len(names) else str(label)


def rows_of(source: Source, files: Sequence[Path]) -> dict[Path, int]:
    """Which images of a source some files are; those that are none of them are left out."""
    wanted = {file.resolve(): file for file in files}
    names = {path.name for file in files for path in (file, file.resolve())}
    found = {}
    for row in range(len(source)):
        name = source.name(row)
        if os.path.basename(name) in names:  # a path is only followed where it may be one of them
            file = wanted.get(Path(name).resolve())
            if file is not None:
                found[file] = row
    return found


@dataclass(frozen=True)
class Shelf:
    """Images of a source that could be read, with their class tokens.

    Args:
        source: the images.
        rows: which of them; index i here is image rows[i] there.
        features: (N, C) class tokens; may be a memory map.
        frozen: how their files are read.
        resize: short side in pixels.
        size: of the central square.
    """

    source: Source
    rows: Int64[np.ndarray, " N"]
    features: Float[np.ndarray, "N C"]
    frozen: Frozen
    resize: int
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Of its file, or its place in the set."""
        return self.source.name(int(self.rows[i]))

    def short_name(self, i: int) -> str:
        """Without folders."""
        return os.path.basename(self.name(i))

    def class_of(self, i: int) -> str | None:
        """See `class_name`."""
        return class_name(self.source, int(self.rows[i]))

    def picture(self, i: int) -> Picture:
        """What the backbone saw of it; grey where it cannot be read any more."""
        how = self.frozen.how
        try:
            pixels = decode(self.source.read(int(self.rows[i])), how)
        except BadImage:
            return np.full((self.size, self.size, 3), 128, np.uint8)
        return visible(resize_center_crop(pixels, self.resize, self.size))


def shelf(frozen: Frozen, source: Source, data: DataSet, title: str) -> Shelf:
    """Class tokens of all images of a source that can be read, from the disk where they are kept.

    Raises:
        UserError: none can be read.
        RunFailed: a feature is not finite.
    """
    found, rows = cached(frozen, source, data.resize, data.size, title=title)
    return Shelf(source, rows, found["cls"], frozen, data.resize, data.size)


def evenly(count: int, most: int) -> Sequence[int]:
    """At most so many of 0 to count - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
