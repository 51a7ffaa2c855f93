"""Find the images and checkpoints to visualize, and write numbers and a page about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssl_xcit.data.folders import named_images
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, checkpoints_of
from ssl_xcit.models.weights import load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.run_dir import versions
from ssl_xcit.utils.files import replacing, sha256_of, write_json
from ssl_xcit.utils.validation import Network, Text

from ..checkpoints import check_comparable, checkpoints_in, short_names
from .channels import Summary, channel_section
from .dataset_panels import grid_sections
from .image_panels import ImageTiles, PanelOptions, image_section
from .markup import render
from .patch_similarity import similarity_settings


class Checkpoint(NamedTuple):
    """A checkpoint that was read; the backbone is kept where there is only one."""

    path: Path
    model: str
    preprocess: Preprocess
    backbone: XCiT | None


@dataclass
class Visualization:
    """Visualization of all checkpoints, by their labels."""

    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `visualize.json` has them
    summaries: dict[str, Summary] = field(default_factory=dict)  # of channel attention
    grids: dict[str, dict[str, str]] = field(default_factory=dict)  # label -> kind -> file


def label_checkpoints(ckpt: Any, over_time: bool) -> dict[str, Path]:
    """Files of checkpoints by labels that tell them apart; raises UserError where `over_time` is of
    something else than one run folder.
    """
    wanted = checkpoints_in(ckpt)
    if not over_time:
        paths = [checkpoint_path(word) for word in wanted]
        check_comparable(paths, ())  # none is named twice
        return dict(zip(short_names(paths), paths, strict=True))
    paths = checkpoints_of(Path(wanted[0])) if len(wanted) == 1 else []
    if not paths:
        raise UserError(
            f"over_time=true needs one run folder with checkpoints/step-*.ckpt, not ckpt={ckpt}; "
            "callbacks.checkpoints of a run says how many are kept"
        )
    return {path.stem: path for path in paths}


def read_checkpoints(
    paths: Mapping[str, Path],
    which: Network,
    expected: Mapping[str, Any] | None,
    max_pixels: int,
    size: int | None,
) -> dict[str, Checkpoint]:
    """Every file, read before any work, so that a wrong one is refused at once; of several one is
    held at a time. Raises UserError where one cannot be used, they take different images, or `size`
    is below a patch.
    """
    checkpoints = {}
    for label, path in paths.items():
        backbone = load_backbone(path, which, expected)
        if size is not None and size < backbone.patch_size:
            raise UserError(f"size={size} must be at least the patch, {backbone.patch_size}")
        preprocess = of_weights(backbone.preprocess, max_pixels)
        model = model_name(backbone.architecture)
        kept = backbone if len(paths) == 1 else None
        checkpoints[label] = Checkpoint(path, model, preprocess, kept)
    check_comparable(list(paths.values()), [c.preprocess for c in checkpoints.values()])
    return checkpoints


def image_paths(wanted: Text | Sequence[Text] | None, most: int) -> tuple[list[Path], int]:
    """At most `most` image files, evenly spaced, and how many there are, of files, folders with
    anything below and patterns (None: the built-in photographs). Raises MissingPath for a file or
    folder that is not there, or a pattern that fits nothing, UserError for an empty list.
    """
    if wanted is None:
        files = [file for _, file in photographs()]
    elif wanted == []:
        raise UserError("images=[]: name files, folders or patterns; null: built-in photographs")
    else:
        files = named_images(wanted)
    return [files[i] for i in evenly_spaced(len(files), most)], len(files)


def write_numbers(
    which: str,
    checkpoints: Mapping[str, Checkpoint],
    images: Sequence[ImageTiles],
    numbers: Mapping[str, Any],
    overrides: Sequence[str],
    out: Path,
) -> None:
    """`visualize.json`: weights, images, numbers."""
    write_json(
        {
            "weights": {
                label: {"file": str(c.path), "sha256": sha256_of(c.path), "model": c.model}
                for label, c in checkpoints.items()
            },
            "which": which,
            "images": {image.name: str(image.file) for image in images if not image.left_out},
            "left_out": {str(image.file): image.left_out for image in images if image.left_out},
            "results": numbers,
            "overrides": list(overrides),
            "versions": versions(),
        },
        out / "visualize.json",
    )


def write_album(
    which: str,
    options: PanelOptions,
    checkpoints: Mapping[str, Checkpoint],
    images: Sequence[ImageTiles],
    results: Visualization,
    out: Path,
) -> None:
    """`index.html`, with what the pictures mean."""
    words = [f"{c.path}: {c.model}, {which}" for c in checkpoints.values()]
    if "attention" in options.kinds:
        words.append(
            f"Class attention of block {options.block} of 2, each map in its own range of colours; "
            "the peak is the largest weight over the mean weight. A mask is the fewest patches "
            f"that hold {options.mass:.0%} of the weight."
        )
    if "pca" in options.kinds:
        words.append(
            "Components are those of the patches of all images together, so within a checkpoint a "
            "colour means the same everywhere; between checkpoints it does not."
        )
    sections = grid_sections(results.numbers, results.grids)
    if "channels" in options.kinds:
        sections.append(channel_section(results.numbers, results.summaries, out))
    sections += [image_section(image, list(checkpoints), out) for image in images]
    page = render(
        "album.html",
        title="What the backbone sees" if len(checkpoints) == 1 else "What the backbones see",
        words=words,
        sections=sections,
        similar=similarity_settings(options.overlay) if "pca" in options.kinds else None,
    )
    with replacing(out / "index.html") as part:
        part.write_text(page, encoding="utf-8")
