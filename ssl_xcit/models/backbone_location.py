"""Where in a file's dictionaries a backbone lies: it is known by the name of its first block's
temperature, behind any prefix.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.models.foreign import Foreign
from ssl_xcit.utils.words import first_few

log = logging.getLogger(__name__)
Which = Literal["teacher", "student"]
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
ROLES: dict[Which, re.Pattern[str]] = {  # by words in the names that lead to the weights
    "teacher": re.compile(
        r"(?<![a-z])(?:teacher|ema|swa|avg|averaged?|shadow|momentum|target|k)(?![a-z])"
    ),
    "student": re.compile(r"(?<![a-z])(?:student|online|current|q)(?![a-z])"),
}
NO_WEIGHTS = re.compile(r"optim|exp_avg|grad")  # dictionaries in which names of weights may stand


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
