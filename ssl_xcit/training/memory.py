"""Tell that memory has run out, and what to change then."""

import gc
import re

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the machine as torch and numpy say it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = "out of memory|can't allocate memory|not enough memory|cannot allocate memory"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I) is not None


def release() -> None:
    """Give back what is not used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def remedies(images: int, accumulate: int, image_size: str) -> str:
    """What to set before a run so that a step on so many images a device, in so many parts, takes
    less; `image_size` as in `advice`.
    """
    parts = min(2 * accumulate, images)
    if parts == accumulate:
        return f"set checkpoint_blocks=true, a smaller model=... or {image_size}"
    return (
        f"set checkpoint_blocks=true, or trainer.accumulate={parts}, which computes the same batch "
        "in smaller parts, or a smaller batch_size"
    )


def advice(images: int, accumulate: int, image_size: str) -> str:
    """What to change when a step on so many images a device, in so many parts, was too large;
    `image_size` is the setting that makes images smaller.
    """
    at_once = -(-images // accumulate)
    trouble = f"out of memory with {at_once} images at a time, of {images} a step on this device: "
    if at_once == 1:
        return (
            f"{trouble}checkpoint_blocks=true takes less, or, as a new run, a smaller model=... "
            f"or {image_size}"
        )
    return (
        f"{trouble}go on with checkpoint_blocks=true, or as a new run, name=..., with "
        f"trainer.accumulate={min(2 * accumulate, images)}, which computes the same batch in "
        "smaller parts, or with a smaller batch_size"
    )
