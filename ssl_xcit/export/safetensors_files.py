"""Export to safetensors: in the published names, in timm's, and in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_xcit.errors import UserError
from ssl_xcit.export.comparison import KNN, Run, compare, compare_rounded
from ssl_xcit.export.description import Weights
from ssl_xcit.export.output_files import (
    Exported,
    replacing_path,
    require,
    save_tensors,
    with_ending,
    write_description,
)
from ssl_xcit.models.checkpoint_files import HEADER
from ssl_xcit.models.timm_keys import to_timm_names
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.models.xcit import SIZES


def metadata(weights: Weights) -> dict[str, str]:
    """Metadata of a file: enough to build the network and to prepare its input."""
    content = {
        "architecture": weights.architecture,
        "preprocess": dict(weights.backbone.preprocess),
    }
    return {HEADER: json.dumps(content), "format": "pt"}


def safetensors(weights: Weights, out: Path) -> Exported:
    """Write `NAME.safetensors` in the published names, and `NAME.json` with all that is known."""
    path, notes = with_ending(out, ".safetensors"), weights.left_out()
    weights = weights.of_backbone()
    with replacing_path(path) as part:
        save_tensors(weights.state(), part, metadata(weights))
        checked = compare(weights, loaded(part), close=0.0)
    about = write_description(weights, with_ending(out, ".json"))
    return Exported(
        [path, about], f"loaded back by ssl_xcit: {checked}", loading(weights, path), notes
    )


def loaded(path: Path) -> Run:
    """A file or folder as a function of images, with its classifier where it has one."""
    network = load_backbone(path)
    return nn.Sequential(network, network.head)


def loading(weights: Weights, path: Path) -> str:
    """Lines that load a file."""
    load = f'import ssl_xcit\nbackbone = ssl_xcit.load_backbone("{path}")'
    return load + "\nlogits = backbone.head(backbone(images))" * bool(weights.num_classes)


def bfloat16(weights: Weights, out: Path, knn: KNN | None = None) -> Exported:
    """Write `NAME-bf16.safetensors`: weights of 16 bits, half the size, computed in float32 unless
    under autocast; `NAME-bf16.json` has what the rounding costs.
    """
    path, left_out = with_ending(out, "-bf16.safetensors"), weights.left_out()
    weights = weights.of_backbone()
    with replacing_path(path) as part:
        state = weights.state()
        low = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in state.items()}
        save_tensors(low, part, metadata(weights))
        num_bytes = sum(v.nbytes for v in state.values()), part.stat().st_size
        runs = weights.output, loaded(part)
        rounding = compare_rounded(weights, "bf16", runs, num_bytes, knn)
    about = write_description(weights, path.with_suffix(".json"), bf16=rounding.data)
    notes = [*left_out, *rounding.notes, "computed in float32, unless under torch.autocast"]
    checked = f"loaded back by ssl_xcit: {rounding.checked}"
    return Exported([path, about], checked, loading(weights, path), notes)


def timm_arguments(weights: Weights) -> tuple[str, dict[str, Any]]:
    """Name and arguments for `timm.create_model`.

    Raises:
        UserError: timm has no such stem.
    """
    architecture = weights.architecture
    if architecture["patch_size"] not in (8, 16):
        raise UserError(
            f"timm's XCiT has patches of 8 and 16, and these weights have "
            f"{architecture['patch_size']}: choose format=safetensors, onnx, program or int8"
        )
    arguments: dict[str, Any] = {"num_classes": weights.num_classes}
    if architecture["in_chans"] != 3:
        arguments["in_chans"] = architecture["in_chans"]
    keys = ("embed_dim", "depth", "num_heads", "tokens_norm")
    known = {(*numbers[:3], numbers[4]): size for size, numbers in SIZES.items()}
    if size := known.get(tuple(architecture[key] for key in keys)):
        return f"xcit_{size}_p{architecture['patch_size']}_224", arguments
    arguments |= {key: architecture[key] for key in (*keys, "patch_size")}
    return "xcit_nano_12_p16_224", arguments | {"eta": architecture["layer_scale"]}


def timm(weights: Weights, out: Path) -> Exported:
    """Write `NAME-timm.safetensors` for `timm.create_model(..., checkpoint_path=...)`, and of a
    classifier `NAME-timm.json` with the names of the classes.
    """
    notes, weights = weights.left_out(), weights.of_backbone()
    name, arguments = timm_arguments(weights)
    require("timm", "timm")
    import timm as library

    path = with_ending(out, "-timm.safetensors")
    with replacing_path(path) as part:
        save_tensors(to_timm_names(weights.state()), part, {"format": "pt"})
        model = library.create_model(name, checkpoint_path=str(part), **arguments).eval()
        checked = compare(weights, model)
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    use = f'import timm\nmodel = timm.create_model("{name}", {words}, checkpoint_path="{path}")'
    paths = [path]
    if weights.num_classes:
        paths.append(write_description(weights, path.with_suffix(".json")))
    return Exported(paths, f"loaded by timm {library.__version__}: {checked}", use, notes)
