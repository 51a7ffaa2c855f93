"""Draw grids across a data set for one checkpoint: nearest neighbours and prototypes."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Network

from ..features.extractor import FeatureExtractor
from .album import Section
from .dataset import DataSet, image_features
from .grids import grid
from .neighbors import QUERIES, make_queries, neighbor_rows
from .pictures import write_png
from .prototypes import load_teacher, prototype_rows, prototype_shares

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


class GridOptions(NamedTuple):
    """How grids are drawn."""

    columns: int  # neighbours of an image, images of a prototype
    max_images: int  # queries from the data set itself, at most
    num_prototypes: int  # those with the largest shares
    which: Network  # teacher or student
    teacher_temp: float | None  # of the softmax over prototypes; None: the run's


def without_heads(
    options: GridOptions, kinds: Sequence[str], paths: Mapping[str, Path]
) -> set[str]:
    """Labels of the checkpoints whose prototypes cannot be shown, for want of a head; a warning
    says so of each, or a UserError is raised where prototypes are the only kind.
    """
    labels = set()
    for label, path in paths.items() if "prototypes" in kinds else ():
        try:
            load_teacher(path, options.which, options.teacher_temp)
        except UserError as error:
            if list(kinds) == ["prototypes"]:
                raise
            log.warning("%s", error)
            labels.add(label)
    return labels


def draw_grids(
    options: GridOptions,
    kinds: Sequence[str],
    extractor: FeatureExtractor,
    path: Path,
    data: DataSet,
    files: Sequence[Path] | None,
    name: str,
    out: Path,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Draw the grids of a checkpoint, with images of the set itself as queries where `files` is
    None; numbers of each kind, and the file below `out`, by `name` without ending, that shows it.
    """
    numbers: dict[str, Any] = {}
    rows = {}
    bank = image_features(extractor, data.images, data, "features")
    if "neighbours" in kinds:
        most = min(options.max_images, QUERIES)
        queries = make_queries(extractor, data, bank, files, most)
        rows["neighbours"], numbers["neighbours"] = neighbor_rows(bank, queries, options.columns)
    if "prototypes" in kinds:
        teacher = load_teacher(path, options.which, options.teacher_temp)
        shares = prototype_shares(teacher, bank.features, options.columns, extractor.device)
        rows["prototypes"], results = prototype_rows(bank, shares, options.num_prototypes)
        numbers["prototypes"] = {"temperature": teacher.temperature, **results}
    files_by_kind = {kind: f"{kind}/{name}.png" for kind in rows}
    for kind, file in files_by_kind.items():
        write_png(grid(rows[kind]), out / file)
    return {kind: {"data": data.name, **values} for kind, values in numbers.items()}, files_by_kind


def in_words(kind: str, numbers: Mapping[str, Any]) -> str:
    """The numbers of a grid in a sentence."""
    images = f"{numbers['images']:,} images ({numbers['data']})"
    if kind == "prototypes":
        return (
            f"{numbers['used']:,} of {numbers['prototypes']:,} prototypes are the first choice of "
            f"some of {images}; effective number {numbers['effective']:.1f}"
        )
    same = numbers["same_class"]
    words = f"{len(numbers['queries'])} queries, the {numbers['k']} nearest of {images}"
    return words if same is None else f"{words}; {same:.0%} are of the query's class"


def grid_sections(
    numbers: Mapping[str, Mapping[str, Any]], grids: Mapping[str, Mapping[str, str]]
) -> list[Section]:
    """A part of the page for each kind, with a grid for each checkpoint."""
    sections = []
    for kind, title in TITLES.items():
        sheets = []
        for label, files in grids.items():
            if kind in files:
                words = in_words(kind, numbers[label][kind])
                sheets.append((f"{label}: {words}" if len(numbers) > 1 else words, files[kind]))
        if sheets:
            sections.append(Section(title, None, (), EXPLAINED[kind], sheets))
    return sections
