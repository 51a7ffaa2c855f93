"""The command `stats`: mean and standard deviation of each channel of a data set."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from jaxtyping import Int64
from omegaconf import DictConfig

from ssl_xcit.data.decode import BadImage, Deep, dark_images, open_picture
from ssl_xcit.data.loader import look_at_all
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.files import writable_folder, write_json
from ssl_xcit.plan import check_numbers
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say, track

NUMBERS = (
    ("num_workers", True, 0),
    ("worker_timeout", False, None),
    ("max_images", True, 1),
)
Counts = Int64[np.ndarray, "channels 256"]
log = logging.getLogger(__name__)


def count_values(
    source: Source, how: Preprocess, chosen: Int64[np.ndarray, " M"], place: int
) -> tuple[Counts, Deep | None] | str:
    """How often each value comes in each channel of an image, or why it cannot be read."""
    index = int(chosen[place])
    try:
        picture = open_picture(source.read(index), how)
        pixels = picture.pixels()
    except BadImage as error:
        return f"{source.name(index)} ({error})"
    channels = pixels.reshape(-1, pixels.shape[-1]).T
    counts = np.stack([np.bincount(channel, minlength=256) for channel in channels])
    return counts, picture.deep


def main(cfg: DictConfig) -> None:
    """`ssl-xcit stats`: prints them and writes the file that `preprocess.stats` reads.

    Every image counts by its pixels; from whole numbers, so the result is exact.
    """
    check_numbers(cfg, NUMBERS)
    source: Source = instantiate(cfg.data.source)
    how: Preprocess = instantiate(cfg.preprocess)
    many = min(cfg.max_images, len(source))
    chosen = np.unique(np.linspace(0, len(source) - 1, many).astype(np.int64))
    look = partial(count_values, source, how, chosen)
    chunks = look_at_all(look, len(chosen), cfg.num_workers, timeout=cfg.worker_timeout)
    total, bad = np.zeros((how.channels, 256), np.int64), []
    deep: list[Deep] = []
    for chunk in track(chunks, "counting", show=shown_in_terminal()):
        for found in chunk:
            if isinstance(found, str):
                bad.append(found)
            else:
                total += found[0]
                deep += [found[1]] if found[1] is not None else []
    if note := dark_images(deep, how):
        log.warning("%s", note)
    if not total.any():
        raise UserError(f"none of {len(chosen):,} images can be read, such as {bad[0]}")
    mean, std = moments(total)
    if (std == 0.0).any():
        raise UserError(
            f"channel {int(std.argmin())} has the same value everywhere: is "
            "preprocess.value_range right?"
        )
    out = Path(str(cfg.out))
    writable_folder(out.parent)
    kept = how.of_weights()
    kept |= {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
    write_json({**kept, "images": len(chosen) - len(bad)}, out)
    say(f"{len(chosen) - len(bad):,} of {len(source):,} images, {how.channels} channels")
    say("  mean  " + " ".join(f"{value:.4f}" for value in mean))
    say("  std   " + " ".join(f"{value:.4f}" for value in std))
    if bad:
        say(f"  {len(bad):,} could not be read, such as {bad[0]}")
    say(f"written: {out}")
    say(f"next: ssl-xcit pretrain ... model.in_chans={how.channels} preprocess.stats={out}")


def moments(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of values in 0..1."""
    values = np.arange(256) / 255.0
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
