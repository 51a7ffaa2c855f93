"""The command `atlas`: a data set as a map in one HTML file.

Features as the evaluators have them (from the disk where they are kept), places by t-SNE,
thumbnails of what the backbone saw. Images that cannot be read are left out and named.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ssl_xcit.data.decode import BadImage, open_picture
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.files import replacing, writable_folder, writable_or_here, written_to
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say, track

from ..frozen import Frozen, placed
from ..online import thinned
from ..run import cache_folder, checkpoints_in, expected, folder_of, short_names
from ..settings import number
from .atlas import Atlas, page, sprites, squared
from .data_set import DataSet, Shelf, images_of, shelf
from .embedding import embed
from .pictures import Picture, visible

log = logging.getLogger(__name__)
PARTS = ("test", "train", "all")
SIDES = ((2_500, 64), (8_000, 48))  # of thumbnails, up to so many images; 32 beyond
NAMED = 5  # of the images left out
AHEAD = 64  # thumbnails that are made before they are asked for


@dataclass
class Clock:
    """How long each part took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what happens inside."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def in_words(self) -> str:
        """`features 3.1 s, places 2.0 s`."""
        return ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())


def check(cfg: DictConfig) -> None:
    """Refuse settings that no map can be drawn with.

    Raises:
        UserError: the first of them.
    """
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    if cfg.part not in PARTS:
        raise UserError(f"part={cfg.part}: one of {', '.join(PARTS)}")
    for name, low in (("max_images", 1), ("batch_size", 1), ("max_pixels", 1), ("seed", 0)):
        number(name, cfg[name], int, low)
    if cfg.num_workers is not None:
        number("num_workers", cfg.num_workers, int, 0)
    number("perplexity", cfg.perplexity, low=1.0)
    if cfg.thumbnail is not None:
        number("thumbnail", cfg.thumbnail, int, 8, 257)
    if len(checkpoints_in(cfg.ckpt)) > 1:
        raise UserError(f"ckpt={cfg.ckpt}: one at a time; each has its own map")


def out_file(cfg: DictConfig, path: Path) -> Path:
    """Where the page goes.

    Raises:
        UserError: `out` is no name of a page, or lies where none can be written.
    """
    if not cfg.out:
        return writable_or_here(folder_of(path)) / "atlas.html"
    out = Path(str(cfg.out)).expanduser()
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise UserError(f"out={cfg.out}: a file ending in .html")
    writable_folder(out.parent)
    return out


def chosen_sources(data: DataSet, part: str, most: int) -> list[tuple[str, Source]]:
    """The images by the part that they are of, evenly spaced ones where they are too many; nothing
    of the two where there is one set only.
    """
    sources = {"train": data.images, "test": data.images if data.others is None else data.others}
    if data.others is None:
        sources = {"": data.images}
    elif part != "all":
        sources = {part: sources[part]}
    total = sum(map(len, sources.values()))
    if total <= most:
        return list(sources.items())
    log.warning("%d of %d images are shown: max_images=%d", most, total, most)
    shares = {name: max(1, round(most * len(each) / total)) for name, each in sources.items()}
    return [(name, thinned(each, shares[name])) for name, each in sources.items()]


def left_out(source: Source, found: Shelf) -> list[str]:
    """Names of the images that could not be read."""
    return [source.name(int(i)) for i in np.setdiff1d(np.arange(len(source)), found.rows)]


def small(found: Shelf, i: int, side: int) -> Picture:
    """The thumbnail of what the backbone saw; grey where it cannot be read any more."""
    share = min(1.0, found.size / found.resize)  # of the short side
    try:
        picture = open_picture(found.source.read(int(found.rows[i])), found.frozen.how)
        seen = share * min(picture.height, picture.width)
        pixels = visible(picture.pixels(max(1.0, seen / (2 * side))))
    except BadImage:
        return np.full((side, side, 3), 128, np.uint8)
    short = max(1, round(share * min(pixels.shape[:2])))
    top, left = ((edge - short) // 2 for edge in pixels.shape[:2])
    return squared(pixels[top : top + short, left : left + short], side)


def thumbnails(shelves: Sequence[Shelf], side: int, show: bool) -> Iterator[Picture]:
    """Of all images in their order; several are read at a time."""
    todo = [(found, i) for found in shelves for i in range(len(found))]
    waiting: deque[Future[Picture]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for place in track(range(-AHEAD, len(todo)), "thumbnails", show=show):
            if place + AHEAD < len(todo):
                waiting.append(pool.submit(small, *todo[place + AHEAD], side))
            if place >= 0:
                yield waiting.popleft().result()


def classes_of(shelves: Sequence[Shelf]) -> tuple[list[int] | None, list[str]]:
    """A class id of each image, and the names by id; None where an image has no class."""
    words = [found.class_of(i) for found in shelves for i in range(len(found))]
    known: list[str] = list(
        dict.fromkeys(str(name) for found in shelves for name in found.source.class_names)
    )
    ids = {name: n for n, name in enumerate(known)}
    classes = []
    for word in words:
        if word is None:
            return None, []
        classes.append(ids.setdefault(word, len(ids)))
    return classes, list(ids)


def side_of(count: int) -> int:
    """Of thumbnails in pixels, so that the page stays small."""
    return next((side for most, side in SIDES if count <= most), 32)


def main(cfg: DictConfig) -> None:
    """`ssl-xcit atlas`: writes one HTML file."""
    check(cfg)
    path = checkpoint_path(checkpoints_in(cfg.ckpt)[0])
    out = out_file(cfg, path)
    show, clock = shown_in_terminal(), Clock()
    with clock.timed("weights"):
        backbone = load_backbone(path, cfg.which, expected(cfg))
        frozen = Frozen(
            backbone, of_weights(backbone.preprocess, cfg.max_pixels),
            placed(backbone, str(cfg.device))[0], cfg.batch_size, cfg.num_workers, show=show,
            cache=cache_folder(cfg.cache),
        )  # fmt: skip
    data = images_of(cfg)
    sources = chosen_sources(data, cfg.part, cfg.max_images)
    with clock.timed("features"):
        shelves = [shelf(frozen, each, data, f"{name} features".strip()) for name, each in sources]
    bad = [name for (_, each), found in zip(sources, shelves, strict=True)
           for name in left_out(each, found)]  # fmt: skip
    features = np.concatenate([np.asarray(found.features, np.float32) for found in shelves])
    side = side_of(len(features)) if cfg.thumbnail is None else cfg.thumbnail
    with clock.timed("places"):
        places = embed(features, cfg.perplexity, cfg.seed, show)
    with clock.timed("thumbnails"):
        sheets = sprites(thumbnails(shelves, side, show), side)
    classes, class_names = classes_of(shelves)
    names = [found.name(i) for found in shelves for i in range(len(found))]
    count = f"{len(names):,} image{'s' * (len(names) != 1)}"
    with clock.timed("page"), written_to(out), replacing(out) as part:
        atlas = Atlas(places, names, classes, class_names, sheets, side)
        title = f"{data.name}, seen by {short_names([path])[0]}"
        words = [
            f"{count}. Those that {model_name(backbone.architecture)} ({cfg.which}) finds "
            "alike lie close to each other: t-SNE of its features."
        ]
        part.write_text(page(title, words, atlas), encoding="utf-8")
    if bad:
        named = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
        say(f"left out, they cannot be read: {len(bad):,} of {len(bad) + len(names):,} images "
              f"({named})")  # fmt: skip
    say(clock.in_words())
    size = out.stat().st_size / 1e6
    say(f"written: {count}, {size:.1f} MB; open {out}")
