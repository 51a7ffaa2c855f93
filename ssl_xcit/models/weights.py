"""Load weights from files: ours, the published XCiT and DINO files, timm's, safetensors, those of
people's own scripts. A backbone is loaded strictly: an error lists whatever does not match.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.backbone_location import (
    WRAPPED,
    Location,
    Which,
    entries_of,
    is_ours,
    locate,
    log_ignored,
    unwrapped,
)
from ssl_xcit.models.checkpoint_files import checkpoint_path, read_weights
from ssl_xcit.models.foreign import SAVE_WHOLE
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.models.xcit import SIZES, XCiT
from ssl_xcit.utils.validation import allows, hints_of
from ssl_xcit.utils.words import first_few

log = logging.getLogger(__name__)
StateDict = dict[str, Tensor]
HEAD_KEYS = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
HEAD_KEYS |= {"last_layer.weight_v"}
GAINS = "last_layer.weight_g"  # may be missing, for where they are frozen all are 1
# the part of an architecture that shapes tell
MEASURED = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "num_classes")
CLASS_ATTENTION = ("cls_token", "cls_attn_blocks.", "norm.")
PYRAMID = "fpn1.0.weight"  # at patches of 8 and 16; the layers of patch 4 have no weights
LARGEST = 65_536  # number in a recorded architecture, which comes from outside


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
    return backbone_in(read_weights(path), path, which, expect)


def backbone_in(
    content: Mapping[str, Any],
    path: Path,
    which: Which = "teacher",
    expect: Mapping[str, Any] | None = None,
) -> XCiT:
    """The backbone in a file that was read; see `load_backbone`."""
    location = locate(content, which, path)
    where = f"{path} ({location})" if str(location) else str(path)
    state = backbone_state(location, where)
    log_ignored(location, content, which, path)
    measured = architecture_of(state, where)
    # in files of others, entries of the same name mean other things
    ours = is_ours(location, which) or path.suffix == ".safetensors"
    recorded = recorded_architecture(content, path) if ours else None
    architecture = {"num_classes": 0, **(recorded or measured)}
    if empty := [key for key in MEASURED if not measured[key] and key != "num_classes"]:
        raise UserError(f"{where} is not an XCiT checkpoint: {first_few(empty)} 0")
    wrong = [key for key in MEASURED if architecture[key] != measured[key]]
    if wrong:
        keys = ", ".join(f"{key} {architecture[key]}, not {measured[key]}" for key in wrong)
        raise UserError(f"{path}: its architecture is not that of its tensors: {keys}")
    differs = {k: v for k, v in (expect or {}).items() if architecture.get(k) != v}
    if differs:
        keys = ", ".join(f"{k} {architecture.get(k)}, not {v}" for k, v in differs.items())
        raise UserError(
            f"{path} holds {model_name(architecture)}, not "
            f"{model_name({**architecture, **differs})} ({keys}): drop model=... to take what the "
            "file holds"
        )
    with torch.device("meta"):  # a file that does not fit takes no memory
        network = XCiT(**architecture)
        check_fit(network, completed(state, network), where)
    model = XCiT(**architecture)
    load_strictly(model, completed(state, model), where)
    if is_dense(state):
        log.warning(
            "%s has no class attention: it fits segmentation and detection, and its class token "
            "means nothing",
            where,
        )
    preprocess = content.get("preprocess") if ours else None
    model.preprocess = dict(preprocess) if isinstance(preprocess, dict) else {}
    model.preprocess.setdefault("channels", architecture["in_chans"])
    return model.eval()


class TrainingWeights(NamedTuple):
    """A training file's backbone, and its head and center, None where it has none."""

    backbone: XCiT
    head: StateDict | None  # of `DINOHead`, of the same network
    center: Tensor | None  # (K,)


def load_training(path: str | Path, which: Which = "teacher") -> TrainingWeights:
    """Backbone, projection head and center of a training file, ours or a published one.

    Raises:
        UserError: as `load_backbone`; or the head is not DINO's (lists its tensors).
    """
    path = checkpoint_path(path)
    content = read_weights(path)
    backbone = backbone_in(content, path, which)
    head = head_state(locate(content, which, path))
    if head is None:
        return TrainingWeights(backbone, None, None)
    problems = [f"unexpected {key}" for key in head if key not in HEAD_KEYS | {GAINS}]
    problems += [f"missing {key}" for key in sorted(HEAD_KEYS - head.keys())]
    problems += [
        f"{key} is {tuple(value.shape)}"
        for key, value in head.items()
        if value.ndim != (1 if key.endswith("bias") else 2)
    ]
    if problems:
        raise UserError(f"{path}: its projection head is not DINO's: {first_few(problems)}")
    state, loss = content.get("state_dict"), content.get("dino_loss")
    center = center_of(state) if isinstance(state, Mapping) else None
    if center is None and isinstance(loss, Mapping):
        center = loss.get("center")
    if center is not None:
        prototypes = len(head["last_layer.weight_v"])
        if not isinstance(center, Tensor) or center.numel() != prototypes:
            raise UserError(f"{path}: its center is not one number for each of {prototypes}")
        center = center.detach().float().flatten()
    return TrainingWeights(backbone, head, center)


def center_of(state: Mapping[str, Any]) -> Any:
    """DINO's center in a state dict of ours, which older files have outside the objective; None:
    there is none.
    """
    return state.get("objective.center.center", state.get("center.center"))


def head_state(location: Location) -> StateDict | None:
    """The tensors of the projection head beside a backbone, under our names; None without."""
    if (prefix := location.head_prefix) is None:
        return None
    tensors = {
        key.removeprefix(prefix): value
        for key, value in unwrapped(location.tensors).items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    if not any(key.startswith("last_layer.") for key in tensors):  # of a classifier, or of others
        return None
    names = {f"last_layer.parametrizations.weight.original{i}": f"last_layer.weight_{letter}"
             for i, letter in enumerate("gv")}  # fmt: skip
    return plain_tensors({names.get(key, key): v for key, v in tensors.items()}, "its head")


def recorded_architecture(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The architecture that a file of ours records, checked; None where it records none.

    Raises:
        UserError: no XCiT has it.
    """
    recorded = content.get("architecture")
    if recorded is None:
        return None
    hints = hints_of(f"{XCiT.__module__}.{XCiT.__name__}")
    needed = {"embed_dim", "depth", "num_heads", "patch_size", "in_chans"}
    names = needed | {"num_classes", "tokens_norm", "layer_scale", "pyramid"}
    if not isinstance(recorded, dict) or not needed <= recorded.keys() <= names:
        raise UserError(f"{path}: its architecture is {recorded!r:.200}, which is no XCiT's")
    for name, value in recorded.items():
        if not allows(hints[name], value) or value > LARGEST:
            raise UserError(f"{path}: its architecture has {name}={value!r:.100}")
    return dict(recorded)


def backbone_state(location: Location, where: str) -> StateDict:
    """A backbone's tensors under the published names, plain and in float32.

    Raises:
        UserError: an entry is no tensor, or only a shard of one.
    """
    entries = {key: value for key, value in location.tensors.items() if location.owns(key)}
    strange = [
        str(key) if isinstance(value, Tensor) else f"{key} ({type(value).__name__})"
        for key, value in entries.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise UserError(f"{where}: entries that are no tensors: {first_few(strange)}")
    counts = Counter(WRAPPED.sub("", key) for key in entries)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(f"{where}: entries that are there twice: {first_few(twice)}")
    return from_timm_names(plain_tensors(entries_of(location), where))


def plain_tensors(tensors: Mapping[str, Tensor], where: str) -> StateDict:
    """Plain tensors, those of floating point in float32, also of DTensors.

    Raises:
        UserError: some are shards, or are not dense.
    """
    plain, shards = {}, []
    for key, tensor in tensors.items():
        local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        partial = any(p.is_partial() for p in getattr(tensor, "placements", ()))
        if local.shape != tensor.shape or partial:
            shards.append(key)
        value = local.detach()
        plain[key] = value.float() if value.is_floating_point() else value
    if shards:
        raise UserError(
            f"{where}: parts of tensors, as one of several processes holds them: "
            f"{first_few(shards)}; {SAVE_WHOLE}"
        )
    not_dense = [
        k for k, t in plain.items() if t.is_meta or t.is_quantized or t.layout != torch.strided
    ]
    if not_dense:
        raise UserError(
            f"{where}: tensors that are sparse, quantised or on meta: {first_few(not_dense)}"
        )
    return plain


def is_dense(state: StateDict) -> bool:
    """Whether a backbone is of a published detector or segmenter, which has no class attention."""
    return PYRAMID in state and not any(key.startswith(CLASS_ATTENTION) for key in state)


def completed(state: StateDict, network: XCiT) -> StateDict:
    """A backbone's tensors; one without class attention gets the network's own."""
    if not is_dense(state):
        return state
    own = network.state_dict()
    return {**state, **{k: v for k, v in own.items() if k.startswith(CLASS_ATTENTION)}}


def architecture_of(state: StateDict, path: str | Path) -> dict[str, Any]:
    """The architecture that shapes tell; `XCiT(**architecture)` fits the state dict."""
    try:
        convolutions = [k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)]
        embed_dim = state["blocks.0.norm1.weight" if is_dense(state) else "cls_token"].shape[-1]
        depth = len({m[1] for k in state if (m := re.match(r"blocks\.(\d+)\.", k))})
        num_heads = state["blocks.0.attn.temperature"].shape[0]
        # shapes do not tell these; other sizes than the published ones have XCiT's defaults
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
            **({"pyramid": True} if PYRAMID in state else {}),
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
    """Load a state dict; an error names the file and lists all that does not fit."""
    check_fit(model, state, path)
    model.load_state_dict(dict(state))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError, with all differences, unless names and shapes are those of the network."""
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key, value in own.items():
        given = state.get(key, value)
        if given.shape != value.shape:
            problems.append(f"{key} is {tuple(given.shape)}, not {tuple(value.shape)}")
        elif value.is_floating_point() and not given.is_floating_point():
            dtype = str(given.dtype).removeprefix("torch.")
            problems.append(f"{key} is {dtype}, not of floating point")
    if problems:
        raise UserError(f"{path} does not fit the network: {first_few(problems)}")
