"""The command `embed`: write features of every image of a data set to files.

Extraction goes into a hidden folder beside the first file and is noted as it goes; a rerun of the
same command goes on there, and a file gets its name when it is complete.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from ssl_xcit.data.bad_samples import FILE as BAD
from ssl_xcit.data.identity import index_of
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.settings import DataSettings
from ssl_xcit.data.shard_writer import names_digest
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import load_backbone, model_name
from ssl_xcit.training.run_dir import versions
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Node, Text, Workers

from ..checkpoints import data_settings_of_run, folder_of, image_sides_of_task
from ..evaluators.protocol import as_list
from ..features.cache import stamp_of, weights_digest
from ..features.embed import embed, is_there, labels_digest, locked
from ..features.extract import Kind
from ..features.extractor import FeatureExtractor
from ..features.store import ENDINGS, import_pyarrow

log = logging.getLogger(__name__)
RESIZE, SIZE = 256, 224  # where neither a setting nor the run has one


@dataclass(frozen=True)
class EmbedSettings:
    """`conf/embed.yaml`."""

    main: str
    preprocess: Node
    data: DataSettings
    ckpt: Text
    out: Text | Sequence[Text]
    which: Network
    features: Kind
    dtype: Literal["float32", "float16"]
    index: Literal["flat", "ivf", "hnsw"]
    resize: Count | None
    size: Count | None
    batch_size: Count
    num_workers: Workers
    max_pixels: Count
    device: Text
    model: Node | None = None  # cifar10 and other sets have these two for training
    augment: Any = None


def main(settings: EmbedSettings) -> None:
    """`ssl-xcit embed`: write one file or several, and beside them the images that are bad; raises
    UserError where settings do not go together or a file of other features is in the way, RunFailed
    where too many images are bad.
    """
    outs = out_files(settings.out)
    path = checkpoint_path(str(settings.ckpt))
    backbone = load_backbone(path, settings.which)
    source: Source = instantiate(settings.data.source)
    check_outside(outs, settings.data)
    resize, size = image_sizes(settings, path)
    preprocess = of_weights(backbone.preprocess, settings.max_pixels)
    about: dict[str, Any] = {
        "weights": weights_digest(backbone),
        "ckpt": str(path),
        "which": settings.which,
        "model": model_name(backbone.architecture),
        "images": len(source),
        "names": names_digest(source),
        "stamp": stamp_of(source),
        "content": index_of(source).digest(),
        "resize": resize,
        "size": size,
        "features": settings.features,
        "dtype": settings.dtype,
        "preprocess": preprocess.of_weights(),
        "folder": os.getcwd(),  # that relative names start from
        "versions": versions(),
    }
    labels = labels_digest(source)
    contents = {out: about | {"labels": labels} for out in outs}
    for out in outs:
        if out.suffix == ".faiss":
            contents[out]["index"] = settings.index
    with locked(outs):
        todo = {out: content for out, content in contents.items() if not is_there(out, content)}
        if not todo:
            say("all of it is there already; remove the files to make them again")
            return
        first, *others = placed(backbone, str(settings.device))
        extractor = FeatureExtractor(
            backbone, preprocess, first, settings.batch_size, settings.num_workers,
            show=shown_in_terminal(), more_devices=others,
        )  # fmt: skip
        say(f"{path}: {about['model']}, {settings.which}; {len(source):,} images, short side "
            f"{resize}, central {size} x {size}")  # fmt: skip
        count, bad = embed(extractor, source, about, todo, outs[0], settings.index)
    for out in todo:
        say(f"written: {out}, {count:,} rows ({out.stat().st_size / 1e6:,.1f} MB)")
    if bad:
        say(f"  {len(bad):,} images could not be read: {outs[0]}.{BAD}")
    say(f"next: ssl-xcit search index={outs[0]} image=FILE")
    limit = settings.data.max_bad_fraction
    if len(bad) > limit * len(source):
        raise RunFailed(
            f"{len(bad):,} of {len(source):,} images are bad and were left out, more than "
            f"data.max_bad_fraction={limit:g} allows; the others are written"
        )


def out_files(setting: Text | Sequence[Text]) -> list[Path]:
    """The files to write; raises UserError for none, one twice, or another format."""
    outs = [Path(str(word)).expanduser() for word in as_list(setting)]
    for out in outs:
        if out.suffix not in ENDINGS or out.is_dir():
            raise UserError(f"out={out}: a file ending in {', '.join(ENDINGS)}")
    if not outs or len({out.resolve() for out in outs}) < len(outs):
        words = ",".join(map(str, outs))
        raise UserError(f"out=[{words}]: one file, or several of different names")
    if any(out.suffix == ".parquet" for out in outs):
        import_pyarrow()  # now, not after hours
    return outs


def check_outside(outs: Sequence[Path], data: DataSettings) -> None:
    """Raise UserError where a file would land among the images as one of them."""
    if HydraConfig.get().runtime.choices["data"] != "folder":
        return  # which alone looks for image files
    for folder in as_list(data.options["root"]):
        place = Path(str(folder)).expanduser().resolve()
        for out in outs:
            if out.suffix == ".npy" and out.resolve().is_relative_to(place):
                raise UserError(
                    f"out={out} lies in data.root={folder}, where the next command would take it "
                    "for an image: name a place outside"
                )


def image_sizes(settings: EmbedSettings, path: Path) -> tuple[int, int]:
    """Short side and central square: of the settings, else what the run was measured at."""
    resize, size = RESIZE, SIZE
    has_run = (folder_of(path) / "run.json").is_file()
    if has_run and None in (settings.resize, settings.size):
        try:
            data_settings = data_settings_of_run(str(settings.ckpt))
            if "transfer" in data_settings:
                resize, size = image_sides_of_task(str(settings.ckpt))
            elif data := data_settings.get("eval_data"):
                # the images may be elsewhere by now, so they are not needed if settings tell
                pair = data if "size" in data else instantiate(data)
                resize, size = pair.resize, pair.size
        except Exception as error:  # its options may be those of another version
            log.warning(
                "cannot determine the evaluation image size of the run (%s): resize=%s size=%s",
                str(error).partition("\n")[0], resize, size,
            )  # fmt: skip
    return settings.resize or resize, settings.size or size
