"""A run's folder: its name, the settings it was made with, and whether a command may go on in
it.
"""

import csv
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ssl_xcit import __version__
from ssl_xcit.errors import UserError
from ssl_xcit.models.weights import checkpoints_of
from ssl_xcit.table import write_json

# What may differ between the parts of one run: where things are and how they are shown
FREE_KEYS = (
    "name", "out", "num_workers", "worker_timeout", "logger", "callbacks", "main", "hydra",
    "data.max_bad_fraction", "compile", "checkpoint_blocks",
)  # fmt: skip
FREE_KEYS_DOTTED = tuple(f"{key}." for key in FREE_KEYS)
FREE_TRAINER_KEYS = ("trainer.accelerator", "trainer.devices")


def check_same_run(cfg: DictConfig, run_dir: Path) -> None:
    """A run folder goes on with the settings it was made with.

    Raises:
        UserError: others; lists them.
    """
    path = run_dir / "config.yaml"
    if not path.is_file() or not (checkpoints_of(run_dir) or (run_dir / "summary.json").exists()):
        return  # nothing to go on with
    before, now = settings(OmegaConf.load(path)), settings(cfg)
    differs = [
        f"{key}={before.get(key)} (now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differs:
        more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
        raise UserError(
            f"{run_dir} was made with {', '.join(differs[:4])}{more}: take another name=..., or "
            "remove the folder"
        )


def settings(cfg: Any) -> dict[str, Any]:
    """Flat keys and values of everything that changes results."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            name = f"{prefix}{key}"
            if name in (*FREE_KEYS, *FREE_TRAINER_KEYS):
                continue
            if isinstance(value, dict | list):
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return flat


def write_settings(cfg: DictConfig, plan: Mapping[str, Any], run_dir: Path) -> None:
    """`config.yaml` (resolved) and `run.json` (overrides, choices, derived numbers)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    hydra = HydraConfig.get()
    run = {
        "overrides": list(hydra.overrides.task),
        "choices": OmegaConf.to_container(hydra.runtime.choices),
        "plan": dict(plan),
        "versions": versions(),
    }
    write_json(run, run_dir / "run.json")
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)


def writable_folder(path: Path) -> None:
    """Make it, and see that files can be made in it.

    Raises:
        UserError: neither can be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path}: no folder to write to ({error.strerror})") from error


def run_name(data: str, overrides: Sequence[str]) -> str:
    """A folder name that the same overrides always give: `photos_optim.lr-0.001_seed-1`."""
    kept = [o for o in overrides if o.split("=")[0].lstrip("+~") not in FREE_KEYS]
    kept = [
        o for o in kept if not o.lstrip("+~").startswith((*FREE_KEYS_DOTTED, *FREE_TRAINER_KEYS))
    ]
    rest = [o for o in kept if not o.startswith("data=")]
    name = "_".join([data, *(re.sub(r"[^\w.+-]+", "-", o) for o in rest)])
    # paths and long lists lose something in a name; a hash tells them apart
    if len(name) > 80 or any("/" in o for o in rest):
        digest = sha256("\0".join(rest).encode()).hexdigest()[:8]
        name = f"{name[:80].rstrip('-_')}_{digest}"
    return name


def last_row(run_dir: Path) -> dict[str, float]:
    """The last report of the training metrics."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return {key: float(value) for key, value in rows[-1].items() if value}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "ssl_xcit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
