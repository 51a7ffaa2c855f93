"""The command `stats`: mean and standard deviation of each channel of a data set."""

from functools import partial
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from jaxtyping import Int64
from omegaconf import DictConfig
from rich.progress import track

from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.loader import look_at_all
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import UserError
from ssl_xcit.files import writable_folder, write_json
from ssl_xcit.plan import check_numbers
from ssl_xcit.table import shown_in_terminal

NUMBERS = (
    ("num_workers", True, 0),
    ("worker_timeout", False, None),
    ("max_images", True, 1),
)
Counts = Int64[np.ndarray, "channels 256"]


def count_values(
    source: Source, how: Preprocess, chosen: Int64[np.ndarray, " M"], place: int
) -> Counts | str:
    """How often each value comes in each channel of an image, or why it cannot be read."""
    index = int(chosen[place])
    try:
        pixels = decode(source.read(index), how)
    except BadImage as error:
        return f"{source.name(index)} ({error})"
    channels = pixels.reshape(-1, pixels.shape[-1]).T
    return np.stack([np.bincount(channel, minlength=256) for channel in channels])


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
    shown = shown_in_terminal()
    for chunk in track(chunks, "counting", transient=True, disable=not shown):
        for counts in chunk:
            if isinstance(counts, str):
                bad.append(counts)
            else:
                total += counts
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
    print(f"{len(chosen) - len(bad):,} of {len(source):,} images, {how.channels} channels")
    print("  mean  " + " ".join(f"{value:.4f}" for value in mean))
    print("  std   " + " ".join(f"{value:.4f}" for value in std))
    if bad:
        print(f"  {len(bad):,} could not be read, such as {bad[0]}")
    print(f"written: {out}")
    print(f"next: ssl-xcit pretrain ... model.in_chans={how.channels} preprocess.stats={out}")


def moments(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of values in 0..1."""
    values = np.arange(256) / 255.0
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
