"""Settings of a run against the defaults: what was typed, what that chose, and what stayed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.cli import missing_keys

from .run import Run, one_line

CONF = "ssl_xcit.conf"
UNTOLD = ("main", "run_id", "name", "hydra")  # no choice of anybody's, or said elsewhere
ABSENT = "(not there)"
SEVERAL = "(several settings)"
NEEDED = "(has to be named)"  # data.root, which has no default


class Setting(NamedTuple):
    """One key.

    Args:
        key: with dots.
        value: as the run used it.
        default: as the same command has it without the run's overrides.
        typed: whether it was named on the command line; else the run has derived it.
    """

    key: str
    value: str
    default: str
    typed: bool

    @property
    def changed(self) -> bool:
        """Another value than the default."""
        return self.value != self.default


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """Keys with dots; values, lists among them, as text."""
    if isinstance(node, Mapping):
        found: dict[str, str] = {}
        for key, value in node.items():
            if f"{prefix}{key}" not in UNTOLD:
                found |= flat(value, f"{prefix}{key}.")
        return found
    return {prefix.rstrip("."): as_text(node)}


def as_text(value: Any) -> str:
    """A value as yaml has it: null, true, 0.1, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@contextmanager
def composing() -> Iterator[None]:
    """Hydra ready to compose; within a command it is."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(CONF, version_base="1.3"):
            yield


def known_choices(run: Run) -> tuple[list[str], list[str]]:
    """Overrides for the run's options of the config groups, and those that are not installed."""
    conf, found, missing = resources.files(CONF), [], []
    for group, option in run.choices.items():
        plain = isinstance(option, str) and re.fullmatch(r"\w[\w.-]*", option)
        if "/" in group or not re.fullmatch(r"\w+", group) or option is None:
            continue  # Hydra's own
        if plain and (conf / group / f"{option}.yaml").is_file():
            found.append(f"{group}={option}")
        else:
            missing.append(f"{group}={option}")
    return found, missing


def defaults_of(run: Run) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Settings with the run's options but nothing else changed; options when none is chosen; and
    what could not be compared.
    """
    choices, missing = known_choices(run)
    notes = [f"{each} is none of the installed options" for each in missing]
    with composing():
        plain = compose("pretrain", return_hydra_config=True)
        usual = OmegaConf.to_container(plain.hydra.runtime.choices)
        made: DictConfig = compose("pretrain", overrides=choices)
        for key in missing_keys(OmegaConf.to_container(made, resolve=False)):
            OmegaConf.update(made, key, NEEDED)
        settings = flat(OmegaConf.to_container(made, resolve=True))
    assert isinstance(usual, dict)
    return settings, {str(k): as_text(v) for k, v in usual.items()}, notes


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """What overrides name: `+a.b=1`, `~a.b` and `a@b=c` are about a.b, a.b and a."""
    return [word.split("=")[0].lstrip("+~").split("@")[0] for word in overrides]


def settings_of_run(run: Run) -> tuple[list[Setting], list[str]]:
    """Every setting, options of groups first; and what could not be compared."""
    typed = typed_keys(run.overrides)

    def was_typed(key: str) -> bool:
        return any(key == word or key.startswith(f"{word}.") for word in typed)

    try:
        defaults, usual, notes = defaults_of(run)
    except Exception as error:  # Hydra's are many; the run's own settings are shown anyway
        defaults, usual = {}, {}
        notes = [f"the defaults could not be composed ({one_line(error)})"]
    used = flat(run.config)
    if not defaults:
        defaults = dict(used)
    groups = {g: as_text(o) for g, o in run.choices.items() if "/" not in g}
    found = [Setting(g, o, usual.get(g, o), was_typed(g)) for g, o in sorted(groups.items())]
    if used:
        rows = beside([used, defaults])
        found += [Setting(key, value, default, was_typed(key)) for key, (value, default) in rows]
    return found, notes


def beside(every: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Keys and their values in each. Where `a=null` stands for `a.b` and `a.c`, `a` alone is
    told.
    """
    keys = {key for one in every for key in one}
    inner = {k for k in keys if any(part in keys for part in above(k))}

    def value_in(one: Mapping[str, str], key: str) -> str:
        if key in one:
            return one[key]
        return SEVERAL if any(each.startswith(f"{key}.") for each in one) else ABSENT

    return [(key, [value_in(one, key) for one in every]) for key in sorted(keys - inner)]


def above(key: str) -> list[str]:
    """`a.b.c` lies in `a` and in `a.b`."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with their values."""
    options = [{g: as_text(o) for g, o in run.choices.items() if "/" not in g} for run in runs]
    rows = beside(options) + beside([flat(run.config) for run in runs])
    return [(key, values) for key, values in rows if len(set(values)) > 1]
