"""The command `shard`: a data set written as tar shards in the WebDataset layout.

Each shard is written beside its final name, read back and compared, then renamed; a rerun of the
same command continues behind the last complete one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from hydra.utils import instantiate

from ssl_xcit.data.bad_samples import FILE
from ssl_xcit.data.identity import index_of
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.order import permutation
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.settings import DataSettings
from ssl_xcit.data.shard_writer import ShardJob, names_digest, write_index, write_shards
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Node, Positive, Text, Workers, as_plain


@dataclass(frozen=True)
class ShardSettings:
    """`conf/shard.yaml`."""

    main: str
    preprocess: Node
    data: DataSettings
    out: Text
    images_per_shard: Count
    shuffle: bool
    seed: Annotated[int, Ge(0)]
    worker_timeout: Positive
    num_workers: Workers
    model: Any = None  # data options set these three for training
    augment: Any = None
    batch_size: Any = None


def main(settings: ShardSettings) -> None:
    """`ssl-xcit shard`: write `shard-000000.tar` and so on, `keys.tsv`, `shards.json`
    and `listing.jsonl.gz`.

    Raises:
        UserError: the folder holds shards that were made with other settings or images, or the
            labels are no classes.
        RunFailed: a shard read back is not what was written, or too many images are bad.
    """
    source: Source = instantiate(settings.data.source)
    if (kind := label_kind(source.labels)) != "classes":
        labels = "several labels an image" if kind == "several" else "numbers to predict"
        raise UserError(
            f"shards hold one class an image, not {labels}: leave the labels out with "
            f"{without_labels(settings.data.options)}, and evaluate with the file that holds them "
            "(eval_data=list, arrays or huggingface)"
        )
    preprocess: Preprocess = instantiate(settings.preprocess)
    out, count = Path(str(settings.out)), len(source)
    order = permutation(settings.seed, 0, count) if settings.shuffle else np.arange(count)
    made_with = {
        "data": {"source": settings.data.source, **as_plain(settings.data.options)},
        "images": count,
        "names": names_digest(source),
        "content": index_of(source, labelled=True).digest(),
        "images_per_shard": settings.images_per_shard,
        "shuffle": settings.shuffle,
        "seed": settings.seed,
        "preprocess": {**preprocess.of_weights(), "max_pixels": preprocess.max_pixels},
    }
    job = ShardJob(source, preprocess, order, settings.images_per_shard, out)
    records = write_shards(job, made_with, settings.num_workers, settings.worker_timeout)
    bad = write_index(job, made_with, records)
    size = f"{sum(record['bytes'] for record in records) / 1e6:,.0f} MB"
    say(f"{count - len(bad):,} images in {len(records):,} shards, {size}, each verified")
    if bad:
        say(f"  {len(bad):,} bad images left out, such as {bad[0]['name']} ({bad[0]['reason']})")
    say(f"{out}: shard-*.tar, keys.tsv, shards.json, listing.jsonl.gz, {FILE}")
    labels = " eval_data.root=DIR" if source.labels is None else f" eval_data.root={out}"
    say(f"next: ssl-xcit pretrain data=shards data.root={out}{labels}")
    allowed = settings.data.max_bad_fraction
    if len(bad) > allowed * count:
        raise RunFailed(
            f"{len(bad):,} of {count:,} images are bad and were left out, more than "
            f"data.max_bad_fraction={allowed:g} allows: see {out / FILE}"
        )


def without_labels(options: Mapping[str, Any]) -> str:
    """Return what to type, or to do, so that a source is read without its labels."""
    for key in ("labels", "label"):  # of arrays, of Hugging Face
        if key in options:
            return f"data.{key}=null"
    return "a list of the paths alone (data.file=FILE)"
