"""Load weights from files: ours, the published XCiT and DINO files, timm's, safetensors, those of
people's own scripts; by path or by name (`published.py`).

A backbone is located by the name of its first block's temperature, in any dictionary of the file
and behind any prefix. Files are read with `weights_only=True`, so a hostile one runs no code; a
backbone is loaded strictly: an error lists whatever does not match.
"""

import json
import logging
import os
import re
import shlex
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_manifest import verify
from ssl_xcit.models.foreign import SAVE_WHOLE, Foreign, read_pickled
from ssl_xcit.models.published import TIMM, TIMM_FILE, fetch_released, is_address, results_folder
from ssl_xcit.models.timm_keys import from_timm_names
from ssl_xcit.models.xcit import SIZES, XCiT
from ssl_xcit.utils.validation import allows, hints_of

log = logging.getLogger(__name__)
StateDict = dict[str, Tensor]
Which = Literal["teacher", "student"]
HEADER = "ssl_xcit"  # metadata key of a safetensors file: architecture and preprocess, as JSON
HEAD_KEYS = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
HEAD_KEYS |= {"last_layer.weight_v"}
GAINS = "last_layer.weight_g"  # may be missing, for where they are frozen all are 1
# the part of an architecture that shapes tell
MEASURED = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "num_classes")
# DDP, torch.compile, FSDP, activation checkpointing and Fabric wrap a network or parts of it, so
# these words stand anywhere in a name
WRAPPERS = (
    r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|"
    r"_forward_module)\.)"
)
WRAPPED = re.compile(rf"(?<![^.]){WRAPPERS}+")
TEMPERATURE = "blocks.0.attn.temperature"  # no other network's weights have one
OF_XCIT = re.compile(rf"((?:.*\.)?)blocks\.{WRAPPERS}*0\.{WRAPPERS}*attn\.{WRAPPERS}*temperature")
STEM = "patch_embed.proj.0.0.weight"
CLASS_ATTENTION = ("cls_token", "cls_attn_blocks.", "norm.")
PYRAMID = "fpn1.0.weight"  # at patches of 8 and 16; the layers of patch 4 have no weights
ROLES: dict[Which, re.Pattern[str]] = {  # by words in the names that lead to the weights
    "teacher": re.compile(
        r"(?<![a-z])(?:teacher|ema|swa|avg|averaged?|shadow|momentum|target|k)(?![a-z])"
    ),
    "student": re.compile(r"(?<![a-z])(?:student|online|current|q)(?![a-z])"),
}
LARGEST = 65_536  # number in a recorded architecture, which comes from outside
NO_WEIGHTS = re.compile(r"optim|exp_avg|grad")  # dictionaries in which names of weights may stand


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


def head_state(location: "Location") -> StateDict | None:
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


def checkpoint_path(path: str | Path) -> Path:
    """The file that `ckpt=` names: the file itself; a run folder's newest checkpoint (the highest
    step in its name); an exported folder's `model.safetensors`; or, downloaded once, a released
    file by name or address (`published.fetch_released`).

    Raises:
        MissingPath: there is none.
        UserError: it cannot be downloaded, or may not be read.
    """
    try:
        return resolve(path)
    except PermissionError as error:
        raise UserError(f"ckpt={path}: {error.filename}: {error.strerror}") from error


def resolve(path: str | Path) -> Path:
    """See `checkpoint_path`."""
    word, path = str(path), Path(path)
    check_unsharded(path)
    try:
        os.stat(path / "checkpoints")
    except PermissionError:  # `is_file` and `is_dir` say no more since Python 3.14
        raise
    except OSError:
        pass
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            os.listdir(path / "checkpoints")  # raises where it may not be read
        if checkpoints := checkpoints_of(path):
            return checkpoints[-1]
        if (path / TIMM_FILE).is_file():
            return path / TIMM_FILE
        raise MissingPath(
            f"ckpt={path}: a folder without checkpoints/step-*.ckpt or {TIMM_FILE}; name a file"
        )
    by_network = is_address(word) or word.startswith(TIMM) or "#sha256=" in word
    if not by_network and (path.suffix or "/" in word):  # a path, and not a name
        raise MissingPath(f"ckpt={path}: no such file or run folder")
    return fetch_released(word, sys.stdout.isatty())


def folder_of(path: Path) -> Path:
    """The run folder of weights, or the folder that a lone file lies in; of downloaded weights one
    here, by their name.
    """
    if (downloaded := results_folder(path)) is not None:
        return downloaded
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def check_unsharded(path: Path) -> None:
    """Raise UserError, with the command that makes one file, for a sharded checkpoint."""
    folder = path.parent if path.suffix == ".distcp" or path.name == ".metadata" else path
    file = shlex.quote(f"{folder.absolute().name}.pth")
    if (folder / ".metadata").is_file():
        raise UserError(
            f"ckpt={path}: a sharded checkpoint of torch.distributed.checkpoint; make one file of "
            "it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{shlex.quote(str(folder))} {file}"
        )
    if (folder / "zero_to_fp32.py").is_file():
        raise UserError(
            f"ckpt={path}: a sharded checkpoint of DeepSpeed; make whole files of it: "
            f"python {shlex.quote(str(folder / 'zero_to_fp32.py'))} {shlex.quote(str(folder))} out"
        )


def checkpoints_of(run_dir: Path) -> list[Path]:
    """`RUN/checkpoints/step-000100.ckpt` and the like, by step, the newest last."""
    files = (run_dir / "checkpoints").glob("step-*.ckpt")
    numbered = [(int(m[1]), f) for f in files if (m := re.fullmatch(r"step-(\d+)\.ckpt", f.name))]
    return [file for _, file in sorted(numbered)]


def read_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with an error of the disk as one for the user."""
    try:
        return read_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dictionary, on the CPU; tensors and plain containers only.

    Raises:
        UserError: it cannot be read, or differs from its entry in the manifest beside it.
        OSError: the disk cannot be read.
    """
    path.open("rb").close()  # an error of the disk is not one of the content
    verify(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = read_pickled(path)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        if "torchscript" in str(error).lower():
            raise UserError(
                f"{path} is a TorchScript program: torch.save(torch.jit.load({path.name!r})"
                ".state_dict(), 'weights.pth') takes the weights out of it"
            ) from error
        # only the telling line of torch's message
        line = re.search(r"[^\n:]*(Unsupported global|Can only|Trying to).*", str(error))
        if line or zipfile.is_zipfile(path):
            reason = (line[0] if line else str(error)).strip().partition("\n")[0]
            reason = reason.partition(". ")[0]
        else:
            reason = "truncated or not a PyTorch file"
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again, or save weights alone, torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under `model`, and the metadata that `ssl-xcit export` writes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library is written in Rust and raises its own types
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again"
        ) from error
    return {**(metadata if isinstance(metadata, dict) else {}), "model": tensors}


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


class Location(NamedTuple):
    """Where in a file an XCiT lies."""

    names: tuple[str, ...]  # keys that lead to its dictionary
    prefix: str  # of its tensors in there, wrappers included
    tensors: Mapping[Any, Any]  # all entries of the dictionary
    deeper: tuple[str, ...] = ()  # prefixes of other XCiTs that begin with this one

    def __str__(self) -> str:
        prefix = self.prefix + "*" * self.prefix.endswith(".")
        return " in ".join(word for word in (prefix, ".".join(self.names)) if word)

    @property
    def words(self) -> list[str]:
        """All names that lead to it, without wrappers of networks."""
        return [*self.names, *WRAPPED.sub("", self.prefix).split(".")]

    @property
    def role(self) -> Which | None:
        """By the innermost name that tells; averaged weights are the teacher's."""
        for word in reversed(self.words):
            for role, words in ROLES.items():
                if words.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()):
                    return role
        return None

    @property
    def head_prefix(self) -> str | None:
        """The prefix of a projection head, which DINO has beside `backbone.`."""
        prefix = WRAPPED.sub("", self.prefix)
        beside = re.fullmatch(r"((?:.*\.)?)backbone\.", prefix)
        return f"{beside[1]}head." if beside else None

    def owns(self, key: Any) -> bool:
        """Whether a key is the backbone's; one of a head of several layers is not."""
        if not self.prefix and not isinstance(key, str):
            return True
        if not str(key).startswith(self.prefix) or str(key).startswith(self.deeper or ("\0",)):
            return False
        inside = WRAPPED.sub("", str(key).removeprefix(self.prefix))
        return not inside.startswith("head.") or inside in ("head.weight", "head.bias")


def unwrapped(tensors: Mapping[Any, Any]) -> dict[str, Any]:
    """Entries by their names without wrappers of networks and of their parts."""
    return {WRAPPED.sub("", str(key)): value for key, value in tensors.items()}


def dictionaries_in(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Yield all dictionaries of a file except those of optimizers, the outermost first, with the
    keys that lead to them; a network that was pickled as a whole gives its state dict.
    """
    queue: list[tuple[tuple[str, ...], Mapping]] = [((), content)]
    visited = set()  # in a hostile file they hold each other
    for names, dictionary in queue:
        if id(dictionary) in visited:
            continue
        visited.add(id(dictionary))
        if "_modules" in dictionary:
            dictionary = pickled_state(dictionary)
        yield names, dictionary
        queue += [
            ((*names, str(key)), value)
            for key, value in dictionary.items()
            if isinstance(value, Mapping) and not NO_WEIGHTS.search(str(key).lower())
        ]


def pickled_state(module: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The state dict of a network that was pickled as a whole."""
    not_saved = module.get("_non_persistent_buffers_set") or ()
    state = {
        f"{prefix}{name}": value
        for kind in ("_parameters", "_buffers")
        for name, value in dict(module.get(kind) or {}).items()
        if value is not None and name not in not_saved
    }
    for name, child in dict(module.get("_modules") or {}).items():
        if isinstance(child, Mapping) and prefix.count(".") < 20:  # a hostile one holds itself
            state |= pickled_state(child, f"{prefix}{name}.")
    return state


def locate_all(content: Mapping[str, Any]) -> list[Location]:
    """The location of every XCiT in a file."""
    locations = []
    for names, tensors in dictionaries_in(content):
        prefixes = [
            match[1]
            for key, value in tensors.items()
            if isinstance(key, str)
            and (match := OF_XCIT.fullmatch(key))
            and (not isinstance(value, Mapping) or isinstance(value, Foreign))  # an optimizer's
        ]
        for prefix in prefixes:
            deeper = [p for p in prefixes if p != prefix and p.startswith(prefix)]
            locations.append(Location(names, prefix, tensors, tuple(deeper)))
    return locations


def locate(content: Mapping[str, Any], which: Which, path: Path) -> Location:
    """The location of the XCiT to load: by role where a file tells roles apart, else the only one.

    Raises:
        UserError: there is none, or several that could be meant (lists the prefixes).
    """
    locations = locate_all(content)
    if not locations:
        for key in ("state_dict", which, "model"):
            if key in content and not isinstance(content[key], Mapping):
                kind = type(content[key]).__name__
                raise UserError(f"{path}: {key} in it is a {kind}, not a dictionary of weights")
        prefixes = first_few(prefixes_in(content)) or "no tensors by name"
        raise UserError(
            f"{path} is not an XCiT checkpoint: no {TEMPERATURE} behind any prefix; it holds "
            f"{prefixes}"
        )
    fitting = [p for p in locations if p.role == which] or [p for p in locations if p.role is None]
    if not fitting:
        other = "student" if which == "teacher" else "teacher"
        raise UserError(
            f"{path} holds no {which}: {first_few(list(map(str, locations)))}; set which={other}"
        )
    if len(fitting) > 1:  # parts of another network may be XCiT's blocks
        fitting = [p for p in fitting if STEM in entries_of(p)] or fitting
    first = entries_of(fitting[0])
    if not all(same_tensors(first, entries_of(location)) for location in fitting[1:]):
        raise UserError(
            f"{path} holds {len(fitting)} XCiTs that could be the {which}: "
            f"{first_few(list(map(str, fitting)))}; save the one you need in a file of its own"
        )
    return fitting[0]


def prefixes_in(content: Mapping[str, Any]) -> list[str]:
    """Prefixes of all tensors in a file, as `module.layer1.* in state_dict`."""
    prefixes: dict[str, None] = {}
    for names, tensors in dictionaries_in(content):
        keys = [str(key) for key, value in tensors.items() if isinstance(value, Tensor)]
        prefixes |= dict.fromkeys(str(Location(names, p, {})) for p in common_prefixes(keys))
    return list(prefixes)


def common_prefixes(keys: Sequence[str], beside: str | None = None) -> list[str]:
    """Prefixes of keys: one word more than each shares with `beside`, or with the others."""
    if not keys:
        return []
    split = [key.split(".") for key in keys]
    others = [min(split), max(split)] if beside is None else [beside.split(".")]  # the extremes
    prefixes = []
    for words in split:
        shared = 0
        while all(
            shared < min(len(words), len(o)) - 1 and o[shared] == words[shared] for o in others
        ):
            shared += 1
        prefixes.append(".".join(words[: shared + 1]) + "." * (shared + 1 < len(words)))
    return list(dict.fromkeys(prefixes))


def entries_of(location: Location) -> dict[str, Any]:
    """All entries of a backbone, without its prefix."""
    entries = {key: value for key, value in location.tensors.items() if location.owns(key)}
    return unwrapped({str(key).removeprefix(location.prefix): v for key, v in entries.items()})


def same_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts are of the same network, which a file may hold under two names."""
    return one.keys() == other.keys() and all(
        isinstance(v, Tensor) and isinstance(other[k], Tensor) and torch.equal(v, other[k])
        for k, v in one.items()
    )


def is_ours(location: Location, which: Which) -> bool:
    """Whether the backbone lies where `ssl-xcit pretrain` or `ssl-xcit finetune` puts it."""
    prefix = WRAPPED.sub("", location.prefix)
    return location.names == ("state_dict",) and prefix in (f"{which}.backbone.", "task.backbone.")


def log_ignored(location: Location, content: Mapping[str, Any], which: Which, path: Path) -> None:
    """Warn of everything in a file of others that is not loaded: other XCiTs, other modules."""
    if is_ours(location, which):
        return
    locations = locate_all(content)
    others = [str(p) for p in locations if p.role != location.role and which not in location.words]
    heads = tuple(p.head_prefix for p in locations if p.head_prefix)
    keys = [
        key
        for key, value in location.tensors.items()
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and not WRAPPED.sub("", key).startswith(heads)
        and not any(p.owns(key) for p in locations if p.names == location.names)
    ]
    modules = [p + "*" * p.endswith(".") for p in common_prefixes(keys, location.prefix)]
    if others or modules:
        log.warning(
            "%s%s: the backbone is %s; not loaded: %s", path, f", which={which}" if others else "",
            str(location) or "bare", first_few(others + modules),
        )  # fmt: skip


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


def first_few(words: Sequence[str]) -> str:
    """The first five words, and the number of the others."""
    more = f" and {len(words) - 5:,} more" if len(words) > 5 else ""
    return "; ".join(words[:5]) + more
