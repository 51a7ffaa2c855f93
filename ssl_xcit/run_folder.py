"""A run's folder: its name, the settings it was made with, and whether a command may go on in
it.
"""

import csv
import json
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ssl_xcit import __version__
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import replacing, sweep, write_json
from ssl_xcit.hardware import machine
from ssl_xcit.locks import exclusive
from ssl_xcit.models.weights import checkpoints_of
from ssl_xcit.run_name import FREE_KEYS, FREE_TRAINER_KEYS


def check_same_run(cfg: DictConfig, run_dir: Path) -> None:
    """A run folder goes on with the settings it was made with.

    Raises:
        UserError: others; lists them.
    """
    path = run_dir / "config.yaml"
    if not (checkpoints_of(run_dir) or (run_dir / "summary.json").exists()):
        return  # nothing to go on with
    if not path.is_file():
        if about_run(run_dir).get("fingerprint") in (None, fingerprint(settings(cfg))):
            return
        raise UserError(
            f"{run_dir} was made with other settings, and its config.yaml is gone: take another "
            "name=..., or remove the folder"
        )
    before, now = settings(OmegaConf.load(path)), settings(cfg)
    recorded = about_run(run_dir).get("fingerprint")
    if recorded is not None and recorded != fingerprint(before):
        raise UserError(
            f"{path} has been changed since the run was made: undo that, or take another name=..."
        )
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
    if flat.get("init.ckpt") is None:  # how a run would start from weights says nothing then
        flat = {key: value for key, value in flat.items() if not key.startswith("init.")}
    return flat


def write_settings(
    cfg: DictConfig, plan: Mapping[str, Any], run_dir: Path, resumed_at: int | None = None
) -> None:
    """`config.yaml` (resolved) and `run.json` (overrides, choices, derived numbers, the machine,
    the steps at which the run went on).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    hydra = HydraConfig.get()
    resumed = about_run(run_dir).get("resumed", [])
    if resumed_at is None:  # from the start
        resumed = []
    elif resumed_at not in resumed:
        resumed = [*resumed, resumed_at]
    run = {
        "overrides": list(hydra.overrides.task),
        "choices": OmegaConf.to_container(hydra.runtime.choices),
        "plan": dict(plan),
        "versions": versions(),
        "machine": machine(),
        "resumed": resumed,
        "run_id": cfg.run_id,
        "fingerprint": fingerprint(settings(cfg)),
    }
    with replacing(run_dir / "config.yaml") as part:
        OmegaConf.save(cfg, part, resolve=True)
    write_json(run, run_dir / "run.json")


@contextmanager
def disk_trouble(run_dir: Path) -> Iterator[None]:
    """Of files that a run cannot do without."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{run_dir} cannot be written ({error}): make room, and the same command goes on"
        ) from error


def fingerprint(flat: Mapping[str, Any]) -> str:
    """Of settings that change results."""
    return sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def about_run(run_dir: Path) -> dict[str, Any]:
    """What `run.json` says; nothing when it cannot be read."""
    try:
        content = json.loads((run_dir / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def run_id_of(run_dir: Path) -> str:
    """The same for all parts of a run, for loggers that continue one."""
    return str(about_run(run_dir).get("run_id") or uuid.uuid4().hex[:8])


@contextmanager
def locked(run_dir: Path, wanted: bool = True) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile; what a killed process left half-written is
    removed.

    Args:
        run_dir: made if need be.
        wanted: only one rank holds it.

    Raises:
        UserError: another process holds it; says which.
    """
    if not wanted:
        yield
        return
    with exclusive(run_dir / ".lock", str(run_dir), "wait for it, or take another name=..."):
        for folder in (run_dir, run_dir / "checkpoints"):
            sweep(folder)
        yield


def last_row(run_dir: Path) -> dict[str, float]:
    """The last report of the training metrics; nothing where none could be written."""
    try:
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["loss"]]
    except FileNotFoundError:
        rows = []
    return {key: float(value) for key, value in rows[-1].items() if value} if rows else {}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "ssl_xcit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
