"""Files of weights: ours, the published XCiT and DINO files, timm's, safetensors; by path or by
name (`published.py`).

Files are read with `weights_only=True`, so a hostile one runs no code; nothing is loaded in part:
whatever does not match is an error that lists it.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.manifest import verify
from ssl_xcit.models.names import from_timm_names
from ssl_xcit.models.published import TIMM, TIMM_FILE, found_by_name, is_address
from ssl_xcit.models.xcit import SIZES, XCiT

StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]
HEADER = "ssl_xcit"  # of what a safetensors file says of itself: architecture and preprocess
HEAD_KEYS = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
HEAD_KEYS |= {"last_layer.weight_v"}
GAINS = "last_layer.weight_g"  # may be missing, for where they are frozen all are 1
# what the tensors tell of an architecture
MEASURED = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "num_classes")


def load_backbone(
    path: str | Path, which: Which = "teacher", expect: Mapping[str, Any] | None = None
) -> XCiT:
    """The backbone in a checkpoint, in eval mode.

    Args:
        path: see `checkpoint_path`.
        which: the network of a training file that holds both.
        expect: an `XCiT.architecture` that the file must hold (keys missing here are free).

    Raises:
        MissingPath: no such file, or a run folder without a checkpoint.
        UserError: unreadable, not an XCiT, or another architecture than expected (names both).
    """
    path = checkpoint_path(path)
    return backbone_in(read_checkpoint(path), path, which, expect)


def backbone_in(
    content: Mapping[str, Any],
    path: Path,
    which: Which = "teacher",
    expect: Mapping[str, Any] | None = None,
) -> XCiT:
    """The same of a file that was read; see `load_backbone`."""
    state = backbone_state(content, which, path)
    seen = architecture_of(state, path)
    architecture = {"num_classes": 0, **(recorded_architecture(content, path) or seen)}
    if empty := [key for key in MEASURED if not seen[key] and key != "num_classes"]:
        raise UserError(f"{path} is not an XCiT checkpoint: {listed(empty)} 0")
    wrong = [key for key in MEASURED if architecture[key] != seen[key]]
    if wrong:
        keys = ", ".join(f"{key} {architecture[key]}, not {seen[key]}" for key in wrong)
        raise UserError(f"{path}: its architecture is not that of its tensors: {keys}")
    differs = {k: v for k, v in (expect or {}).items() if architecture.get(k) != v}
    if differs:
        keys = ", ".join(f"{k} {architecture.get(k)}, not {v}" for k, v in differs.items())
        raise UserError(
            f"{path} holds {model_name(architecture)}, not "
            f"{model_name({**architecture, **differs})} ({keys}): drop model=... to take what the "
            "file holds"
        )
    with torch.device("meta"):  # what does not fit shall not take memory either
        check_fit(XCiT(**architecture), state, path)
    model = XCiT(**architecture)
    load_strictly(model, state, path)
    preprocess = content.get("preprocess")
    model.preprocess = dict(preprocess) if isinstance(preprocess, dict) else {}
    model.preprocess.setdefault("channels", architecture["in_chans"])
    return model.eval()


class Training(NamedTuple):
    """What a training file holds beside the backbone; None where it does not."""

    backbone: XCiT
    head: StateDict | None  # of `DINOHead`, of the same network
    center: Tensor | None  # (K,)


def load_training(path: str | Path, which: Which = "teacher") -> Training:
    """Backbone, projection head and center of a training file, ours or a published one.

    Raises:
        UserError: as `load_backbone`; or there is a head, but none of ours (lists what it has).
    """
    path = checkpoint_path(path)
    content = read_checkpoint(path)
    backbone = backbone_in(content, path, which)
    head = head_state(content, which)
    if head is None:
        return Training(backbone, None, None)
    problems = [f"unexpected {key}" for key in head if key not in HEAD_KEYS | {GAINS}]
    problems += [f"missing {key}" for key in sorted(HEAD_KEYS - head.keys())]
    problems += [
        f"{key} is {tuple(value.shape)}"
        for key, value in head.items()
        if value.ndim != (1 if key.endswith("bias") else 2)
    ]
    if problems:
        raise UserError(f"{path}: its projection head is not DINO's: {listed(problems)}")
    if "state_dict" in content:
        center = content["state_dict"].get("center.center")
    else:
        loss = content.get("dino_loss")
        center = loss.get("center") if isinstance(loss, Mapping) else None
    if center is not None:
        prototypes = len(head["last_layer.weight_v"])
        if not isinstance(center, Tensor) or center.numel() != prototypes:
            raise UserError(f"{path}: its center is not one number for each of {prototypes}")
        center = center.detach().float().flatten()
    return Training(backbone, head, center)


def head_state(content: Mapping[str, Any], which: Which) -> StateDict | None:
    """The projection head's tensors under our names; None where there are none."""
    state = content.get("state_dict", content.get(which, {}))
    prefix = re.compile(rf"(?:{which}\.head|(?:module\.)?head)\.")
    found = {
        key[match.end() :]: value
        for key, value in state.items()
        if isinstance(value, Tensor) and (match := prefix.match(key))
    }
    names = {f"last_layer.parametrizations.weight.original{i}": f"last_layer.weight_{letter}"
             for i, letter in enumerate("gv")}  # fmt: skip
    return {names.get(key, key): value for key, value in found.items()} or None


def checkpoint_path(path: str | Path) -> Path:
    """The file that is meant: itself; a run folder's newest checkpoint (the highest step in its
    name); an exported folder's `model.safetensors`; or, downloaded once, a released file by name or
    address (`published.found_by_name`).

    Raises:
        MissingPath: there is none.
        UserError: it cannot be downloaded.
    """
    word, path = str(path), Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        if found := checkpoints_of(path):
            return found[-1]
        if (path / TIMM_FILE).is_file():
            return path / TIMM_FILE
        raise MissingPath(
            f"ckpt={path}: a folder without checkpoints/step-*.ckpt or {TIMM_FILE}; name a file"
        )
    of_network = is_address(word) or word.startswith(TIMM) or "#sha256=" in word
    if not of_network and (path.suffix or "/" in word):  # a path, and not a name
        raise MissingPath(f"ckpt={path}: no such file or run folder")
    return found_by_name(word, sys.stdout.isatty())


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
    if path.suffix == ".safetensors":
        return read_safetensors(path)
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


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under `model`, and what `ssl-xcit export` has written into the header.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # of a library in another language
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again"
        ) from error
    return {**(about if isinstance(about, dict) else {}), "model": tensors}


def recorded_architecture(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """What a file of ours says that it holds, which is data from outside; None where it does not.

    Raises:
        UserError: it is nothing that an XCiT is made of.
    """
    recorded = content.get("architecture")
    if recorded is None:
        return None
    known = dict.fromkeys(("embed_dim", "depth", "num_heads", "patch_size", "in_chans"), int)
    kinds: dict[str, Any] = {
        **known, "num_classes": int, "tokens_norm": bool, "layer_scale": int | float
    }  # fmt: skip
    good = isinstance(recorded, dict) and recorded.keys() <= kinds.keys() >= known.keys()
    if not good or not known.keys() <= recorded.keys():
        raise UserError(f"{path}: its architecture is {recorded!r:.200}, which is no XCiT's")
    for name, value in recorded.items():
        right = isinstance(value, kinds[name])
        if not right or (kinds[name] is int and not 0 <= value <= 65_536):
            raise UserError(f"{path}: its architecture has {name}={value!r:.100}")
    return dict(recorded)


def backbone_state(content: Mapping[str, Any], which: Which, path: Path) -> StateDict:
    """The backbone's tensors under the published names, whatever wraps them."""
    # ours, a full DINO training file, a supervised file, or bare
    place = next((key for key in ("state_dict", which, "model") if key in content), None)
    state = content if place is None else content[place]
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: {place} in it is a {type(state).__name__}, not weights by name")
    ours = place == "state_dict"
    prefixes = [f"{which}.backbone."] if ours else ["module.", "backbone."]
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    strange = [str(key) for key in state if key not in tensors]
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in tensors):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            # beside the backbone a training file holds the projection head, which is no part of it
            outside = [k for k in tensors if not k.startswith((prefix, "head."))]
            if outside and not ours:
                raise UserError(f"{path}: unknown entries beside {prefix}*: {listed(outside)}")
            tensors = inside
    if not any(key.endswith("attn.temperature") for key in tensors):
        found = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(f"{path} is not an XCiT checkpoint: it holds {found} ...")
    if strange:
        raise UserError(f"{path}: entries that are no tensors: {listed(strange)}")
    if any(key.startswith("pos_embed.") for key in tensors):
        tensors = from_timm_names(tensors)
    return tensors


def architecture_of(state: StateDict, path: Path) -> dict[str, Any]:
    """Read off the shapes; `XCiT(**architecture)` fits the state dict."""
    try:
        convolutions = [k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)]
        embed_dim = state["cls_token"].shape[-1]
        depth = len({m[1] for k in state if (m := re.match(r"blocks\.(\d+)\.", k))})
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
    except KeyError as error:
        raise UserError(f"{path} is not a whole XCiT checkpoint: {error} is missing") from error
    except IndexError as error:
        raise UserError(f"{path} is not an XCiT checkpoint: its tensors lack dimensions") from error


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
    check_fit(model, state, path)
    model.load_state_dict(dict(state))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """That a state dict has just the names and shapes of a network.

    Raises:
        UserError: lists what does not fit.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise UserError(f"{path} does not fit the network: {listed(problems)}")


def listed(words: Sequence[str]) -> str:
    """The first five, and how many more."""
    more = f" and {len(words) - 5:,} more" if len(words) > 5 else ""
    return "; ".join(words[:5]) + more
