"""Files of weights: safetensors in the published names, timm's, and in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.export.exported import (
    Made,
    Weights,
    beside,
    compare,
    needs,
    save_tensors,
    tell,
    with_ending,
)
from ssl_xcit.export.rounded import KNN, cost
from ssl_xcit.models.names import to_timm_names
from ssl_xcit.models.weights import HEADER, load_backbone
from ssl_xcit.models.xcit import SIZES


def header(weights: Weights) -> dict[str, str]:
    """What a file says of itself: enough to build the network and to feed it."""
    content = {
        "architecture": weights.architecture,
        "preprocess": dict(weights.backbone.preprocess),
    }
    return {HEADER: json.dumps(content), "format": "pt"}


def safetensors(weights: Weights, out: Path) -> Made:
    """`NAME.safetensors` under the published names, and `NAME.json` with all that is known."""
    path = with_ending(out, ".safetensors")
    with beside(path) as part:
        save_tensors(weights.state(), part, header(weights))
        checked = compare(weights, load_backbone(part), close=0.0)
    about = tell(weights, with_ending(out, ".json"))
    use = f'import ssl_xcit\nbackbone = ssl_xcit.load_backbone("{path}")'
    return Made([path, about], f"loaded back by ssl_xcit: {checked}", use)


def bfloat16(weights: Weights, out: Path, knn: KNN | None = None) -> Made:
    """`NAME-bf16.safetensors`: weights of 16 bits, half the size, computed in float32 unless under
    autocast; `NAME-bf16.json` has what that costs.
    """
    path = with_ending(out, "-bf16.safetensors")
    with beside(path) as part:
        low = {
            k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in weights.state().items()
        }
        save_tensors(low, part, header(weights))
        whole = sum(v.numel() * v.element_size() for v in weights.state().values())
        runs = weights.backbone, load_backbone(part)
        checked, notes, data = cost(weights, "bf16", runs, (whole, part.stat().st_size), knn)
    notes.append("computed in float32, unless under torch.autocast")
    about = tell(weights, path.with_suffix(".json"), bf16=data)
    use = f'import ssl_xcit\nbackbone = ssl_xcit.load_backbone("{path}")'
    return Made([path, about], f"loaded back by ssl_xcit: {checked}", use, notes)


def timm_arguments(weights: Weights) -> tuple[str, dict[str, Any]]:
    """Name and arguments for `timm.create_model`.

    Raises:
        UserError: timm has no such stem.
    """
    architecture = weights.architecture
    if architecture["patch_size"] not in (8, 16):
        raise UserError(
            f"timm's XCiT has patches of 8 and 16, and these weights have "
            f"{architecture['patch_size']}: format=safetensors, onnx, program or int8 hold them"
        )
    arguments: dict[str, Any] = {"num_classes": 0}
    if architecture["in_chans"] != 3:
        arguments["in_chans"] = architecture["in_chans"]
    decides = ("embed_dim", "depth", "num_heads", "tokens_norm")
    known = {(*numbers[:3], numbers[4]): size for size, numbers in SIZES.items()}
    if size := known.get(tuple(architecture[key] for key in decides)):
        return f"xcit_{size}_p{architecture['patch_size']}_224", arguments
    arguments |= {key: architecture[key] for key in (*decides, "patch_size")}
    return "xcit_nano_12_p16_224", arguments | {"eta": architecture["layer_scale"]}


def timm(weights: Weights, out: Path) -> Made:
    """`NAME-timm.safetensors` for `timm.create_model(..., checkpoint_path=...)`."""
    name, arguments = timm_arguments(weights)
    needs("timm", "timm")
    import timm as library

    path = with_ending(out, "-timm.safetensors")
    with beside(path) as part:
        tensors: dict[str, Tensor] = to_timm_names(weights.state())
        save_tensors(tensors, part, {"format": "pt"})
        model = library.create_model(name, checkpoint_path=str(part), **arguments).eval()
        checked = compare(weights, model)
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    use = f'import timm\nmodel = timm.create_model("{name}", {words}, checkpoint_path="{path}")'
    return Made([path], f"loaded by timm {library.__version__}: {checked}", use)
