"""The weights that a run of a task starts from, or those of its checkpoint where it goes on."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, checkpoints_of, read_weights
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.run_dir import is_begun
from ssl_xcit.training.settings import FinetuneSettings
from ssl_xcit.transfer.record import transfer_record
from ssl_xcit.utils.files import sha256_of


def read_start(
    settings: FinetuneSettings, run_dir: Path
) -> tuple[FinetuneSettings, XCiT | None, Mapping[str, Any] | None]:
    """Read the weights to start from.

    Returns:
        The settings with the file's checksum; the backbone, None for one from scratch, of a run
        that has begun that of its checkpoint; and what the latter says of its task.

    Raises:
        UserError: no such file, or no backbone in it.
    """
    if is_begun(run_dir) and (run_dir / "config.yaml").is_file() and checkpoints_of(run_dir):
        before: Any = OmegaConf.load(run_dir / "config.yaml")
        for path in reversed(checkpoints_of(run_dir)):
            with suppress(UserError):  # damaged: the one before it is gone on from
                backbone, recorded = load_backbone(path), transfer_record(read_weights(path))
                settings = replace(settings, sha256=OmegaConf.select(before, "sha256"))
                return settings, backbone, recorded
    if settings.ckpt is None:
        return settings, None, None
    path = checkpoint_path(str(settings.ckpt))
    backbone = load_backbone(path, settings.which)
    return replace(settings, sha256=sha256_of(path)), backbone, None
