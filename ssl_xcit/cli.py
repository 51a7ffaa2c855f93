"""`ssl-xcit COMMAND [overrides]`: each command is a yaml in `conf/` whose `main` names the function
that gets its settings, checked by `utils/validation.py`.

Exit codes: 0 done, 1 error, 2 wrong configuration or usage, 75 preempted and resumable, 130
interrupted and saved.
"""

import argparse
import copy
import difflib
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.training.run_name import SMALL_MODEL, key_of
from ssl_xcit.utils.hardware import start_clock
from ssl_xcit.utils.imports import lean_import
from ssl_xcit.utils.terminal import OneLine, printable, say
from ssl_xcit.utils.validation import missing_keys, parse

CONF = "ssl_xcit.conf"
FLAGS = ("--config-dir", "-cd", "--config-name", "-cn")  # a rank started by Lightning needs them
SWEEP = ("-m", "--multirun")
TAKES = ("-c", "--cfg", "-p", "--package", "-i", "--info", "-hd", "--hydra-help")  # a word behind
OTHERS = (
    "-h", "--help", "--version", "--resolve", "-r", "--run", "-sc", "--shell-completion", "-cp",
    "--config-path", "--experimental-rerun",
)  # fmt: skip
FORMATS = {".npy": "arrays", ".npz": "arrays", ".txt": "list", ".csv": "list", ".tsv": "list",
           ".parquet": "list"}  # of data.file  # fmt: skip
# what Hydra shows instead of running anything
SHOWN = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-v", "--version"}
KNOWN = {*FLAGS, *SWEEP, *TAKES, *OTHERS}
OWN_DATA = {"data.root", "data.file"}  # one's own images


def commands() -> dict[str, str]:
    """Name and first line of help of every command."""
    help_lines = {}
    for file in sorted(resources.files(CONF).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            text = file.read_text()
            help_lines[file.name.removesuffix(".yaml")] = text.splitlines()[0].lstrip("# ")
    return help_lines


def settings_of(command: str) -> DictConfig:
    """A command's own yaml."""
    settings = OmegaConf.create((resources.files(CONF) / f"{command}.yaml").read_text())
    assert isinstance(settings, DictConfig)
    return settings


def named(command: str, arguments: Sequence[str]) -> list[str]:
    """A word that stands alone as the value of a setting: an existing folder or list of images as
    `data.root` or `data.file`, anything else as the one setting that has to be given, such as
    `ssl-xcit sweep DIR` for `ssl-xcit sweep dir=DIR`.

    Raises:
        UserError: it can be none of these.
    """
    words = list(arguments)
    given = {key_of(word) for word in words if "=" in word}
    needed = missing_keys(OmegaConf.to_container(settings_of(command), resolve=False))
    needed = [key for key in needed if key not in given]
    takes_data = default_options(command).keys() & {"data", "transfer"} and not given & OWN_DATA
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        if before in FLAGS or before in TAKES or word.partition("=")[0] in KNOWN:
            continue
        if word.startswith("-"):
            raise UserError(with_dashes(command, word, words[place + 1 :]))
        if "=" in word or word.startswith(("+", "~")):
            continue
        path = Path(word).expanduser()
        is_root = path.is_dir() or "://" in word
        if takes_data and (is_root or path.suffix.lower() in FORMATS):
            words[place] = f"data.{'root' if is_root else 'file'}={word}"
            takes_data = False
        elif len(needed) == 1:
            words[place] = f"{needed.pop()}={word}"
        else:
            raise UserError(without_key(command, word, words[place + 1 :]))
    return words


def with_dashes(command: str, word: str, behind: Sequence[str]) -> str:
    """What to type instead of `--batch-size 8`."""
    name, equals, value = word.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        value = behind[0] if behind and not behind[0].startswith("-") else "VALUE"
    names = setting_names(command)
    if name == "data":
        name = "data.root"
    elif name not in names:
        name = suggestion(name, names).removeprefix("; did you mean ").rstrip("?") or name
    return f"{word}: settings are typed without dashes, as {name}={value}"


def without_key(command: str, word: str, behind: Sequence[str]) -> str:
    """What to type instead of a word that is no setting."""
    name = word.rstrip(":")
    if name in ("help", "?"):
        return f"{word}: type ssl-xcit {command} --help"
    if name in setting_names(command):
        value = next((w.lstrip("=") for w in behind if w.strip("=")), "VALUE")
        return f"{name}: a setting and its value are one word, {name}={value}"
    missing = "" if os.path.exists(word) else "there is no file or folder of this name, and "
    text = (resources.files(CONF) / f"{command}.yaml").read_text()
    example = re.search(r"(?m)^# +(ssl-xcit \S+ (?:\S+ )*?\S+=\S+(?: \S+)*)", text)
    such = f", such as {example[1]}" if example else ""
    return f"{word}: {missing}settings are typed as key=value{such}"


def default_options(command: str) -> dict[str, str]:
    """The option of each config group that a command has by itself."""
    content: Any = OmegaConf.to_container(settings_of(command), resolve=False)
    groups = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {group: str(option) for entry in groups for group, option in entry.items()}


def with_data(command: str, words: Sequence[str]) -> list[str]:
    """`data.root=DIR` alone means a folder of images, or a URL tar shards, `data.file=FILE` alone a
    list or an array, and likewise of `eval_data`: where the option that is chosen otherwise has no
    such setting, the one that has it is put before it. `with_recipe` does the rest.

    Raises:
        UserError: `data=DIR`, where a folder is named and not an option.
    """
    meaning = list(words)
    options = default_options(command)
    given = {key_of(word): word.partition("=")[2] for word in words if "=" in word}
    if any(word.startswith(FLAGS) for word in words):  # whose options are not known here
        chosen = options | {"data": given.get("data", options.get("data", ""))}
        elsewhere = bool(given.keys() & {"data.root", "data.file"})
        return meaning if elsewhere or "experiment" not in options else with_recipe(meaning, chosen)
    if "experiment" in given and "data" in options:
        for name in given["experiment"].strip("[]").split(","):
            options["data"] = data_of_experiment(name.strip()) or options["data"]
    for group in ("data", "eval_data"):
        if group not in options:
            continue
        if group in given:
            options[group] = given[group]
            check_option(group, given[group])
            continue
        if options[group] == "${data}":
            options[group] = options["data"]
        key = next((f"{group}.{k}" for k in ("file", "root") if f"{group}.{k}" in given), None)
        if key is None:
            continue
        url = "://" in given[key]
        if has_setting(options[group], key) and not (url and options[group] == "folder"):
            continue
        file = Path(given[key].strip("'\"[]\r "))
        options[group] = (
            FORMATS.get(file.suffix.lower(), "list") if key.endswith("file")
            else "shards" if url else "folder"
        )  # fmt: skip
        place = next(i for i, word in enumerate(meaning) if key_of(word) == key)
        meaning.insert(place, f"{group}={options[group]}")
    if "transfer" in options:
        return with_builtin_task(meaning, given.get("transfer", options["transfer"]))
    return with_recipe(meaning, options) if "experiment" in options else meaning


def with_builtin_task(words: Sequence[str], transfer: str) -> list[str]:
    """`experiment=builtin_TASK` where neither images of one's own nor a recipe are named, with a
    small model where neither weights nor a model are.
    """
    given = {key_of(word) for word in words}
    if given & {*OWN_DATA, "experiment", "data.source"}:
        return list(words)
    place = max((i for i, word in enumerate(words, start=1) if "=" in word), default=len(words))
    recipe = [f"experiment=builtin_{transfer}"]
    recipe += [] if given & {"ckpt", "model"} else [f"model={SMALL_MODEL}"]
    return [*words[:place], *recipe, *words[place:]]


def with_recipe(words: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """`experiment=photos` where the data are the built-in photographs and no recipe is typed, and
    before one that is; `experiment=none` and `~experiment` keep it out.
    """
    given = {key_of(word): word for word in words if "=" in word}
    plain = options["data"].strip("'\"") == "photos" and "~experiment" not in words
    if not plain or any(word.startswith(("--config-name", "-cn")) for word in words):
        return list(words)
    if "experiment" not in given:
        place = max((i for i, word in enumerate(words, start=1) if "=" in word), default=len(words))
        return [*words[:place], "experiment=photos", *words[place:]]
    name = given["experiment"].partition("=")[2]
    if name in ("photos", "none") or not name.isidentifier() or data_of_experiment(name):
        return list(words)
    return [f"experiment=[photos,{name}]" if key_of(w) == "experiment" else w for w in words]


def check_option(group: str, value: str) -> None:
    """Raise UserError where a path stands in place of the name of an option."""
    folder = resources.files(CONF) / group
    if (folder / f"{value}.yaml").is_file() or not value:
        return
    path = Path(value).expanduser()
    if "/" in value or path.exists():
        key = "file" if path.suffix.lower() in FORMATS else "root"
        raise UserError(f"{group}={value}: images are named with {group}.{key}={value}")


def has_setting(option: str, key: str) -> bool:
    """Whether an option of `data` or `eval_data` says where its images are by this setting; `root`
    of a list says what its paths are relative to. One that is not installed may have any.
    """
    group, _, name = key.partition(".")
    file = resources.files(CONF) / group / f"{option}.yaml"
    if not file.is_file():
        return True
    content: Any = OmegaConf.to_container(OmegaConf.create(file.read_text()), resolve=False)
    settings = content.get("data", {}) if group == "data" else content
    return name in settings and not (name == "root" and "file" in settings)


def data_of_experiment(name: str) -> str | None:
    """The option of `data` that an experiment chooses, itself or by one that it goes on from."""
    file = resources.files(CONF) / "experiment" / f"{name}.yaml"
    if not file.is_file():
        return None if name in ("", "null") else "unknown"
    content = OmegaConf.create(file.read_text())
    assert isinstance(content, DictConfig)
    for entry in content.get("defaults", []):
        if isinstance(entry, DictConfig) and "override /data" in entry:
            return str(entry["override /data"])
        if isinstance(entry, str) and entry != "_self_" and (option := data_of_experiment(entry)):
            return option
    return None


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
    elif not arguments or arguments[0] in ("-h", "--help", "help"):
        say(*usage().splitlines())
        return
    else:
        command = arguments.pop(0)
    if command not in commands():
        fail(
            f"no command {command!r}{suggestion(command, list(commands()))}; there are "
            f"{', '.join(commands())}{unseen([command])}"
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
            with lean_import():
                function = main_of(cfg)
            set_up_logging()  # after the imports, which set up their own
            function(settings_for(function, cfg))
        except KeyboardInterrupt:
            fail("interrupted", exit_code=130)
        except Exception as error:
            if debugging:
                raise
            report(command, error)
        os.environ["HYDRA_FULL_ERROR"] = "1"

    try:
        arguments = with_data(command, named(command, arguments))
    except UserError as error:
        fail(f"{error}{unseen(arguments)}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as they are, not printed by Hydra
    sweep = bool(set(SWEEP) & set(arguments))
    sys.argv = [Path(program[0]).name, *(quoted(word, sweep) for word in arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        # without one of ours Hydra's own runs the trials, one after another
        sweeper = settings_of(command).get("sweeper") if sweep else None
        if sweeper and not SHOWN & {word.partition("=")[0] for word in arguments}:
            words = [w for w in sys.argv[1:] if w not in (*SWEEP, *flags)]
            function = get_method(sweeper)
            set_up_logging()
            os.environ["HYDRA_FULL_ERROR"] = "1" if debugging else "0"  # as trials have it
            if code := function(CONF, command, words, flags):
                raise SystemExit(code)
            return
        if any(word.startswith("-") for word in sys.argv[1:]):
            with unchecked_help():
                hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name=command)(
                    run
                )()
        else:
            compose_and_run(command, sys.argv[1:], run)
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


def execute(command: str, arguments: Sequence[str]) -> Any:
    """Run a command from Python: what its `main` returns. Nothing is printed of an error, and
    logging is left to the caller, but for Lightning's advice and warnings, which are not for users.

    Raises:
        UserError: wrong settings; others as the command raises them.
    """

    start_clock()

    def run(cfg: DictConfig) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = main_of(cfg)
        quiet_lightning()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return function(settings_for(function, cfg))

    try:
        words = with_data(command, named(command, arguments))
        return compose_and_run(command, [quoted(w, False) for w in words], run)
    except Exception as error:
        cause = understood(command, error)
        if cause is error:
            raise
        raise cause from error


def main_of(cfg: DictConfig) -> Callable[..., Any]:
    """Import the function that gets a command's settings; raises UserError where one is missing."""
    missing = missing_keys(OmegaConf.to_container(cfg, resolve=False))
    if missing:
        raise UserError(f"{missing[0]} is needed: add {missing[0]}=...")
    function: Callable[..., Any] = get_method(cfg.main)
    return function


def compose_and_run(
    command: str, overrides: Sequence[str], run: Callable[[DictConfig], Any]
) -> Any:
    """As `hydra.main` does without options, which composes twice, 0.3 s each time."""
    GlobalHydra.instance().clear()
    with initialize_config_module(CONF, job_name=command, version_base="1.3"):
        cfg = compose(command, overrides=list(overrides), return_hydra_config=True)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.runtime.output_dir = os.getcwd()
        HydraConfig.instance().set_config(cfg)
        cfg = copy.deepcopy(cfg)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        return run(cfg)


def settings_for(function: Callable[..., Any], cfg: DictConfig) -> Any:
    """The settings as the class that a command's `main` is annotated with, checked."""
    hints = get_type_hints(function)
    wanted: Any = next(hint for name, hint in hints.items() if name != "return")
    return parse(cast(type, wanted), cfg) if is_dataclass(wanted) else cfg


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
            override = OverridesParser.create().parse_override(attempt)
        except HydraException:
            continue
        # a path may have commas; elsewhere they mean a sweep, and Hydra says that -m is missing
        if sweep or "/" not in value or not override.is_sweep_override():
            return attempt
    return argument


def set_up_logging() -> None:
    """Warnings on one line each; Lightning's advice is not for users of this command."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    quiet_lightning()


def quiet_lightning() -> None:
    """Keep Lightning's advice to its own users."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def understood(command: str, error: BaseException) -> BaseException:
    """The error behind those that Hydra makes of it; one of Hydra's own in our words."""
    cause = error
    while cause.__cause__ is not None and type(cause).__module__.startswith(("hydra", "omegaconf")):
        if isinstance(cause, ConfigCompositionException):
            break  # its own words say more than what made it
        cause = cause.__cause__
    if isinstance(cause, HydraException | OmegaConfBaseException):
        return UserError(explain(command, str(cause)))
    return cause


def report(command: str, error: Exception) -> None:
    """One line for what the user can mend (exit 2), a traceback for what we must (exit 1)."""
    cause = understood(command, error)
    hint = unseen(sys.argv[1:])
    if isinstance(cause, UserError):
        removed = f"~{str(cause).partition(' ')[0]}"
        fail(f"{cause}{f'; removed by {removed}' if removed in sys.argv else ''}{hint}")
    if isinstance(cause, ValueError) and "Config group override" in str(cause):  # Hydra's, unnamed
        nulls = [word for word in sys.argv if word.endswith("=null") and "." not in word]
        fail(f"{' '.join(nulls)}: a group needs one of its options; ~GROUP leaves it out")
    if isinstance(cause, FloatingPointError | RunFailed):
        fail(str(cause), exit_code=1)
    say(*"".join(traceback.format_exception(cause)).rstrip("\n").split("\n"), file=sys.stderr)
    raise SystemExit(1)


def unseen(words: Sequence[str]) -> str:
    r"""`; data.root ends in \r: ...` if a word or value has an unseen character at an end."""
    for word in words:
        key, _, value = word.partition("=")
        key, value = printable(key.strip()), value.strip("'")
        for where, character in (
            (f"{key} ends in", value[-1:]),
            (f"{key} begins with", value[:1]),
            ("a word begins with", word[:1]),
            ("a word ends in", word[-1:]),
        ):
            if character in ("\r", "\n"):
                why = "was the script saved with Windows line ends?"
                return f"; {where} {printable(character)}: {why}"
            if not character.isprintable():
                return f"; {where} {printable(character)}: was it copied from a page?"
    return ""


def explain(command: str, message: str) -> str:
    """Hydra's message in one line, with the setting that was probably meant."""
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^'@]+)", message):
        key = match[1]
        if "already at" in message:
            return f"{key} is there already: type it without +"
        return (
            f"{key}: no such setting{suggestion(key, setting_names(command))}; ssl-xcit "
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
        meant = suggestion(option[-1], options) or f"; there are {', '.join(options)}"
        return f"{group}={option[-1]}: no such option{meant}"
    if match := re.search(r"Could not load '(\w+)/([^']+)'", message):  # one of a list
        group, name = match.groups()
        folder = resources.files(CONF) / group
        options = (
            [f.name.removesuffix(".yaml") for f in folder.iterdir()] if folder.is_dir() else []
        )
        return (
            f"{group}=[{name}]: no such option{suggestion(name, options)}; there are "
            f"{', '.join(sorted(options))}"
        )
    if match := re.search(r"Key '[^']+' is not in struct\s+full_key: (\S+)", message):
        key = match[1]
        return f"{key}: this setting is needed; ssl-xcit {command} --help lists all"
    if match := re.search(r"Interpolation key '([^']+)' not found", message):
        return f"{match[1]}: no such setting, and another one takes its value from it"
    return " ".join(message.split())


def setting_names(command: str) -> list[str]:
    """Every key of the command's default configuration, and its config groups."""
    GlobalHydra.instance().clear()
    with initialize_config_module(CONF, version_base="1.3"):
        cfg = compose(command)
    names: list[str] = [f.name for f in resources.files(CONF).iterdir() if f.is_dir()]
    if "data" in default_options(command):
        names += ["data.root", "data.file"]  # which choose an option by themselves

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                names.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg), "")
    return names


def suggestion(word: str, words: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = [w for w in words if w.endswith(f".{word}")][:1]
    close = close or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def unchecked_help() -> Iterator[None]:
    """Let options have any help: Hydra 1.3.8 has one that is no string, which argparse of Python
    3.14 refuses.
    """
    parser: Any = argparse.ArgumentParser
    parser._check_help = lambda *_: None  # in place of what it inherits
    try:
        yield
    finally:
        del parser._check_help


def fail(message: str, exit_code: int = 2) -> None:
    """One line, then exit."""
    say(f"ssl-xcit: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def completed_command() -> str | None:
    """The command in the line that a shell completes; without one, print the commands."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        typed = words[1] if len(words) == 2 else ""
        if line:
            say(" ".join(name for name in commands() if name.startswith(typed)))
            return None
        return "pretrain"
    os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    return words[1]
