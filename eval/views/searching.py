"""What is looked for in a data set, for one checkpoint: nearest neighbours and prototypes, each as
a grid of pictures.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ssl_xcit.errors import UserError

from ..frozen import Frozen
from . import neighbours, prototypes
from .album import Section
from .data_set import DataSet, shelf
from .grids import Row, grid
from .pictures import write_png

log = logging.getLogger(__name__)
TITLES = {"neighbours": "Nearest neighbours", "prototypes": "Prototypes"}
EXPLAINED = {
    "neighbours": (
        "Left of the line an image, right of it those whose class tokens have the largest cosine "
        "with its own. A red frame: another class."
    ),
    "prototypes": (
        "The prototypes of the teacher's head with the largest shares of its probability, each "
        "with the images it takes most of and how much."
    ),
}


def without_heads(cfg: DictConfig, kinds: Sequence[str], paths: Mapping[str, Path]) -> set[str]:
    """The labels whose prototypes cannot be shown, for want of a head; each is said once.

    Raises:
        UserError: prototypes are all that is wanted.
    """
    found = set()
    for label, path in paths.items() if "prototypes" in kinds else ():
        try:
            prototypes.load_teacher(path, cfg.which, cfg.teacher_temp)
        except UserError as error:
            if list(kinds) == ["prototypes"]:
                raise
            log.warning("%s", error)
            found.add(label)
    return found


def search_through(
    cfg: DictConfig,
    kinds: Sequence[str],
    frozen: Frozen,
    path: Path,
    data: DataSet,
    files: Sequence[Path] | None,
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Neighbours and prototypes of a checkpoint: numbers, and rows of pictures, by kind."""
    numbers: dict[str, Any] = {}
    rows: dict[str, list[Row]] = {}
    bank = shelf(frozen, data.images, data, "features")
    if "neighbours" in kinds:
        most = min(cfg.max_images, neighbours.QUERIES)
        queries = neighbours.asked(frozen, data, bank, files, most)
        found = neighbours.looked_up(bank, queries, cfg.columns)
        rows["neighbours"], numbers["neighbours"] = found
    if "prototypes" in kinds:
        teacher = prototypes.load_teacher(path, cfg.which, cfg.teacher_temp)
        taken = prototypes.shares(teacher, bank.features, cfg.columns, frozen.device)
        rows["prototypes"], told = prototypes.drawn(bank, taken, cfg.num_prototypes)
        numbers["prototypes"] = {"temperature": teacher.temperature, **told}
    return {kind: {"data": data.name, **told} for kind, told in numbers.items()}, rows


def draw_grids(
    cfg: DictConfig,
    kinds: Sequence[str],
    frozen: Frozen,
    path: Path,
    data: DataSet,
    files: Sequence[Path] | None,
    name: str,
    out: Path,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of each kind, and the file below `out` that shows them.

    Args:
        cfg: the settings.
        kinds: of `TITLES`.
        frozen: the backbone.
        path: its checkpoint.
        data: images to search.
        files: queries; None: images of the set itself.
        name: of the files, without ending.
        out: folder of the page.
    """
    numbers, rows = search_through(cfg, kinds, frozen, path, data, files)
    grids = {kind: f"{kind}/{name}.png" for kind in rows}
    for kind, file in grids.items():
        write_png(grid(rows[kind]), out / file)
    return numbers, grids


def in_words(kind: str, numbers: Mapping[str, Any]) -> str:
    """What a grid amounts to."""
    images = f"{numbers['images']:,} images ({numbers['data']})"
    if kind == "prototypes":
        return (
            f"{numbers['used']:,} of {numbers['prototypes']:,} prototypes are the first choice of "
            f"some of {images}; effective number {numbers['effective']:.1f}"
        )
    same = numbers["same_class"]
    words = f"{len(numbers['queries'])} queries, the {numbers['k']} nearest of {images}"
    return words if same is None else f"{words}; {same:.0%} are of the query's class"


def sections(
    numbers: Mapping[str, Mapping[str, Any]], grids: Mapping[str, Mapping[str, str]]
) -> list[Section]:
    """A part of the page for each kind, with a grid for each checkpoint.

    Args:
        numbers: label of a checkpoint -> kind -> what came out.
        grids: label -> kind -> file.
    """
    found = []
    for kind, title in TITLES.items():
        labels = [label for label in grids if kind in grids[label]]
        words = [in_words(kind, numbers[label][kind]) for label in labels]
        if len(numbers) > 1:
            words = [f"{label}: {each}" for label, each in zip(labels, words, strict=True)]
        if labels:
            sheets = [(each, grids[label][kind]) for label, each in zip(labels, words, strict=True)]
            found.append(Section(title, None, (), EXPLAINED[kind], sheets))
    return found
