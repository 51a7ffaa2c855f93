"""`ssl-xcit pretrain -m ...`: a sweep, whose rerun skips finished trials and resumes the others."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.driver import Sweep
from ssl_xcit.sweeps.folder import check_same_sweep, sweep_name, write_sweep_file
from ssl_xcit.sweeps.launchers import Launcher
from ssl_xcit.sweeps.progress import ProgressLines
from ssl_xcit.sweeps.search import Search
from ssl_xcit.sweeps.space import read_space
from ssl_xcit.sweeps.trial import FAILED, FINISHED, PRUNED, STATES, Trial
from ssl_xcit.training.run_name import key_of
from ssl_xcit.training.settings import FinetuneSettings, PretrainSettings, RunSettings, place_keys
from ssl_xcit.utils.files import writable_folder
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import parse

PROGRAM = (sys.executable, "-m", "ssl_xcit")
OURS = ("sweep", "launcher")  # of the sweep, not of its trials
SETTINGS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings}
MOST_COMPOSED = 64  # values that are tried on the settings before anything starts


def main(config: str, command: str, words: Sequence[str], flags: Sequence[str]) -> int:
    """Run a sweep.

    Args:
        config: the package of the yaml files.
        command: that each trial runs.
        words: overrides; those that name several values are swept.
        flags: of Hydra's, for each trial.

    Returns:
        The exit code, as of a run; 1 when a trial failed.

    Raises:
        UserError: a setting is wrong; nothing has been started.
    """
    with composing(config, flags) as folders:
        space = read_space(words, GlobalHydra.instance().config_loader())
        ours = [w for w in space.fixed if key_of(w).split(".")[0] in OURS]
        space = replace(space, fixed=tuple(w for w in space.fixed if w not in ours))
        first, *others = islice(space.one_by_one(), MOST_COMPOSED)
        cfg = compose(command, [*folders, *space.fixed, *first, *ours], return_hydra_config=True)
        choices = cfg.hydra.runtime.choices
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        kind: type[RunSettings] = SETTINGS[command]
        settings = parse(kind, cfg)
        if getattr(settings, "plan", False):
            raise UserError("plan=true is for a single run: leave out -m")
        if settings.sweep is None or settings.launcher is None:
            raise UserError("-m needs the groups sweep and launcher, which ~ has taken away")
        for overrides in others:  # each value by itself is right, so that no trial fails of a typo
            parse(kind, compose(command, [*folders, *space.fixed, *overrides]))
    name = settings.name or sweep_name(
        choices["sweep"], choices.get("data", choices.get("transfer", "")), space
    )
    folder = Path(str(settings.out)) / str(name)
    writable_folder(folder)
    check_same_sweep(folder, space.fixed, place_keys(OmegaConf.to_container(cfg, resolve=True)))

    def command_line(trial: Trial) -> list[str]:
        place = [f"out='{folder}'", f"name='{trial.folder.name}'"]
        shared = [*space.fixed, *trial.overrides, *forced]
        kept = [w for w in last_given(shared) if key_of(w) not in ("out", "name")]
        return [*PROGRAM, command, *flags, *kept, *place]

    search = Search(settings.sweep, space, folder)
    launcher: Launcher = instantiate(settings.launcher, folder=folder)
    forced = [*forced_settings(cfg, folder), *launcher.overrides]
    given = {key_of(word) for word in (*space.fixed, *space.swept)}
    forced = [word for word in forced if key_of(word) not in given]
    write_sweep_file(folder, command, [*flags, *words], space, settings.sweep)
    try:
        total = f"{search.total} trial{'s' * (search.total != 1)}"
        say(f"{folder}: {total} of {', '.join(space.swept) or 'nothing that varies'}")
        with ProgressLines(search.total, settings.sweep.metric) as lines:
            sweep = Sweep(search, launcher, command_line, lines)
            code = sweep.run()
    finally:
        launcher.close()
    print_summary(folder, sweep, code)
    return code


@contextmanager
def composing(config: str, flags: Sequence[str]) -> Iterator[list[str]]:
    """Set up Hydra's compose; yields the folders that `--config-dir` names, as an override."""
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


def forced_settings(cfg: DictConfig, folder: Path) -> list[str]:
    """Settings that every trial gets for the sweep where nobody types them, which change no
    results.
    """
    forced = []
    online = OmegaConf.select(cfg, "callbacks.online")
    if cfg.sweep.pruner is not None and online is not None:
        # a trial without online evaluation, for want of time, would escape pruning
        forced.append("callbacks.online.eval_budget=null")
    if "wandb" in (cfg.get("logger") or {}):
        forced.append(f"++logger.wandb.group='{folder.name}'")
    if OmegaConf.select(cfg, "report") is not None:
        forced.append("report=null")  # one for the sweep instead; ssl-xcit report makes each
    return forced


def last_given(words: Sequence[str]) -> list[str]:
    """The last of overrides with the same key, which Hydra refuses for groups."""
    last = {word.split("=")[0]: word for word in words if "=" in word}
    return [word for word in words if "=" not in word or last[word.split("=")[0]] == word]


def print_summary(folder: Path, sweep: Sweep, code: int) -> None:
    """Print how many trials ended in which way, and the next command."""
    counts = Counter(sweep.states.values())
    summary = ", ".join(
        f"{counts[s]} {'ended early' if s == PRUNED else s}" for s in STATES if counts[s]
    )
    say(f"{folder}: {summary or 'no trial has ended'}")
    if code in (75, 130):
        say("the same command resumes the sweep")
    elif counts[FAILED]:
        retried = sweep.search.settings.retry_failed
        again = "starts them again" if retried else "leaves them as they are"
        say(f"the same command {again}; why they failed: ssl-xcit sweep {folder}")
    if counts[FINISHED] or counts[PRUNED]:
        say(f"next: ssl-xcit sweep {folder}")
