"""Names and files of weights: ours, the published XCiT and DINO files, timm's names.

Files are read with `weights_only=True`, so a hostile one runs no code; nothing is loaded in part:
whatever does not match is an error that lists it.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.manifest import verify
from ssl_xcit.models.xcit import SIZES, XCiT

StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]


def load_backbone(
    path: str | Path, which: Which = "teacher", expect: Mapping[str, Any] | None = None
) -> XCiT:
    """The backbone in a checkpoint, in eval mode.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint of ours, or a published `.pth`:
            supervised (under `model`), bare DINO backbone, or a full DINO training file.
        which: the network of a training file that holds both.
        expect: an `XCiT.architecture` that the file must hold (keys missing here are free).

    Raises:
        MissingPath: no such file, or a run folder without a checkpoint.
        UserError: unreadable, not an XCiT, or another architecture than expected (names both).
    """
    path = checkpoint_path(path)
    content = read_checkpoint(path)
    state = backbone_state(content, which, path)
    recorded = content.get("architecture")
    architecture = recorded if isinstance(recorded, dict) else architecture_of(state, path)
    differs = {k: v for k, v in (expect or {}).items() if architecture.get(k) != v}
    if differs:
        keys = ", ".join(f"{k} {architecture.get(k)}, not {v}" for k, v in differs.items())
        raise UserError(
            f"{path} holds {model_name(architecture)}, not "
            f"{model_name({**architecture, **differs})} ({keys}): drop model=... to take what the "
            "file holds"
        )
    model = XCiT(**architecture)
    load_strictly(model, state, path)
    preprocess = content.get("preprocess")
    model.preprocess = dict(preprocess) if isinstance(preprocess, dict) else {}
    model.preprocess.setdefault("channels", architecture["in_chans"])
    return model.eval()


def checkpoint_path(path: str | Path) -> Path:
    """The file itself, or a run folder's newest checkpoint (the highest step in its name)."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingPath(f"ckpt={path}: no such file or run folder")
    found = checkpoints_of(path)
    if not found:
        raise MissingPath(f"ckpt={path}: a folder without checkpoints/step-*.ckpt; name a file")
    return found[-1]


def checkpoints_of(run_dir: Path) -> list[Path]:
    """`RUN/checkpoints/step-000100.ckpt` and the like, by step, the newest last."""
    files = (run_dir / "checkpoints").glob("step-*.ckpt")
    numbered = [(int(m[1]), f) for f in files if (m := re.fullmatch(r"step-(\d+)\.ckpt", f.name))]
    return [file for _, file in sorted(numbered)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dictionary, on the CPU; tensors and plain containers only.

    Raises:
        UserError: it cannot be read, or is not what the manifest beside it says was written.
    """
    verify(path)
    try:
        # Published training files carry their command line as a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        reason = (
            "truncated or not a PyTorch file"
            if not zipfile.is_zipfile(path)
            else str(error).splitlines()[0]
        )
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def backbone_state(content: Mapping[str, Any], which: Which, path: Path) -> StateDict:
    """The backbone's tensors under the published names, whatever wraps them."""
    state: Mapping[str, Any] = content
    prefixes = ["module.", "backbone."]
    if "state_dict" in content:  # ours
        state = content["state_dict"]
        prefixes = [f"{which}.backbone."]
    elif which in content:  # a full DINO training file
        state = content[which]
    elif "model" in content:  # supervised
        state = content["model"]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in tensors):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            # beside the backbone a training file holds the projection head, which is no part of it
            outside = [k for k in tensors if not k.startswith((prefix, "head."))]
            if outside and prefix != f"{which}.backbone.":
                raise UserError(
                    f"{path}: unknown entries beside {prefix}*: {', '.join(outside[:5])}"
                )
            tensors = inside
    if not any(key.endswith("attn.temperature") for key in tensors):
        found = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(f"{path} is not an XCiT checkpoint: it holds {found} ...")
    if any(key.startswith("pos_embed.") for key in tensors):
        tensors = from_timm_names(tensors)
    return tensors


def architecture_of(state: StateDict, path: Path) -> dict[str, Any]:
    """Read off the shapes; `XCiT(**architecture)` fits the state dict."""
    try:
        convolutions = [k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)]
        embed_dim = state["cls_token"].shape[-1]
        depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
        num_heads = state["blocks.0.attn.temperature"].shape[0]
        # what shapes do not tell is known of the published sizes; else XCiT's defaults
        known = {size[:3]: size[3:] for size in SIZES.values()}
        layer_scale, tokens_norm = known.get((embed_dim, depth, num_heads), (1.0, True))
        return {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": 2 ** len(convolutions),
            "layer_scale": layer_scale,
            "tokens_norm": tokens_norm,
            "in_chans": state["patch_embed.proj.0.0.weight"].shape[1],
            "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole XCiT checkpoint: {error} is missing") from error


def model_name(architecture: Mapping[str, Any]) -> str:
    """`xcit_small_12_p16`, or the numbers where no published size has them."""
    for size, (embed_dim, depth, num_heads, _, _) in SIZES.items():
        if (embed_dim, depth, num_heads) == tuple(
            architecture[key] for key in ("embed_dim", "depth", "num_heads")
        ):
            return f"xcit_{size}_p{architecture['patch_size']}"
    return "XCiT of width {embed_dim}, depth {depth}, {num_heads} heads, patch {patch_size}".format(
        **architecture
    )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """load_state_dict that names the file and lists what does not fit."""
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit the network: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(dict(state))


def from_timm_names(state: Mapping[str, Tensor]) -> StateDict:
    """timm's XCiT state dict under the published names: `pos_embed` and class attention's separate
    q, k, v.
    """
    renamed: StateDict = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", key):
            stem, part, kind = match.groups()
            if part == "q":
                parts = [state[f"{stem}.{letter}.{kind}"] for letter in "qkv"]
                renamed[f"{stem}.qkv.{kind}"] = torch.cat(parts)
        else:
            renamed[re.sub(r"^pos_embed\.", "pos_embeder.", key)] = value
    return renamed
