"""Pack patch features for a page, which compares all patches with the one that is clicked.

Cosines of features are kept by their rows in the axes with the most of their energy, as whole
numbers of 8 bits: a page opened from a disk can read no file but a script, so that is what they are
written as.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn.functional import normalize

from ssl_xcit.utils.files import replacing

from .pictures import BRIGHTEST, colour_table

ENERGY = 0.995  # share of the squared length that is kept
MOST = 96  # axes


def packed_features(patches: Float[Tensor, "C h w"]) -> Int8[np.ndarray, "h w axes"]:
    """Rows of length 127; their products over 127 squared are about the cosines of the features."""
    unit = normalize(patches.cpu().double().flatten(1).mT, dim=1)  # (N, C)
    energy, axes = torch.linalg.eigh(unit.mT @ unit)  # ascending
    shares = energy.flip(0).clamp_min(0.0).cumsum(0) / energy.sum().clamp_min(1e-30)
    count = min(MOST, len(energy), int((shares < ENERGY).sum()) + 1)
    rows = normalize(unit @ axes.flip(1)[:, :count], dim=1)
    return np.rint(rows.unflatten(0, patches.shape[1:]).numpy() * 127).astype(np.int8)


def write_features(patches: Float[Tensor, "C h w"], path: Path) -> None:
    """Write a script that hands packed features to the page."""
    rows = packed_features(patches)
    content = json.dumps(
        {"sides": rows.shape, "rows": base64.b64encode(rows.tobytes()).decode()},
        separators=(",", ":"),
    )
    with replacing(path) as part:
        part.write_text(f"comparePatches({content})\n", encoding="utf-8")


def similarity_settings(strength: float) -> dict[str, Any]:
    """What the page's script needs to draw similarities."""
    return {
        "colours": colour_table().flatten().tolist(),
        "strength": strength if math.isfinite(strength) else 1.0,
        "brightest": BRIGHTEST,
    }
