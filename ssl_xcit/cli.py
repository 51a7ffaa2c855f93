"""`ssl-xcit COMMAND [overrides]`: each command is a yaml in `conf/` whose `main` names the function
that gets the config.

Exit codes: 0 done, 1 error, 2 wrong configuration or usage, 75 preempted and resumable, 130
interrupted and saved.
"""

import difflib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ssl_xcit.errors import RunFailed, UserError

CONF = "ssl_xcit.conf"
FLAGS = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
)  # that a rank started by Lightning needs too
SWEEP = ("-m", "--multirun")
TAKES = ("-c", "--cfg", "-p", "--package", "-i", "--info", "-hd", "--hydra-help")  # a word behind
# what Hydra shows instead of running anything
SHOWN = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-v", "--version"}


def commands() -> dict[str, str]:
    """Name and first line of help of every command."""
    found = {}
    for file in sorted(resources.files(CONF).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            text = file.read_text()
            found[file.name.removesuffix(".yaml")] = text.splitlines()[0].lstrip("# ")
    return found


def settings_of(command: str) -> DictConfig:
    """A command's own yaml."""
    settings = OmegaConf.create((resources.files(CONF) / f"{command}.yaml").read_text())
    assert isinstance(settings, DictConfig)
    return settings


def sweeper_of(command: str) -> str | None:
    """What runs a sweep of this command; None: Hydra's own, one after another."""
    return settings_of(command).get("sweeper")


def named(command: str, arguments: Sequence[str]) -> list[str]:
    """A word that stands alone, such as a folder, as the value of the setting that has to be given:
    `ssl-xcit sweep DIR` is `ssl-xcit sweep dir=DIR`.
    """
    words = list(arguments)
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        if "=" in word or word.startswith(("-", "+", "~")) or before in FLAGS or before in TAKES:
            continue
        needed = missing_keys(OmegaConf.to_container(settings_of(command), resolve=False))
        if len(needed) == 1:
            words[place] = f"{needed[0]}={word}"
            break
    return words


def usage() -> str:
    """What `ssl-xcit --help` prints."""
    lines = ["ssl-xcit COMMAND [key=value ...]", ""]
    lines += [f"  {name:<10} {line}" for name, line in commands().items()]
    lines += [
        "",
        "ssl-xcit COMMAND --help       all settings of a command",
        "ssl-xcit COMMAND -m k=a,b     a sweep over values",
        'eval "$(ssl-xcit -sc install=bash)"   tab completion',
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; returns when it is done, raises SystemExit otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-sc" in arguments or "--shell-completion" in arguments:
        command = completed_command()
        if command is None:
            return
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    else:
        command = arguments.pop(0)
    if command not in commands():
        fail(
            f"no command {command!r}{nearest(command, list(commands()))}; there are "
            f"{', '.join(commands())}"
        )

    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"

    program = sys.argv
    flags = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if word.startswith(FLAGS) or before in FLAGS
    ]

    def run(cfg: DictConfig) -> None:
        # Lightning starts the other ranks by running this again, of a sweep only this trial
        sys.argv = [program[0], command, *flags, *HydraConfig.get().overrides.task]
        os.environ["HYDRA_FULL_ERROR"] = "1" if debugging else "0"
        try:
            missing = missing_keys(OmegaConf.to_container(cfg, resolve=False))
            if missing:
                raise UserError(f"{missing[0]} is needed: add {missing[0]}=...")
            function = get_method(cfg.main)
            set_up_logging()  # after the imports, which set up their own
            function(cfg)
        except KeyboardInterrupt:
            fail("interrupted", exit_code=130)
        except Exception as error:
            if debugging:
                raise
            report(command, error)
        os.environ["HYDRA_FULL_ERROR"] = "1"

    arguments = named(command, arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as they are, not printed by Hydra
    sweep = bool(set(SWEEP) & set(arguments))
    sys.argv = [Path(program[0]).name, *(quoted(word, sweep) for word in arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        sweeper = sweeper_of(command) if sweep else None
        if sweeper and not SHOWN & {word.partition("=")[0] for word in arguments}:
            words = [w for w in sys.argv[1:] if w not in (*SWEEP, *flags)]
            function = get_method(sweeper)
            set_up_logging()
            if code := function(CONF, command, words, flags):
                raise SystemExit(code)
            return
        hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name=command)(run)()
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except Exception as error:
        if debugging:
            raise
        report(command, error)
    finally:
        sys.argv = program
        if not debugging:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def quoted(argument: str, sweep: bool) -> str:
    """`key=value` as Hydra's grammar takes it: `~/` expanded, which shells do not do behind an `=`,
    and a value that it cannot read, such as a path with parentheses, in quotes.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not value:
        return argument
    if value.startswith("~"):
        value = os.path.expanduser(value)
    text = value.replace("\\", "\\\\").replace("'", "\\'")
    for attempt in (f"{key}={value}", f"{key}='{text}'"):
        try:
            found = OverridesParser.create().parse_override(attempt)
        except HydraException:
            continue
        # a path may have commas; elsewhere they mean a sweep, and Hydra says that -m is missing
        if sweep or "/" not in value or not found.is_sweep_override():
            return attempt
    return argument


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Settings that are still `???`."""
    if isinstance(node, dict):
        return [k for key, value in node.items() for k in missing_keys(value, f"{prefix}{key}.")]
    return [prefix.rstrip(".")] if node == "???" else []


def set_up_logging() -> None:
    """Warnings on one line each; Lightning's advice is not for users of this command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.captureWarnings(True)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def report(command: str, error: Exception) -> None:
    """One line for what the user can mend (exit 2), a traceback for what we must (exit 1)."""
    cause: BaseException = error
    while cause.__cause__ is not None and type(cause).__module__.startswith(("hydra", "omegaconf")):
        if isinstance(cause, ConfigCompositionException):
            break  # its own words say more than what made it
        cause = cause.__cause__
    if isinstance(cause, HydraException | OmegaConfBaseException):
        fail(explain(command, str(cause)))
    if isinstance(cause, UserError):
        fail(str(cause))
    if isinstance(cause, ValueError) and "Config group override" in str(cause):  # Hydra's, unnamed
        nulls = [word for word in sys.argv if word.endswith("=null") and "." not in word]
        fail(f"{' '.join(nulls)}: a group needs one of its options; ~GROUP leaves it out")
    if isinstance(cause, FloatingPointError | RunFailed):
        fail(str(cause), exit_code=1)
    traceback.print_exception(cause)
    raise SystemExit(1)


def explain(command: str, message: str) -> str:
    """Hydra's message in one line, with the setting that was probably meant."""
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^'@]+)", message):
        key = match[1]
        return (
            f"{key}: no such setting{nearest(key, setting_names(command))}; ssl-xcit "
            f"{command} --help lists all"
        )
    if match := re.search(
        r"(?:find|load) '([^']+)'.*?Available options in '[^']+':(.*?)(?:Config search path|$)",
        message,
        re.S,
    ):
        option = match[1].split("/")
        options = match[2].split()
        group = "/".join(option[:-1])
        meant = nearest(option[-1], options) or f"; there are {', '.join(options)}"
        return f"{group}={option[-1]}: no such option{meant}"
    if match := re.search(r"Could not load '(\w+)/([^']+)'", message):  # one of a list
        group, name = match.groups()
        folder = resources.files(CONF) / group
        options = (
            [f.name.removesuffix(".yaml") for f in folder.iterdir()] if folder.is_dir() else []
        )
        return (
            f"{group}=[{name}]: no such option{nearest(name, options)}; there are "
            f"{', '.join(sorted(options))}"
        )
    if match := re.search(r"Key '[^']+' is not in struct\s+full_key: (\S+)", message):
        key = match[1]
        taken = f"; ~{key} has taken it out" if f"~{key}" in sys.argv else ""
        return f"{key}: this setting is needed{taken}; ssl-xcit {command} --help lists all"
    return " ".join(message.split())


def setting_names(command: str) -> list[str]:
    """Every key of the command's default configuration, and its config groups."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module(CONF, version_base="1.3"):
        cfg = compose(command)
    names: list[str] = [f.name for f in resources.files(CONF).iterdir() if f.is_dir()]

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                names.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg), "")
    return names


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    close = close or [w for w in words if w.endswith(f".{word}")][:1]
    return f"; did you mean {close[0]}?" if close else ""


def fail(message: str, exit_code: int = 2) -> None:
    """One line, then exit."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"ssl-xcit: {message}"
    )
    raise SystemExit(exit_code)


def completed_command() -> str | None:
    """The command in the line that a shell completes; without one, print the commands."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        typed = words[1] if len(words) == 2 else ""
        if line:
            print(" ".join(name for name in commands() if name.startswith(typed)))
            return None
        return "pretrain"
    os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    return words[1]
