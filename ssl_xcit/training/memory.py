"""When memory runs out: how many images at a time would have fitted, found by trying."""

import gc
import re
from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the machine as torch and numpy say it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = "out of memory|can't allocate memory|not enough memory|cannot allocate memory"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I) is not None


def fitting_batch(attempt: Callable[[int], None], tried: int) -> int:
    """The largest half, quarter, ... of `tried` with which `attempt` does not run out of memory; 0
    when one image does.
    """
    count = tried // 2
    while count > 0:
        release()
        try:
            attempt(count)
        except Exception as error:
            if not is_out_of_memory(error):
                return 0
        else:
            return count
        count //= 2
    return 0


def release() -> None:
    """Give back what is not used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def advice(images: int, at_once: int, fitting: int, tried: bool) -> str:
    """What to change.

    Args:
        images: of a step on this device.
        at_once: of these were too many.
        fitting: images that were computed at once without trouble, or half as many; 0: not even
            one.
        tried: they were.
    """
    trouble = f"out of memory with {at_once} images at a time on this device"
    if fitting == 0:
        return (
            f"{trouble}, and with one: checkpoint_blocks=true takes less, or, as a new run, a "
            "smaller model=... or augment.global_size"
        )
    return (
        f"{trouble}; {fitting} fit{', as was tried' if tried else ' perhaps'}. Go on with "
        "checkpoint_blocks=true, or as a new run, name=..., with "
        f"trainer.accumulate={-(-images // fitting)}, which computes the same batch in parts of "
        f"that size, or with a batch_size of {fitting} a device"
    )
