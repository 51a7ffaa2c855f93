"""Check settings against signatures, before anything starts.

What a `_target_` names, and one dataclass a command, say in their annotations what is allowed:
`Annotated[int, Ge(1)]`, `Literal["teacher", "student"]`, `float | None`. There is no second table.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.errors import UserError

FREE = "free"  # may differ between the parts of one run: where things are and how they are shown
PLACE = "place"  # where images lie and how a list is read; which images these are makes the run
REST = "rest"  # takes the keys that no other field of its class has
LINKED = "linked"  # beside REST: only those that others refer to, or whose name a node has

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
DropRate = Annotated[float, Ge(0), Lt(1)]
Workers = Annotated[int, Ge(0)] | None
Network = Literal["teacher", "student"]
BatchNormScope = Literal["global", "node", "local"]
Node = Mapping[str, Any]  # what hydra.utils.instantiate takes
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Words:
    """Beside a type: what is allowed, where its own words would be hard to read."""

    words: str


Text = Annotated[str | int | float, Words("text")]  # a path or name may look like a number


def parse(cls: type[T], cfg: DictConfig) -> T:
    """Settings as an instance of a dataclass; every `_target_` of ours in them is checked as well.

    Raises:
        UserError: the first value that is not; names key, value and what is allowed.
    """
    checker = Checker(links_in(cfg), references_in(cfg))
    parsed: T = checker.value(cls, OmegaConf.to_container(cfg, resolve=True), "")
    return parsed


def links_in(cfg: DictConfig) -> dict[str, str]:
    """Keys that take the value of another one, by that one."""
    raw = flat(OmegaConf.to_container(cfg, resolve=False))
    matches = {key: re.fullmatch(r"\$\{([a-z][\w.]*)\}", str(value)) for key, value in raw}
    return {key: match[1] for key, match in matches.items() if match}


def references_in(cfg: DictConfig) -> set[str]:
    """Keys that some value refers to, and all that these lie in: a.b of `${a.b.c}`."""
    keys = set()
    for _, value in flat(OmegaConf.to_container(cfg, resolve=False)):
        for path in re.findall(r"\$\{(?:oc\.select:)?([\w.]+)", str(value)):
            parts = path.strip(".").split(".")
            keys |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return keys


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all leaves."""
    if isinstance(node, Mapping | list):
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in items:
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), node


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Settings that are still `???`."""
    if isinstance(node, dict):
        return [k for key, value in node.items() for k in missing_keys(value, f"{prefix}{key}.")]
    return [prefix.rstrip(".")] if node == "???" else []


def as_plain(settings: Any) -> Any:
    """Dictionaries and lists again, as they were parsed from, without what has its default."""
    if dataclasses.is_dataclass(settings):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(settings):
            value = as_plain(getattr(settings, field.name))
            if value is None and field.default is None:
                continue
            if value == {} and field.default_factory is dict:
                continue
            plain |= (
                value if REST in marks_of(settings.__class__, field.name) else {field.name: value}
            )
        return plain
    if isinstance(settings, Mapping):
        return {key: as_plain(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [as_plain(value) for value in settings]
    return settings


@dataclasses.dataclass(frozen=True)
class Checker:
    """Check values by annotations."""

    links: Mapping[str, str]  # keys whose value is another's, by that one: a person typed the other
    references: Set[str] = frozenset()  # keys that some value refers to, and all that these lie in

    def value(self, hint: Any, value: Any, key: str) -> Any:
        """The value, with mappings made into the dataclasses that the annotation names."""
        base: Any = unannotated(hint)
        if base is Any:
            return self.anything(value, key)
        kinds = [unannotated(k) for k in get_args(base)] if is_union(base) else [base]
        if isinstance(value, Mapping):
            name = str(value.get("_target_")).rpartition(".")[2]  # `instantiate` makes this one
            for kind in kinds:
                if dataclasses.is_dataclass(kind) and getattr(kind, "__name__", "") != name:
                    return self.instance(kind, value, key)
            if "_target_" in value:
                return self.target(value, key)
            for kind in kinds:
                if get_origin(kind) in (Mapping, dict):
                    inner = get_args(kind)[1]
                    return {k: self.value(inner, v, subkey(key, k)) for k, v in value.items()}
        if isinstance(value, list) and any(
            isinstance(v, Mapping) and "_target_" in v for v in value
        ):
            return self.anything(value, key)
        is_group = any(dataclasses.is_dataclass(kind) for kind in kinds)
        if not (value is None and NoneType in kinds if is_group else allows(hint, value)):
            key = self.links.get(key, key)
            raise UserError(f"{key}={as_typed(value)} must be {described(hint)}")
        return value

    def anything(self, value: Any, key: str) -> Any:
        """Any value; what it holds of ours is checked."""
        if isinstance(value, Mapping):
            if "_target_" in value:
                return self.target(value, key)
            return {k: self.anything(v, subkey(key, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self.anything(v, subkey(key, i)) for i, v in enumerate(value)]
        return value

    def instance(self, cls: Any, values: Mapping[str, Any], key: str) -> Any:
        """An instance of a dataclass, from the values of its group."""
        hints = get_type_hints(cls, include_extras=True)
        rest = next((name for name in hints if REST in marks_of(cls, name)), None)
        unknown = {k: v for k, v in values.items() if k not in hints}
        if rest is not None and LINKED in marks_of(cls, rest):
            nodes = [v for v in values.values() if isinstance(v, Mapping) and key]
            known = {*self.references, *(subkey(key, k) for node in nodes for k in node)}
            refused = [k for k in unknown if subkey(key, k) not in known]
        else:
            refused = list(unknown) if rest is None else []
        if refused:
            names = [*(k for k in hints if k != rest), *(k for k in unknown if k not in refused)]
            raise UserError(no_such_setting(subkey(key, refused[0]), names, key))
        made = {
            name: self.value(hints[name], value, subkey(key, name))
            for name, value in values.items()
            if name in hints
        }
        if rest is not None:
            made[rest] = {k: self.anything(v, subkey(key, k)) for k, v in unknown.items()}
        for field in dataclasses.fields(cls):
            if field.name not in made and field.default is field.default_factory:
                name = subkey(key, field.name)
                raise UserError(f"{name} is needed: add {name}=...")
        return cls(**made)

    def target(self, node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """A node for `instantiate`: its values against the signature of what it names."""
        path = node["_target_"]
        if not isinstance(path, str) or "." not in path:
            name = subkey(key, "_target_")
            raise UserError(
                f"{name}={as_typed(path)} must be the dotted path of a function or class"
            )
        given = {k: v for k, v in node.items() if k[:1] != "_"}
        hints = hints_of(path) if given and path.startswith("ssl_xcit.") else None
        for name, value in given.items():
            if hints is None:
                self.anything(value, subkey(key, name))
            elif name in hints:
                self.value(hints[name], value, subkey(key, name))
            elif "**" not in hints:
                raise UserError(no_such_setting(subkey(key, name), list(hints), key))
        return node


def subkey(key: str, name: Any) -> str:
    """`key.name`, or `name` alone at the top."""
    return f"{key}.{name}" if key else str(name)


def no_such_setting(name: str, names: Sequence[str], key: str) -> str:
    """What to say of a key that nothing takes."""
    there = [subkey(key, n) for n in names]
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
    if close:
        return f"{name}: no such setting; did you mean {close[0]}?"
    few = len(there) <= 12
    return f"{name}: no such setting" + (f"; there are {', '.join(there)}" if few else "")


@lru_cache
def hints_of(path: str) -> dict[str, Any]:
    """Annotations of the parameters of a function or class, by its dotted path.

    Raises:
        UserError: it cannot be imported.
    """
    target = located(path)
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"_target_={path} is no function or class") from error
    try:
        function = target.__init__ if inspect.isclass(target) else target
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that are for a type checker only
        hints = {}
    return {
        "**" if p.kind is p.VAR_KEYWORD else p.name: as_written(hints.get(p.name, Any), p.default)
        for p in parameters
    }


def as_written(hint: Any, default: Any) -> Any:
    """A parameter's type without the `| None` that Python 3.10 adds where None is the default."""
    inner = get_args(hint)[0] if is_union(hint) else None
    added = default is None and get_origin(inner) is Annotated and allows(inner, None)
    return inner if added else hint


def located(path: str) -> Any:
    """What a dotted path names: `package.module.Class.method`.

    Raises:
        UserError: nothing that can be imported.
    """
    module, attributes = path, list[str]()
    while True:
        try:
            target = import_module(module)
            for name in reversed(attributes):
                target = getattr(target, name)
            return target
        except (ImportError, AttributeError, ValueError) as error:
            module, dot, name = module.rpartition(".")
            attributes.append(name)
            if not dot:
                raise UserError(f"_target_={path} cannot be imported: {error}") from error


def can_be_imported(path: str) -> bool:
    """Whether a dotted path names a function or class that is there."""
    try:
        hints_of(path)
    except UserError:
        return False
    return True


@lru_cache
def marks_of(cls: Any, name: str) -> tuple[Any, ...]:
    """Words beside the type of a field: FREE, PLACE, REST."""
    return marks(get_type_hints(cls, include_extras=True)[name])


def marks(hint: Any) -> tuple[Any, ...]:
    """Words beside a type, also where it is optional."""
    if get_origin(hint) is Annotated:
        return tuple(m for m in hint.__metadata__ if isinstance(m, str))
    return ()


def marked_parameters(path: str, mark: str) -> list[str]:
    """Parameters of a function or class, by its dotted path, that have this mark."""
    return [name for name, hint in hints_of(path).items() if mark in marks(hint)]


def marked(cls: type, mark: str, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields of a dataclass, and of those within, that have this mark."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if mark in marks(hint):
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(unannotated(hint)):
            yield from marked(unannotated(hint), mark, f"{prefix}{name}.")


def is_union(hint: Any) -> bool:
    """Whether a type is `A | B`."""
    return get_origin(hint) in (Union, UnionType)


def unannotated(hint: Any) -> Any:
    """The type of `Annotated[type, ...]`."""
    return hint.__origin__ if get_origin(hint) is Annotated else hint


def allows(hint: Any, value: Any) -> bool:
    """Whether a value fits; true for types that tell nothing about plain values."""
    adapter = adapter_of(hint)
    if adapter is None:
        return True
    from pydantic import ValidationError

    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


@lru_cache
def adapter_of(hint: Any) -> Any:
    """pydantic's check of a type; None: it has none."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(hint, config=config)
    except (PydanticUserError, TypeError):
        return None


def as_typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list | tuple):
        return f"[{','.join(as_typed(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{as_typed(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def described(hint: Any, several: bool = False) -> str:
    """What a type allows, in words; of `several` in the plural."""
    base, bounds = unannotated(hint), ""
    for bound in getattr(hint, "__metadata__", ()):
        for kind, word in ((Gt, "above"), (Ge, "of at least"), (Lt, "below"), (Le, "of at most")):
            if isinstance(bound, kind):
                limit = next(iter(dataclasses.astuple(bound)))
                bounds += f"{' and' if bounds else ''} {word} {limit:g}"
        if isinstance(bound, Words):
            return bound.words
    if is_union(base):
        kinds = sorted(get_args(base), key=lambda kind: kind is NoneType)
        return " or ".join(dict.fromkeys(described(kind, several) for kind in kinds))
    if get_origin(base) is Literal:
        *most, last = [as_typed(value) for value in get_args(base)]
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(base) is tuple and Ellipsis not in get_args(base):
        return f"a list of {len(get_args(base))} {described(get_args(base)[0], True)}"
    if get_origin(base) in (list, tuple, Sequence):
        return f"a list of {described(get_args(base)[0], True)}"
    words = {
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("text", "texts"),
        bool: ("true or false", "true or false"),
        NoneType: ("null", "null"),
    }
    names = words.get(base, ("a group of settings", "groups of settings"))
    return names[several] + bounds
