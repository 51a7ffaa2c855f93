"""`ssl-xcit pretrain -m ...`: a sweep, whose rerun skips what is finished and resumes what is
not.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.files import writable_folder, write_json
from ssl_xcit.plan import check_numbers, check_switches
from ssl_xcit.run_name import PATH_KEYS, folder_name, run_name, that_matter
from ssl_xcit.sweeps import trial as trials
from ssl_xcit.sweeps.driver import Sweep
from ssl_xcit.sweeps.searches import Search
from ssl_xcit.sweeps.space import Choice, Space, read_space
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, STOPPED, Trial
from ssl_xcit.sweeps.watching import Lines
from ssl_xcit.terminal import say

FILE = "sweep.json"
PROGRAM = (sys.executable, "-m", "ssl_xcit")
OURS = ("sweep", "launcher")  # of the sweep, not of its trials
MOST_COMPOSED = 64  # values that are tried on the settings before anything starts


def main(config: str, command: str, words: Sequence[str], flags: Sequence[str]) -> int:
    """Run it.

    Args:
        config: the package of the yaml files.
        command: what each trial runs.
        words: overrides; those that name several values are swept.
        flags: of Hydra's, for each trial.

    Returns:
        The exit code, as of a run; 1 when a trial failed.

    Raises:
        UserError: a setting is wrong; nothing has been started.
    """
    with composing(config, flags) as found:
        space = read_space(words, GlobalHydra.instance().config_loader())
        ours = [w for w in space.fixed if w.split("=")[0].split(".")[0].lstrip("+~") in OURS]
        fixed = [w for w in space.fixed if w not in ours]
        space = Space(tuple(fixed), space.swept)
        cfg = compose(
            command,
            overrides=[*found, *fixed, *first_values(space), *ours],
            return_hydra_config=True,
        )
        data = str(cfg.hydra.runtime.choices["data"])
        check_values(command, space, found)
        search: Search = instantiate(cfg.sweep.search)
        launcher = instantiate(cfg.launcher)
    folder = Path(str(cfg.out)) / (str(cfg.name) if cfg.name else sweep_name(cfg, data, space))
    writable_folder(folder)
    check_same(folder, fixed)
    forced = forced_settings(cfg, space, folder)

    def words_of(trial: Trial) -> list[str]:
        place = [f"out='{folder}'", f"name='{trial.folder.name}'"]
        shared = [*flags, *fixed, *trial.overrides, *forced, *launcher.overrides(), *place]
        kept = [w for w in shared if not w.startswith(("name=", "out=")) or w in place]
        return [*PROGRAM, command, *given_once(kept)]

    search.start(space, folder)
    try:
        write_about(folder, command, [*flags, *words], fixed, space, cfg)
        launcher.start(folder)
        total = f"{search.total} trial{'s' * (search.total != 1)}"
        say(f"{folder}: {total} of {', '.join(space.swept) or 'nothing that varies'}")
        with Lines(search.total, cfg.sweep.metric) as lines:
            sweep = Sweep(
                search, launcher, words_of, cfg.sweep.metric, cfg.sweep.retry_failed, lines
            )
            code = sweep.run()
    finally:
        launcher.close()
        search.close()
    conclude(folder, sweep, code)
    return code


@contextmanager
def composing(config: str, flags: Sequence[str]) -> Iterator[list[str]]:
    """Hydra's compose; what it yields are the folders that `--config-dir` names, as an override."""
    folders = [
        Path(inline if equals else value).resolve()
        for flag, value in zip(flags, [*flags[1:], ""], strict=False)
        for name, equals, inline in [flag.partition("=")]
        if name in ("--config-dir", "-cd")
    ]
    GlobalHydra.instance().clear()
    with initialize_config_module(config, version_base="1.3"):
        yield [f"hydra.searchpath=['file://{folder}']" for folder in folders]
    GlobalHydra.instance().clear()


def first_values(space: Space) -> list[str]:
    """A trial's overrides, to compose with."""
    return [f"{key}={samples(values)[0]}" for key, values in space.swept.items()]


def samples(values: Any) -> list[str]:
    """What a trial may get: all of some values, the ends of an interval."""
    if isinstance(values, Choice):
        return list(values.values)
    return [f"{values.low:g}", f"{values.high:g}"]


def check_values(command: str, space: Space, found: Sequence[str]) -> None:
    """Each value alone makes settings that hold, so that no trial fails of a slip.

    Raises:
        UserError: one does not.
    """
    first = dict(zip(space.swept, first_values(space), strict=True))
    tried = [(key, value) for key, values in space.swept.items() for value in samples(values)]
    for key, value in tried[:MOST_COMPOSED]:
        others = [word for name, word in first.items() if name != key]
        cfg = compose(command, overrides=[*found, *space.fixed, *others, f"{key}={value}"])
        OmegaConf.to_container(cfg, resolve=True)
        check_numbers(cfg)
        check_switches(cfg)


def sweep_name(cfg: DictConfig, data: str, space: Space) -> str:
    """By what its trials have in common and what it varies, but not by the values: more of them
    belong to the same sweep.
    """
    kind = str(cfg.sweep.search.get("_target_", "")).rpartition(".")[2].lower()
    varied = ["sweep" if kind == "grid" else kind, *space.swept]
    return folder_name(varied, run_name(data, space.fixed))


def forced_settings(cfg: DictConfig, space: Space, folder: Path) -> list[str]:
    """What every trial needs for the sweep's sake, and is no part of its results."""
    given = {w.lstrip("+~").split("=")[0] for w in space.fixed}
    forced = []
    online = OmegaConf.select(cfg, "callbacks.online")
    if cfg.sweep.search.get("pruning") is not None and online is not None:
        # a trial that is left out of a comparison for want of time would go on undeservedly
        forced.append("callbacks.online.eval_budget=null")
    if "wandb" in (cfg.get("logger") or {}):
        forced += [f"++logger.wandb.group='{folder.name}'"]
    if OmegaConf.select(cfg, "report") is not None and "report" not in given:
        forced.append("report=null")  # one for the sweep instead; ssl-xcit report makes each
    return [w for w in forced if w.lstrip("+").split("=")[0] not in given]


def given_once(words: Sequence[str]) -> list[str]:
    """Of what is given twice the last, as Hydra would take it for values and would not for
    groups.
    """
    last = {w.split("=")[0]: w for w in words if "=" in w and not w.startswith("-")}
    return [w for w in words if "=" not in w or w.startswith("-") or last[w.split("=")[0]] == w]


def check_same(folder: Path, fixed: Sequence[str]) -> None:
    """A folder belongs to one sweep.

    Raises:
        UserError: it holds trials of other settings, or a run.
    """
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run, not a sweep: take another name=...")
    about = trials.read_json(folder / FILE)
    before, now = (  # a moved data set is each trial's to judge
        {word for word in words if word.partition("=")[0].lstrip("+~") not in PATH_KEYS}
        for words in (about.get("fixed", []), that_matter(fixed))
    )
    if about and before != now:
        raise UserError(
            f"{folder} was made with other settings for all its trials "
            f"({' '.join(sorted(before - now)) or 'nothing'}; now "
            f"{' '.join(sorted(now - before)) or 'nothing'}): take another name=..., or remove it"
        )


def write_about(
    folder: Path,
    command: str,
    words: Sequence[str],
    fixed: Sequence[str],
    space: Space,
    cfg: DictConfig,
) -> None:
    """`sweep.json`: what `ssl-xcit sweep` needs beside the trials' own files."""
    write_json(
        {
            "command": shlex.join(["ssl-xcit", command, "-m", *words]),
            "of": command,
            "all_fixed": list(fixed),
            "fixed": that_matter(fixed),
            "swept": {k: {"kind": type(v).__name__, **asdict(v)} for k, v in space.swept.items()},
            "metric": cfg.sweep.metric,
            "maximize": cfg.sweep.maximize,
        },
        folder / FILE,
    )


def conclude(folder: Path, sweep: Sweep, code: int) -> None:
    """How many of what, and what to type next."""
    counts = {s: list(sweep.states.values()).count(s) for s in (FINISHED, PRUNED, FAILED, STOPPED)}
    words = {FINISHED: "finished", PRUNED: "ended early", FAILED: "failed", STOPPED: "stopped"}
    told = ", ".join(f"{n} {words[s]}" for s, n in counts.items() if n)
    say(f"{folder}: {told or 'no trial has ended'}")
    if code in (75, 130):
        say("the same command goes on")
    elif counts[FAILED]:
        again = "starts them again" if sweep.retry_failed else "leaves them as they are"
        say(f"the same command {again}; why they failed: ssl-xcit sweep {folder}")
    if counts[FINISHED] or counts[PRUNED]:
        say(f"next: ssl-xcit sweep {folder}")
