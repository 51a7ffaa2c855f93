"""The command `visualize`: pictures of what backbones see, and one page that shows them.

For each image and checkpoint: class attention of the heads and of their mean with the masks that
hold a share of it, principal components of the patches as colours, similarity to one patch. For
each checkpoint: its channel attention, and the entropy of that over depth. On request, for each
checkpoint and the images of a data set: nearest neighbours, and the images of each prototype.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len
from hydra.core.hydra_config import HydraConfig

from ssl_xcit.errors import UserError
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.utils.files import (
    plain_names,
    remove_partial,
    writable_folder,
    writable_or_here,
    written_to,
)
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Positive, Share, Text, Words, Workers

from ..checkpoints import expected_architecture, folder_of
from ..evaluators.protocol import OneOrMore
from ..features.extractor import FeatureExtractor
from ..runner import cache_folder
from ..viz.attention import Block
from ..viz.dataset import load_data_set
from ..viz.dataset_panels import TITLES, GridOptions, draw_grids, in_words, without_heads
from ..viz.image_panels import KINDS, ImageTiles, PanelOptions, draw_panels
from ..viz.visualize import (
    Visualization,
    image_paths,
    label_checkpoints,
    read_checkpoints,
    write_album,
    write_numbers,
)

log = logging.getLogger(__name__)
FILES = ("channels", *TITLES, "index.html", "visualize.json")  # beside the images' folders
Kind = Literal["attention", "pca", "channels", "neighbours", "prototypes"]
PATCH = (
    "[row,column], as fractions 0.0 to 1.0 (patch=[0.5,0.5] is the middle) or as whole pixels of "
    "the file (patch=[120,300])"
)


@dataclass(frozen=True)
class VisualizeSettings:
    """`conf/visualize.yaml`."""

    main: str
    ckpt: OneOrMore[Text]
    which: Network
    over_time: bool
    images: Text | Sequence[Text] | None
    max_images: Count
    kinds: Annotated[OneOrMore[Kind], Words(f"some of {', '.join((*KINDS, *TITLES))}")]
    size: Count | None
    block: Block
    mass: Annotated[float, Gt(0), Le(1)]
    overlay: Share
    patch: Annotated[
        Annotated[Sequence[Annotated[int, Ge(0)]] | Sequence[Share], Len(2, 2)] | None, Words(PATCH)
    ]
    threshold: float | None
    columns: Count
    num_prototypes: Count
    teacher_temp: Positive | None
    batch_size: Count
    num_workers: Workers
    cache: bool | str
    max_pixels: Count
    device: str
    out: Text | None
    model: Node | None = None  # these may be left out
    eval_data: Node | None = None


def make_folder(out: Text | None, path: Path) -> Path:
    """The folder of the page, without partial files; raises UserError where none can be written."""
    if out:
        folder = Path(str(out)).expanduser()
        try:
            writable_folder(folder)
        except UserError as error:
            raise UserError(f"out={error}; name a folder that can be written") from error
    else:
        folder = writable_or_here(folder_of(path), "visualize")
    remove_partial(folder)
    return folder


def files_to_draw(settings: VisualizeSettings, kinds: Sequence[str]) -> list[Path]:
    """The images to draw; none where the data set's own are the queries."""
    images = settings.images
    if images is None and not set(kinds) & set(KINDS):
        return []
    files, count = image_paths(images, settings.max_images)
    if count > len(files):
        most = settings.max_images
        log.warning("%d of %d images are shown: max_images=%d", len(files), count, most)
    return files


def main(settings: VisualizeSettings) -> None:
    """`ssl-xcit visualize`: writes pictures, `index.html` and `visualize.json`."""
    s = settings
    kinds = list(dict.fromkeys([s.kinds] if isinstance(s.kinds, str) else s.kinds))
    of_images = [kind for kind in kinds if kind in KINDS]
    panels = PanelOptions(of_images, s.size, s.block, s.mass, s.overlay, s.patch, s.threshold)
    grids = GridOptions(s.columns, s.max_images, s.num_prototypes, s.which, s.teacher_temp)
    paths = label_checkpoints(s.ckpt, s.over_time)
    architecture = expected_architecture(s.model)
    checkpoints = read_checkpoints(paths, s.which, architecture, s.max_pixels, s.size)
    several = len(paths) > 1
    no_head = without_heads(grids, kinds, paths)
    if len(no_head) == len(paths):
        kinds.remove("prototypes")
    files = files_to_draw(s, kinds)
    data = load_data_set(s.eval_data, s.ckpt) if set(kinds) & set(TITLES) else None
    out = make_folder(s.out, next(iter(paths.values())))
    with written_to(out):
        names = plain_names([file.stem for file in files], FILES)
        images = [ImageTiles(file, name) for file, name in zip(files, names, strict=True)]
        results = Visualization()
        folders = plain_names(list(paths), ["sheet.png"]) if several else [""]
        for (label, checkpoint), folder in zip(checkpoints.items(), folders, strict=True):
            backbone = checkpoint.backbone or load_backbone(checkpoint.path, s.which)
            extractor = FeatureExtractor(
                backbone, checkpoint.preprocess, placed(backbone, s.device)[0], s.batch_size,
                s.num_workers, show=shown_in_terminal(), cache=cache_folder(s.cache),
            )  # fmt: skip
            numbers = results.numbers.setdefault(label, {})
            if of_images:
                measured, summary = draw_panels(panels, extractor, label, folder, images, out)
                numbers |= measured
                results.summaries[label] = summary
            lacking = ["prototypes"] if label in no_head else []
            of_data = [k for k in kinds if k in TITLES and k not in lacking]
            if data is not None and of_data:
                queries = None if s.images is None else [i.file for i in images if not i.left_out]
                measured, results.grids[label] = draw_grids(
                    grids, of_data, extractor, checkpoint.path, data, queries, folder or "grid", out
                )
                numbers |= measured
                for kind in of_data:
                    say(f"{f'{label}, ' * several}{kind}: {in_words(kind, measured[kind])}")
        drawn = [image for image in images if image.tiles and not image.left_out]
        write_album(s.which, panels, checkpoints, drawn, results, out)
        overrides = HydraConfig.get().overrides.task
        write_numbers(s.which, checkpoints, images, results.numbers, overrides, out)
        count = sum(len(tiles) for image in drawn for tiles in image.tiles.values())
        num_grids = sum(map(len, results.grids.values()))
        parts = [f"{count} pictures of {len(drawn)} image{'s' * (len(drawn) != 1)}"] * bool(drawn)
        parts += [f"{num_grids} grid{'s' * (num_grids != 1)}"] * bool(num_grids)
        say(f"written: {', '.join(parts)}; open {out / 'index.html'}")
