"""The command `stats`: mean and standard deviation of each channel of a data set."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from ssl_xcit.data.channel_statistics import count_all, measure
from ssl_xcit.data.picture import dark_images
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.settings import SourceSettings
from ssl_xcit.data.sources import Source
from ssl_xcit.utils.files import writable_folder, write_json
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say, track
from ssl_xcit.utils.validation import Count, Node, Positive, Text, Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatsSettings:
    """`conf/stats.yaml`."""

    main: str
    preprocess: Node
    data: SourceSettings
    out: Text
    max_images: Count
    worker_timeout: Positive
    num_workers: Workers
    model: Any = None  # data options set these three for training
    augment: Any = None
    batch_size: Any = None


def main(settings: StatsSettings) -> None:
    """`ssl-xcit stats`: print them and write the file that `preprocess.stats` reads."""
    source: Source = instantiate(settings.data.source)
    preprocess: Preprocess = instantiate(settings.preprocess)
    counts = count_all(
        source, preprocess, settings.max_images, settings.num_workers, settings.worker_timeout
    )
    chunks = track(counts, "counting", show=shown_in_terminal())
    mean, std, num_images, bad, deep = measure(chunks, preprocess.channels)
    if note := dark_images(deep, preprocess):
        log.warning("%s", note)
    out = Path(str(settings.out))
    writable_folder(out.parent)
    statistics = {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
    write_json({**preprocess.of_weights(), **statistics, "images": num_images}, out)
    say(f"{num_images:,} of {len(source):,} images, {preprocess.channels} channels")
    say("  mean  " + " ".join(f"{value:.4f}" for value in mean))
    say("  std   " + " ".join(f"{value:.4f}" for value in std))
    if bad:
        say(f"  {len(bad):,} could not be read, such as {bad[0]}")
    say(f"written: {out}")
    say(f"next: ssl-xcit pretrain ... model.in_chans={preprocess.channels} preprocess.stats={out}")
