"""A frozen backbone, and what evaluators need to extract features with it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import Preprocess, normalise
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.hardware import default_workers

Device = torch.device | str


@dataclass(frozen=True)
class FeatureExtractor:
    """A backbone with the settings it is fed by."""

    backbone: XCiT  # in eval mode within `inference`
    preprocess: Preprocess = RGB  # from files to pixels to its input
    device: Device = "cpu"  # where it is
    batch_size: int = 64  # images at once, on each device
    num_workers: int | None = None  # loader processes; None: one a core, less one
    pair: LabelledPair | None = None  # the labelled images, if there are any
    show: bool = False  # progress bars
    cache: Path | None = None  # folder where features are kept; None: nowhere
    more_devices: Sequence[Device] = ()  # others that extract features, each with a copy
    ranks: bool = False  # all ranks of the process group are here, and each takes a share

    @property
    def workers(self) -> int:
        """Number of loader processes."""
        return default_workers() if self.num_workers is None else self.num_workers

    @cached_property
    def replicas(self) -> list[tuple[XCiT, Device]]:
        """The backbone on every device."""
        copies = [(copy.deepcopy(self.backbone).to(d), d) for d in self.more_devices]
        return [(self.backbone, self.device), *copies]

    def images(self, *pixels: UInt8[np.ndarray, "H W channels"]) -> Float[Tensor, "B channels H W"]:
        """Decoded pixels of one size as the backbone's input, on its device."""
        stacked = torch.from_numpy(np.stack([np.moveaxis(p, -1, 0) for p in pixels]))
        return normalise(stacked.to(self.device), self.preprocess)

    @contextmanager
    def in_eval_mode(self) -> Iterator[XCiT]:
        """The backbone in eval mode for the time being; afterwards as it was."""
        modes = [(part, part.training) for part in self.backbone.modules()]
        self.backbone.eval()
        try:
            yield self.backbone
        finally:
            for part, was_training in modes:
                part.training = was_training

    @contextmanager
    def inference(self) -> Iterator[XCiT]:
        """The backbone in eval mode without gradients; afterwards as it was."""
        with self.in_eval_mode() as backbone, torch.inference_mode():
            yield backbone
