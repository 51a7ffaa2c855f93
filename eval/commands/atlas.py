"""The command `atlas`: a data set as a map in one HTML file.

Features as the evaluators have them (from the disk where they are kept), places by t-SNE,
thumbnails of what the backbone saw. Images that cannot be read are left out and named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone, model_name
from ssl_xcit.utils.files import replacing, written_to
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Text, Workers

from ..checkpoints import checkpoints_in, expected_architecture, folder_of, short_names
from ..features.extractor import FeatureExtractor
from ..runner import cache_folder
from ..viz.atlas import Atlas, atlas_page, sprites
from ..viz.atlas_data import chosen_sources, classes_of, side_of, thumbnails, unread_names
from ..viz.dataset import image_features, load_data_set
from ..viz.embedding import tsne
from ..viz.markup import page_path

MOST_NAMES = 5  # of the images left out


@dataclass(frozen=True)
class AtlasSettings:
    """`conf/atlas.yaml`."""

    main: str
    ckpt: Text | Sequence[Text]
    which: Network
    part: Literal["test", "train", "all"]
    max_images: Count
    thumbnail: Annotated[int, Ge(8), Le(256)] | None
    perplexity: Annotated[float, Ge(1)]
    seed: Annotated[int, Ge(0)]
    batch_size: Count
    num_workers: Workers
    cache: bool | str
    max_pixels: Count
    device: str
    out: Text | None
    model: Node | None = None  # these may be left out
    eval_data: Node | None = None


def main(settings: AtlasSettings) -> None:
    """`ssl-xcit atlas`: writes one HTML file."""
    s = settings
    ckpt, *more = checkpoints_in(s.ckpt)
    if more:
        raise UserError(f"ckpt={s.ckpt}: one at a time; each checkpoint has its own map")
    path = checkpoint_path(ckpt)
    out = page_path(s.out, folder_of(path), "atlas.html")
    show = shown_in_terminal()
    backbone = load_backbone(path, s.which, expected_architecture(s.model))
    extractor = FeatureExtractor(
        backbone, of_weights(backbone.preprocess, s.max_pixels), placed(backbone, s.device)[0],
        s.batch_size, s.num_workers, show=show, cache=cache_folder(s.cache),
    )  # fmt: skip
    data = load_data_set(s.eval_data, s.ckpt)
    sources = chosen_sources(data, s.part, s.max_images)
    sets = [
        image_features(extractor, source, data, f"{name} features".strip())
        for name, source in sources
    ]
    unread = [
        name
        for (_, source), images in zip(sources, sets, strict=True)
        for name in unread_names(source, images)
    ]
    features = np.concatenate([np.asarray(images.features, np.float32) for images in sets])
    side = side_of(len(features)) if s.thumbnail is None else s.thumbnail
    places = tsne(features, s.perplexity, s.seed, show)
    sheets = sprites(thumbnails(sets, side, show), side)
    classes, class_names = classes_of(sets)
    names = [images.name(i) for images in sets for i in range(len(images))]
    count = f"{len(names):,} image{'s' * (len(names) != 1)}"
    with written_to(out), replacing(out) as part:
        atlas = Atlas(places, names, classes, class_names, sheets, side)
        title = f"{data.name}, seen by {short_names([path])[0]}"
        words = [
            f"{count}. Those that {model_name(backbone.architecture)} ({s.which}) finds "
            "alike lie close to each other: t-SNE of its features."
        ]
        part.write_text(atlas_page(title, words, atlas), encoding="utf-8")
    if unread:
        examples = ", ".join(unread[:MOST_NAMES]) + ", ..." * (len(unread) > MOST_NAMES)
        total = len(unread) + len(names)
        say(f"left out, they cannot be read: {len(unread):,} of {total:,} images ({examples})")
    say(f"written: {count}, {out.stat().st_size / 1e6:.1f} MB; open {out}")
