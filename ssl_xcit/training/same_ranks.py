"""Ranks that were started apart, as by srun or torchrun, must train the same run."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import lightning
import torch.distributed as dist

from ssl_xcit.data.identity import DataIndex
from ssl_xcit.errors import UserError
from ssl_xcit.training.settings import place_keys
from ssl_xcit.utils.validation import flat

PACKAGES = ("ssl-xcit", "torch", "lightning", "numpy")
OWN = ("run_id", "num_workers")  # settings that each rank may have its own of, as of places
SHOWN = 5  # of the differences


class SameRanks(lightning.Callback):
    """Before training, compare what ranks were told, which images they see and what they run on.

    Args:
        settings: of the run, as plain data.
        indices: of its images, by the setting that names them.
    """

    def __init__(self, settings: Mapping[str, Any], indices: Mapping[str, DataIndex]):
        own = (*OWN, *place_keys(settings))
        within = tuple(f"{key}." for key in own)
        told = {k: v for k, v in flat(settings) if k not in own and not k.startswith(within)}
        versions = {name: version(name) for name in PACKAGES}
        images = {
            f"the images of {key}": f"{index.num_images:,} ({index.digest()[:8]})"
            for key, index in indices.items()
        }
        self.facts = {**told, **images, "Python": platform.python_version(), **versions}

    def setup(self, trainer: Any, *_: object, **__: object) -> None:
        """On all ranks alike.

        Raises:
            UserError: names the first rank that differs from rank 0, and in what.
        """
        if trainer.world_size == 1:
            return
        every: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(every, self.facts)
        for rank, facts in enumerate(every):
            keys = [k for k in every[0] | facts if facts.get(k) != every[0].get(k)]
            if keys:
                differences = ", ".join(
                    f"{k} {facts.get(k, 'not set')} (rank 0: {every[0].get(k, 'not set')})"
                    for k in keys[:SHOWN]
                )
                more = f" and {len(keys) - SHOWN} more" * (len(keys) > SHOWN)
                raise UserError(
                    f"rank {rank} was started with {differences}{more}: all ranks need the same "
                    "command, the same images and the same packages"
                )
