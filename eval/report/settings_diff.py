"""Compare a run's settings with the defaults: what was typed, what that chose, and what stayed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from ssl_xcit.utils.validation import missing_keys

from .run_reader import Run, message_of

CONF = "ssl_xcit.conf"
HIDDEN = ("main", "run_id", "name", "hydra")  # nobody chooses them, or they are shown elsewhere
ABSENT = "(not there)"
SEVERAL = "(several settings)"
NEEDED = "(has to be named)"  # data.root, which has no default


class Setting(NamedTuple):
    """One key."""

    key: str  # with dots
    value: str  # of the run
    default: str  # of the same command without the run's overrides
    typed: bool  # whether it was named on the command line; else the run has derived it

    @property
    def changed(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


def flat_text(node: Any, prefix: str = "") -> dict[str, str]:
    """Keys with dots; values, lists among them, as text."""
    if not isinstance(node, Mapping):
        return {prefix.rstrip("."): as_text(node)}
    texts: dict[str, str] = {}
    for key, value in node.items():
        if f"{prefix}{key}" not in HIDDEN:
            texts |= flat_text(value, f"{prefix}{key}.")
    return texts


def as_text(value: Any) -> str:
    """A value as yaml has it: null, true, 0.1, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def options_of(run: Run) -> dict[str, str]:
    """The run's options of the config groups."""
    return {group: as_text(option) for group, option in run.choices.items() if "/" not in group}


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Hydra ready to compose; within a command it is."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(CONF, version_base="1.3"):
            yield


def defaults_of(run: Run) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Settings with the run's options but nothing else changed, the default options, and notes on
    options that are not installed.
    """
    known, notes = [], []
    for group, option in run.choices.items():
        if not re.fullmatch(r"\w+", group) or option is None:
            continue  # Hydra's own
        plain = isinstance(option, str) and re.fullmatch(r"\w[\w.-]*", option)
        if plain and (resources.files(CONF) / group / f"{option}.yaml").is_file():
            known.append(f"{group}={option}")
        else:
            notes.append(f"{group}={option} is none of the installed options")
    with hydra_ready():
        plain_hydra = compose(run.command, return_hydra_config=True).hydra
        cfg = compose(run.command, overrides=known)
        for key in missing_keys(OmegaConf.to_container(cfg, resolve=False)):
            OmegaConf.update(cfg, key, NEEDED)
        settings = flat_text(OmegaConf.to_container(cfg, resolve=True))
    options = flat_text(OmegaConf.to_container(plain_hydra.runtime.choices))
    return settings, options, notes


def settings_of_run(run: Run) -> tuple[list[Setting], list[str]]:
    """Every setting, options of groups first, and notes on what could not be compared."""
    # `+a.b=1`, `~a.b` and `a@b=c` are about a.b, a.b and a
    typed = [word.split("=")[0].lstrip("+~").split("@")[0] for word in run.overrides]

    def setting(key: str, value: str, default: str) -> Setting:
        was_typed = any(key == word or key.startswith(f"{word}.") for word in typed)
        return Setting(key, value, default, was_typed)

    used = flat_text(run.config)
    try:
        defaults, options, notes = defaults_of(run)
    except Exception as error:  # Hydra's are many; the run's own settings are shown anyway
        defaults, options = used, {}
        notes = [f"the defaults could not be composed ({message_of(error)})"]
    settings = [setting(g, o, options.get(g, o)) for g, o in sorted(options_of(run).items())]
    if run.config:
        settings += [setting(key, *pair) for key, pair in side_by_side([used, defaults])]
    return settings, notes


def side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Keys and their values in each column; of `a=null` beside `a.b` and `a.c` only `a`."""
    keys: list[str] = []
    for key in sorted({key for column in columns for key in column}):
        if not any(key.startswith(f"{outer}.") for outer in keys):  # outer ones come first
            keys.append(key)

    def value_in(column: Mapping[str, str], key: str) -> str:
        inside = any(other.startswith(f"{key}.") for other in column)
        return column.get(key, SEVERAL if inside else ABSENT)

    return [(key, [value_in(column, key) for column in columns]) for key in keys]


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with their values."""
    rows = side_by_side([options_of(run) for run in runs])
    rows += side_by_side([flat_text(run.config) for run in runs])
    return [(key, values) for key, values in rows if len(set(values)) > 1]
